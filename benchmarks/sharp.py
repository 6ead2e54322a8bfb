"""Labels made coarse and brought back to the image's resolution by `crfrefine` and its rivals.

Usage: sharp.py DATA [--organs NAME ...] [--factors N ...] [--half even|odd|all] [--quick]
                [--json FILE]

DATA holds acdc/ atrium/ hippocampus/, each with images/ labels/. Cases count from 0 in the order
of their names: values are chosen on the even cases and reported on the odd cases. The hearts
become coarse in plane only. A case's score is the mean over its labels.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from environment import source_hash
from numpy.typing import NDArray
from report import markdown_table
from sharp_cases import CRF, METHODS, Coarse, Labels, make_coarse, read_case, to_grid

from crfrefine.metrics.overlap import measure_case
from crfrefine.statistics.comparison import format_p
from crfrefine.statistics.paired import holm, signed_rank

ORGANS = {"acdc": "hearts", "atrium": "atria", "hippocampus": "hippocampi"}
IN_PLANE = "acdc"  # becomes coarse along the first two axes only
COARSE_BY = ("majority", "sampled")
METRICS = {"dice": "Dice", "surface_dice": "surface Dice at one voxel"}
NEAREST = "nearest"
LOSS = 0.5  # points; cases that lose more are counted
QUICK_CASES = 2
HALVES = {"even": slice(0, None, 2), "odd": slice(1, None, 2), "all": slice(None)}

Row = tuple[str, str, int]  # folder, way and factor of making coarse
Scores = dict[str, dict[str, float]]  # metrics of each method


def score(labels: Labels, truth: Labels, spacing: Sequence[float]) -> dict[str, float]:
    """Mean over the labels of the reference, with a tolerance of one voxel (its shortest side)."""
    regions = {str(label): (int(label),) for label in np.unique(truth[truth > 0])}
    tolerance, metrics = min(spacing), tuple(METRICS)
    values = measure_case(labels, truth, regions, spacing, tolerance_mm=tolerance, metrics=metrics)
    return {metric: float(np.mean([own[metric] for own in values.values()])) for metric in METRICS}


def measure(data: Path, name: str, factors: list[int], methods: list[str]) -> dict[Row, Scores]:
    """Measure a case, made coarse in every way."""
    image, truth, spacing = read_case(data, name)
    result = {}
    for how in COARSE_BY:
        for factor in factors:
            lengths = (factor, factor, 1 if data.name == IN_PLANE else factor)
            blocks = make_coarse(truth, lengths, how)
            coarse = Coarse(to_grid(blocks, lengths, truth.shape), image, spacing, lengths)
            scores = {NEAREST: score(coarse.labels, truth, spacing)}
            scores |= {name: score(METHODS[name](coarse), truth, spacing) for name in methods}
            result[data.name, how, factor] = scores
    return result


def _values(cases: Sequence[Scores], method: str, metric: str) -> NDArray[np.float64]:
    return np.array([case[method][metric] for case in cases])


def gain_table(found: dict[Row, list[Scores]], methods: Sequence[str], metric: str) -> str:
    """Points above nearest neighbor, with the cases that lose more than LOSS and the worst case."""
    rows = []
    for (folder, how, factor), cases in found.items():
        before = _values(cases, NEAREST, metric)
        cells = []
        for method in methods:
            change = 100 * (_values(cases, method, metric) - before)
            losses = np.count_nonzero(change < -LOSS)
            cells.append(f"{change.mean():+.2f} ({losses}, {change.min():+.2f})")
        row = [ORGANS[folder], how, f"{factor}×", str(len(cases)), f"{before.mean():.3f}"]
        rows.append([*row, *cells])
    return markdown_table(["", "coarse by", "", "cases", NEAREST, *methods], rows)


def test_table(found: dict[Row, list[Scores]], methods: Sequence[str], metric: str) -> str:
    """Points of `crfrefine` above each other method; p of Wilcoxon's test, after Holm in a row."""
    others = [NEAREST, *(method for method in methods if method != CRF)]
    rows = []
    for (folder, how, factor), cases in found.items():
        own = _values(cases, CRF, metric)
        gains = [100 * (own - _values(cases, other, metric)) for other in others]
        tests = holm([signed_rank(gain)[0] for gain in gains])
        pairs = zip(gains, tests, strict=True)
        cells = [f"{gain.mean():+.2f} ({format_p(p)})" for gain, p in pairs]
        rows.append([ORGANS[folder], how, f"{factor}×", *cells])
    return markdown_table(["", "coarse by", "", *others], rows)


def report(found: dict[Row, list[Scores]], methods: Sequence[str]) -> str:
    """All tables."""
    text = ""
    for metric, title in METRICS.items():
        head = f"{title}: points above nearest (cases that lose more than {LOSS:g}, worst case)"
        text += f"### {head}\n\n{gain_table(found, methods, metric)}\n"
        head = f"{title}: points of {CRF} above the others (p after Holm)"
        text += f"### {head}\n\n{test_table(found, methods, metric)}\n"
    return text + f"*sources {source_hash()}*\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Coarse labels, against the true labels.")
    parser.add_argument("data", type=Path, help="folder with acdc/ atrium/ hippocampus/")
    parser.add_argument("--organs", nargs="+", choices=ORGANS, default=list(ORGANS))
    parser.add_argument("--factors", nargs="+", type=int, default=[2, 3, 4], metavar="N")
    parser.add_argument("--half", choices=HALVES, default="odd")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_CASES} cases of each organ")
    parser.add_argument("--json", type=Path, help="write the scores of every case")
    options = parser.parse_args()
    methods = list(METHODS)
    names: list[tuple[Path, str]] = []
    for organ in options.organs:
        data = options.data / organ
        cases = sorted(path.name.removesuffix(".nii.gz") for path in data.glob("labels/*.nii.gz"))
        chosen = cases[HALVES[options.half]][: QUICK_CASES if options.quick else None]
        names += [(data, name) for name in chosen]
    if not names:
        raise SystemExit(f"sharp: no cases in {options.data}; expected acdc/labels/*.nii.gz, …")
    found: dict[Row, list[Scores]] = {}
    record: dict[str, dict[str, Scores]] = {}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(measure, *case, options.factors, methods) for case in names]
        for (_, name), job in zip(names, jobs, strict=True):
            for row, scores in job.result().items():
                found.setdefault(row, []).append(scores)
                record.setdefault(" ".join(map(str, row)), {})[name] = scores
            sys.stderr.write(f"sharp: {name}\n")
    sys.stdout.write(report(found, methods))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
