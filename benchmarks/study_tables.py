"""The tables of a study, from the files that the chain wrote and nothing else.

What changed, and beside which rivals.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from report import markdown_table, provenance

from crfrefine.statistics.comparison import MEAN, Measurement, ResultTable
from crfrefine.statistics.paired import PairedComparison, holm
from crfrefine.statistics.texts import HARM_COLUMN, format_p, harm_text
from crfrefine.statistics.verdict import Outcome
from crfrefine.train.comparison import (
    DEFAULT,
    GUIDED,
    LARGEST,
    METHODS,
    NETWORK,
    SCALING,
    TRAINED,
    with_rule,
)

TRAINED_LARGEST = with_rule(TRAINED, LARGEST)
EVALUATION = "evaluation"
EVALUATION_LARGEST = "evaluation_largest"
REPORT = Path("training") / "params.report.json"
ENVIRONMENT = Path("training") / "environment.json"  # what the training ran on, and its memory
# Name of the study of the label maps of logits: this and the name of the logits.
LABEL_MAPS = "label_maps_of_"

RANKSEG = "rankseg"  # the package of that name, left out where it is not installed
RIVALS = (SCALING, GUIDED, LARGEST, DEFAULT, *([RANKSEG] if find_spec(RANKSEG) else []))
TITLES = {
    NETWORK: "the network's argmax, Dice",
    SCALING: "vector scaling (temperature, a bias per label)",
    GUIDED: "guided filter of the probabilities",
    RANKSEG: "`rankseg`, the mask of the best expected Dice",
    DEFAULT: "`default`, untrained",
    TRAINED: "**trained CRF**",
    TRAINED_LARGEST: "trained CRF, then largest component",
}
SURFACES = (
    ("surface_dice", "surface Dice, one voxel", 4),
    ("hd95_mm", "HD95, mm", 2),
    ("assd_mm", "ASSD, mm", 3),
)
TESTS = ["p (Holm)", "better / equal / worse", HARM_COLUMN]
CHANGES = [
    "cases",
    "network's Dice",
    "`default`, untrained",
    "**trained CRF**, points (95 % interval)",
    *TESTS,
]


@dataclass(frozen=True)
class Findings:
    data: str  # Name of the folder.
    logits: str  # Name of the folder of logits in it.
    training: dict[str, Any]  # The report of train-crf.
    summary: dict[str, Any]  # Evaluation of the trained CRF.
    summary_largest: dict[str, Any]  # Evaluation with the largest component kept.
    table: ResultTable  # All methods of both evaluations.
    environment: dict[str, Any]  # Where the training ran.

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

    @cached_property
    def comparisons(self) -> dict[str, tuple[PairedComparison, float]]:
        """Return each method's mean Dice beside the network's, and its p after Holm."""
        methods = [
            method
            for method in (RANKSEG, *METHODS)
            if method != NETWORK and method in self.table.methods
        ]
        compared = [
            self.table.compare(method, NETWORK, MEAN, "dice", regions=self.regions)
            for method in methods
        ]
        adjusted = holm([comparison.p_value for comparison in compared])
        return dict(zip(methods, zip(compared, adjusted, strict=True), strict=True))

    @property
    def columns(self) -> list[str]:
        """Name, and the cells of CHANGES: what `default` and the trained CRF changed."""
        default, _ = self.comparisons[DEFAULT]
        trained, p_value = self.comparisons[TRAINED]
        low, high = trained.interval
        change = f"{points(trained.mean_difference)} ({points(low)} to {points(high)})"
        cells = [
            self.name,
            str(len(self.table.cases)),
            f"{trained.mean_baseline:.4f}",
            points(default.mean_difference),
            change,
        ]
        return [*cells, *change_cells(trained, p_value, with_name=True)]

    @property
    def is_anecdote(self) -> bool:
        """Whether there are too few cases for a verdict."""
        return self.summary["verdict"]["outcome"] == Outcome.TOO_FEW

    @property
    def outcome(self) -> str:
        if self.is_anecdote:
            return f"{len(self.table.cases)} cases: an anecdote"
        return self.summary["verdict"]["outcome"]


def read_findings(data: str, logits: str, folder: Path) -> Findings:
    evaluations = folder / EVALUATION, folder / EVALUATION_LARGEST
    files = (
        folder / REPORT,
        *(evaluation / "summary.json" for evaluation in evaluations),
        folder / ENVIRONMENT,
    )
    training, summary, summary_largest, environment = (
        json.loads(file.read_text()) for file in files
    )
    measurements = {}
    for evaluation in evaluations:
        with (evaluation / "metrics.csv").open(newline="") as stream:
            for row in csv.DictReader(stream):
                measurements[row["case"], row["label"], row["metric"], row["method"]] = float(
                    row["value"] or "nan"
                )
    table = ResultTable(
        Measurement(case, region, metric, value, method)
        for (case, region, metric, method), value in measurements.items()
    )
    return Findings(data, logits, training, summary, summary_largest, table, environment)


def points(difference: float) -> str:
    """Of a ratio, in hundredths, with a real minus sign."""
    if math.isnan(difference):
        return "–"
    return f"{100 * difference:+.2f}".replace("-", "−")


def change_cells(
    comparison: PairedComparison, p_value: float, *, with_name: bool = False
) -> list[str]:
    """Return the cells of TESTS."""
    counts = f"{comparison.wins} / {comparison.ties} / {comparison.losses}"
    return [format_p(p_value), counts, harm_text(comparison, with_name=with_name, minus="−")]


def make_document(studies: Sequence[Findings]) -> dict[str, str]:
    """Return the text of each pair of markers."""
    of_logits = [findings for findings in studies if not findings.is_of_label_maps]
    return {
        "summary": summary_table(of_logits),
        "study": "\n".join(map(study_section, of_logits)),
        "label-maps": label_maps_table(studies),
    }


def summary_table(studies: Sequence[Findings]) -> str:
    """Return a row for each data set and its logits.

    What the trained CRF changed, the best of the simple rivals, and the verdict.
    """
    rows = []
    for findings in studies:
        gains = {rival: findings.comparisons[rival][0].mean_difference for rival in RIVALS}
        best = max(gains, key=gains.__getitem__)
        rows.append([*findings.columns, f"{best}, {points(gains[best])}", findings.outcome])
    return markdown_table(["", *CHANGES, "best rival", "verdict"], rows)


def label_maps_table(studies: Sequence[Findings]) -> str:
    """Return a row for each study of label maps.

    What the CRF changed with them and, beside it, with the logits.
    """
    with_logits = {
        findings.name: findings.comparisons[TRAINED][0]
        for findings in studies
        if not findings.is_of_label_maps
    }
    of_maps = [findings for findings in studies if findings.is_of_label_maps]
    rows = [
        [*own.columns, own.outcome, points(with_logits[own.name].mean_difference)]
        for own in of_maps
    ]
    if rows:
        return markdown_table(["label maps of", *CHANGES, "verdict", "trained on the logits"], rows)
    return "None was studied.\n"


def study_section(findings: Findings) -> str:
    """Return the section of a data set and its logits.

    Every method, the verdict, what was learned.
    """
    folds = len(findings.training["folds"])
    largest = findings.training["verdict"]["method"] == TRAINED_LARGEST
    verdicts = [
        findings.summary["verdict"],
        *([findings.summary_largest["verdict"]] if largest else []),
    ]
    sentences = [
        text
        for verdict in verdicts
        for text in (verdict["sentence"], verdict["harm"]["sentence"], *verdict["notes"])
    ]
    anecdote = f"**{findings.outcome}.**\n\n" if findings.is_anecdote else ""
    quoted = "\n>\n".join(f"> {text}" for text in sentences)
    notes = "\n".join(f"- {text}" for text in _notes(findings))
    head = f"### {findings.name}, {len(findings.table.cases)} cases, {folds} folds\n\n{anecdote}"
    origin = provenance(findings.environment)
    return f"{head}{_methods_table(findings)}\n{quoted}\n\n{notes}\n\n{origin}"


def _methods_table(findings: Findings) -> str:
    table = findings.table
    regions = findings.regions
    comparisons = findings.comparisons
    places = (*regions, MEAN) if len(regions) > 1 else regions
    rows = []
    for method in (NETWORK, *comparisons):
        compared = [
            table.compare(method, NETWORK, place, "dice", regions=regions) for place in places
        ]
        if method == NETWORK:
            cells = [*(f"{own.mean_baseline:.4f}" for own in compared), *[""] * (1 + len(TESTS))]
        else:
            comparison, p_value = comparisons[method]
            low, high = comparison.interval
            cells = [
                *(points(own.mean_difference) for own in compared),
                f"{points(low)} to {points(high)}",
            ]
            cells += change_cells(comparison, p_value)
        for metric, _, digits in SURFACES:
            # Over cases and regions for which both the method and the network have a value: both
            # means are of the same cases.
            values, _ = table.means(metric, [method, NETWORK], regions)
            cells.append(f"{np.nanmean(values):.{digits}f}" if not np.isnan(values).all() else "")
        rows.append([TITLES.get(method, method), *cells])
    # What people call a region: "anterior" for "1 anterior".
    names = [
        str(findings.summary["titles"][region]).removeprefix(f"{region} ") for region in regions
    ]
    header = ["", *names, *(["mean"] if len(regions) > 1 else []), "95 % interval", *TESTS]
    return markdown_table([*header, *(title for _, title, _ in SURFACES)], rows)


def _notes(findings: Findings) -> list[str]:
    folds = [fold["fit"] for fold in findings.training["folds"]]
    kernels = [fit["parameters"]["bilateral"][0] for fit in folds if not fit["is_network"]]
    if RANKSEG in findings.comparisons:
        notes = []
    else:
        notes = ["`rankseg` was not installed and is left out."]
    if kernels:
        alpha, beta, weight = (
            _span(kernels, key) for key in ("theta_alpha", "theta_beta", "weight")
        )
        notes.append(
            f"Values of the folds: `theta_alpha` {alpha} mm, `theta_beta` {beta}, `weight` "
            f"{weight}."
        )
    if len(kernels) < len(folds):
        notes.append(f"{len(folds) - len(kernels)} of {len(folds)} folds chose no CRF at all.")
    return notes


def _span(kernels: Sequence[dict[str, Any]], key: str) -> str:
    values = np.concatenate([np.ravel(kernel[key]) for kernel in kernels])
    return f"{values.min():.2g} to {values.max():.2g}"
