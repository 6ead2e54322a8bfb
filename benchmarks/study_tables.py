"""The tables of a study, from the files that the chain wrote and nothing else."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markdown_table import markdown_table
from report import provenance
from study_chain import ENVIRONMENT, EVALUATION, EVALUATION_LARGEST, REPORT

from crfrefine.statistics.comparison import MEAN, Measurement, ResultTable, format_p
from crfrefine.statistics.paired import PairedComparison, holm
from crfrefine.train.methods import DEFAULT, DICE, GUIDED, METHODS, NETWORK, SCALING, SMOOTHING, TRAINED, TRAINED_LARGEST

# Published: Monteiro, Figueiredo, Oliveira 2018, arXiv:1807.07464, mean and standard deviation of Dice over the cases.
PAPER = (
    ("PROMISE12, V-Net, 5 folds", "prostate", 50, (0.767, 0.109), (0.780, 0.110)),
    ("BraTS 2015 HGG, V-Net, one split", "whole", 33, (0.735, 0.105), (0.738, 0.105)),
    ("BraTS 2015 HGG, V-Net, one split", "core", 33, (0.488, 0.244), (0.482, 0.257)),
)

TITLES = {
    NETWORK: "the network's argmax, Dice",
    SCALING: "vector scaling (temperature, a bias per label)",
    SMOOTHING: "Gaussian smoothing of the logits",
    GUIDED: "guided filter of the probabilities",
    DICE: "best expected Dice (RankSEG) after recalibration",
    DEFAULT: "`default`, untrained",
    TRAINED: "**trained CRF**",
    TRAINED_LARGEST: "trained CRF, then largest component",
}
SURFACES = (("surface_dice", "surface Dice", 4), ("hd95_mm", "HD95, mm", 2), ("assd_mm", "ASSD, mm", 3))


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
    def num_cases(self) -> int:
        return len(self.table.cases)

    def title(self, region: str) -> str:
        """What people call it: "anterior" for "1 anterior"."""
        return str(self.summary["titles"][region]).removeprefix(f"{region} ")

    @property
    def largest_gap(self) -> float:
        """The largest difference between train-crf's own Dice of the held-out cases and that of the label maps written here.

        The preset is left out: train-crf runs it with the trained model's normalization of the image.
        """
        names = {tuple(labels): name for name, labels in self.summary["regions"].items()}
        gaps = []
        for line in self.training["measurements"]:
            if line["metric"] == "dice" and line["method"] != DEFAULT and line["value"] is not None:
                region = names.get(tuple(self.training["regions"][line["region"]]))
                if region is None:
                    continue
                values = dict(zip(self.table.cases, self.table.values(line["method"], region, "dice"), strict=True))
                gaps.append(abs(values[line["case"]] - line["value"]))
        return max(gaps, default=0.0)


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


def summary_table(studies: Sequence[Findings]) -> str:
    """Return a row for each data set and its logits: what the trained CRF changed, and the verdict."""
    rows = []
    for findings in studies:
        comparisons, adjusted = _compare_means(findings)
        trained = comparisons[TRAINED]
        change = f"{_points(trained.mean_difference)} ({_points(trained.interval[0])} to {_points(trained.interval[1])})"
        rows.append(
            [
                f"{findings.data}, `{findings.logits}`",
                str(findings.num_cases),
                f"{trained.mean_baseline:.4f}",
                _points(comparisons[DEFAULT].mean_difference),
                change,
                format_p(adjusted[TRAINED]),
                f"{trained.wins} / {trained.ties} / {trained.losses}",
                findings.summary["verdict"]["outcome"],
            ]
        )
    header = ["", "cases", "network's Dice", "`default`, untrained", "**trained CRF**, points (95 % interval)", "p (Holm)"]
    return markdown_table([*header, "better / equal / worse", "verdict"], rows)


def study_section(findings: Findings) -> str:
    """Return the section of a data set and its logits."""
    folds = len(findings.training["folds"])
    largest = findings.training["verdict"]["method"] == TRAINED_LARGEST
    verdicts = [findings.summary["verdict"], *([findings.summary_largest["verdict"]] if largest else [])]
    sentences = "\n>\n".join(
        "\n>\n".join(f"> {text}" for text in (one["sentence"], one["harm"]["sentence"], *one["notes"])) for one in verdicts
    )
    power = findings.summary["power_note"]
    parts = [
        f"### {findings.data}, `{findings.logits}`, {findings.num_cases} cases, {folds} folds\n",
        _methods_table(findings),
        sentences + "\n",
        "\n".join(f"- {text}" for text in [*([f"Power: {power}."] if power else []), *_notes(findings)]) + "\n",
        provenance({"environment": findings.environment}),
    ]
    return "\n".join(parts)


def _compare_means(findings: Findings) -> tuple[dict[str, PairedComparison], dict[str, float]]:
    """Return each method's mean Dice against the network's, and its p after Holm's correction over the methods."""
    methods = [method for method in METHODS if method != NETWORK]
    comparisons = {method: findings.table.compare(method, NETWORK, MEAN, "dice", regions=findings.regions) for method in methods}
    return comparisons, dict(zip(methods, holm([comparisons[method].p_value for method in methods]), strict=True))


def _methods_table(findings: Findings) -> str:
    table, regions = findings.table, findings.regions
    comparisons, adjusted = _compare_means(findings)
    places = (*regions, MEAN) if len(regions) > 1 else regions
    rows = []
    for method in METHODS:
        cells = []
        for place in places:
            compared = table.compare(method, NETWORK, place, "dice", regions=regions)
            cells.append(f"{compared.mean_baseline:.4f}" if method == NETWORK else _points(compared.mean_difference))
        if method == NETWORK:
            cells += [""] * 3
        else:
            comparison = comparisons[method]
            low, high = comparison.interval
            cells += [f"{_points(low)} to {_points(high)}", format_p(adjusted[method])]
            cells += [f"{comparison.wins} / {comparison.ties} / {comparison.losses}"]
        rows.append(
            [TITLES.get(method, method if method != NETWORK else "the network's argmax, Dice"), *cells, *_surfaces(findings, method)]
        )
    names = [*(findings.title(region) for region in regions), *(["mean"] if len(regions) > 1 else [])]
    header = ["", *names, "95 % interval", "p (Holm)", "better / equal / worse", *(title for _, title, _ in SURFACES)]
    return markdown_table(header, rows)


def _surfaces(findings: Findings, method: str) -> list[str]:
    """Means over cases and regions, over those where both the method and the network have a value: both are then of the same cases."""
    cells = []
    for metric, _, digits in SURFACES:
        values, _ = findings.table.means(metric, [method, NETWORK], findings.regions)
        cells.append(f"{np.nanmean(values):.{digits}f}" if not np.isnan(values).all() else "")
    return cells


def _notes(findings: Findings) -> list[str]:
    training = findings.training
    folds = [fold["fit"] for fold in training["folds"]]
    kernels = [fit["parameters"]["bilateral"][0] for fit in folds if not fit["is_network"]]
    notes = []
    if kernels:
        spans = [f"`{key}` {_span(kernels, key)}" for key in ("theta_alpha", "theta_beta", "weight")]
        notes.append(f"The folds' values, lowest to highest: {', '.join(spans)} (mm; normalized intensity; of all labels).")
    if len(kernels) < len(folds):
        notes.append(f"{len(folds) - len(kernels)} of {len(folds)} folds chose no CRF at all.")
    rows = {(row["method"], row["metric"]): row["mean"] for row in findings.summary["summary"] if row["region"] == "all"}
    if (TRAINED, "ece") in rows and (NETWORK, "ece") in rows:
        changes = [
            f"{title} {rows[NETWORK, metric]:.4f} → {rows[TRAINED, metric]:.4f}"
            for metric, title in (("ece", "ECE"), ("brier", "Brier"), ("nll", "NLL"))
        ]
        notes.append(f"Calibration of the probabilities, network → trained CRF, mean over cases, all labels: {', '.join(changes)}.")
    notes.append(f"Training took {training['seconds'] / 60:.1f} minutes (threads: {training['threads']}).")
    gap = findings.largest_gap
    notes.append(
        "Dice of each method in each held-out case as `train-crf` measured it and as `infer` and `evaluate` give it: "
        + ("the same." if gap < 1e-9 else f"up to {100 * gap:.2g} points apart.")
    )
    return notes


def _span(kernels: Sequence[dict[str, Any]], key: str) -> str:
    values = np.concatenate([np.ravel(kernel[key]) for kernel in kernels])
    return f"{values.min():.2g} to {values.max():.2g}"


def paper_table(studies: Sequence[Findings]) -> str:
    """Return the reference paper's figures and ours in one table: mean ± standard deviation, its test and ours."""
    rows = []
    for setup, region, count, before, after in PAPER:
        change = _points(after[0] - before[0])
        rows.append(["paper: " + setup, region, str(count), _spread(*before), _spread(*after), change, "not significant", "–", "–"])
    for findings in studies:
        rows += _rows_like_the_paper(findings)
    header = ["", "region", "cases", "Dice before", "Dice after", "change, points", "paired t-test, p", "Wilcoxon, p"]
    return markdown_table([*header, "Wilcoxon, p (Holm over regions)"], rows)


def _rows_like_the_paper(findings: Findings) -> list[list[str]]:
    from scipy import stats

    pairs = {}
    for region in findings.regions:
        before, after = (findings.table.values(method, region, "dice") for method in (NETWORK, TRAINED))
        kept = ~np.isnan(before) & ~np.isnan(after)
        pairs[region] = before[kept], after[kept]
    wilcoxon = {region: findings.table.compare(TRAINED, NETWORK, region, "dice").p_value for region in findings.regions}
    adjusted = dict(zip(wilcoxon, holm(list(wilcoxon.values())), strict=True))
    rows = []
    for region, (before, after) in pairs.items():
        cells = [findings.title(region), str(len(before))]
        if len(before) > 1:
            t_test = float(stats.ttest_rel(after, before).pvalue) if np.ptp(after - before) > 0 else math.nan
            cells += [_spread(float(values.mean()), float(values.std(ddof=1))) for values in (before, after)]
            cells += [_points(float((after - before).mean())), format_p(t_test) or "–"]
            cells += [format_p(wilcoxon[region]), format_p(adjusted[region])]
        else:
            cells += ["–"] * 6
        rows.append([f"{findings.data}, `{findings.logits}`", *cells])
    return rows


def _spread(mean: float, deviation: float) -> str:
    return f"{mean:.3f} ± {deviation:.3f}"


def _points(difference: float) -> str:
    """Of a ratio, in hundredths, with a real minus sign."""
    return "–" if math.isnan(difference) else f"{100 * difference:+.2f}".replace("-", "−")
