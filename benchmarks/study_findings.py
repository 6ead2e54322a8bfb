"""What a study found: the files that the chain wrote, and the comparisons that all of its tables use."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study_chain import ENVIRONMENT, EVALUATION, EVALUATION_LARGEST, LABEL_MAPS, REPORT

from crfrefine.statistics.comparison import MEAN, Measurement, ResultTable
from crfrefine.statistics.paired import PairedComparison, holm
from crfrefine.train.methods import METHODS, NETWORK


@dataclass(frozen=True)
class Findings:
    """What a study found.

    Attributes:
        data: name of the folder.
        logits: name of the folder of logits in it.
        training: the report of train-crf.
        summary: of the evaluation of the trained CRF.
        summary_largest: of the evaluation with the largest component kept.
        table: all methods of both evaluations.
        environment: what the training ran on.
    """

    data: str
    logits: str
    training: dict[str, Any]
    summary: dict[str, Any]
    summary_largest: dict[str, Any]
    table: ResultTable
    environment: dict[str, Any]

    @property
    def regions(self) -> tuple[str, ...]:
        return tuple(self.summary["judged_regions"])

    @property
    def is_of_label_maps(self) -> bool:
        return self.logits.startswith(LABEL_MAPS)

    @property
    def name(self) -> str:
        """As rows of tables begin."""
        return f"{self.data}, `{self.logits.removeprefix(LABEL_MAPS)}`"

    @property
    def num_cases(self) -> int:
        return len(self.table.cases)

    def title(self, region: str) -> str:
        """What people call it: "anterior" for "1 anterior"."""
        return str(self.summary["titles"][region]).removeprefix(f"{region} ")


def read_findings(data: str, logits: str, folder: Path) -> Findings:
    """Read what the chain wrote."""
    training, summary, summary_largest = (
        json.loads((folder / file).read_text())
        for file in (REPORT, Path(EVALUATION) / "summary.json", Path(EVALUATION_LARGEST) / "summary.json")
    )
    for part in (summary, summary_largest):
        if part["failures"]:
            first = part["failures"][0]
            raise SystemExit(f"study: {folder}: not every label map could be measured, such as {first['case']}: {first['error']}")
    measurements = {}
    for part in (EVALUATION, EVALUATION_LARGEST):
        with (folder / part / "metrics.csv").open(newline="") as stream:
            for row in csv.DictReader(stream):
                value = float(row["value"]) if row["value"] else math.nan
                measurements[row["case"], row["label"], row["metric"], row["method"]] = value
    table = ResultTable(Measurement(case, region, metric, value, method) for (case, region, metric, method), value in measurements.items())
    environment = json.loads((folder / REPORT).with_name(ENVIRONMENT).read_text())
    return Findings(data, logits, training, summary, summary_largest, table, environment)


def compare_means(findings: Findings) -> tuple[dict[str, PairedComparison], dict[str, float]]:
    """Return each method's mean Dice against the network's, and its p after Holm's correction over the methods."""
    methods = [method for method in METHODS if method != NETWORK]
    comparisons = {method: findings.table.compare(method, NETWORK, MEAN, "dice", regions=findings.regions) for method in methods}
    return comparisons, dict(zip(methods, holm([comparisons[method].p_value for method in methods]), strict=True))


def points(difference: float) -> str:
    """Of a ratio, in hundredths, with a real minus sign."""
    return "–" if math.isnan(difference) else f"{100 * difference:+.2f}".replace("-", "−")
