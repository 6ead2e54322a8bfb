"""The registry: it says what the metrics do, and `docs/reference/metrics.md` says what the registry does."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from crfrefine.metrics.overlap import measure_masks
from crfrefine.metrics.registry import CALIBRATION_METRICS, MASK_METRICS

DOCS = Path(__file__).parents[2] / "docs"
BETTER = {"higher": "higher", "lower": "lower", "nearer 0": "nearer_zero", "–": None}


def rows_of(text, head):
    """Cells of the table whose head begins so."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.strip().startswith(head)) + 2
    for line in lines[start:]:
        if not line.strip().startswith("|"):
            return
        yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


@pytest.fixture(scope="module")
def page():
    return (DOCS / "reference" / "metrics.md").read_text(encoding="utf-8")


def test_the_page_has_every_metric_with_its_unit_and_direction(page):
    found = {row[0].strip("`"): (row[2], BETTER[row[3]]) for row in rows_of(page, "| metric | definition | unit |")}
    units = {name: metric.unit or ("0 to 1" if metric.is_ratio else "count") for name, metric in MASK_METRICS.items()}
    assert found == {name: (units[name], metric.better) for name, metric in MASK_METRICS.items()}
    calibration = {row[0].strip("`"): BETTER[row[2]] for row in rows_of(page, "| metric | definition | better |")}
    assert calibration == {name: metric.better for name, metric in CALIBRATION_METRICS.items()}


@pytest.mark.parametrize("empty", ["both", "prediction", "reference"])
def test_metrics_are_undefined_where_the_page_says(page, empty):
    rng = np.random.default_rng(5)
    masks = {name: rng.random((6, 4, 3)) < 0.4 for name in ("prediction", "reference")}
    for name, mask in masks.items():
        if empty in ("both", name):
            mask[...] = False
    measured = measure_masks(masks["prediction"], masks["reference"], (0.8, 1.1, 2.5))
    undefined = {name for name, value in measured.items() if math.isnan(value)}
    column = 1 + ["both", "prediction", "reference"].index(empty)
    said = {name.strip("` ") for row in rows_of(page, "| | both empty |") if row[column] == "undefined" for name in row[0].split(",")}
    assert undefined == said
