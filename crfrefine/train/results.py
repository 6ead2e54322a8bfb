"""What a training run found, and the files that say so: the parameters with their origin, the report, the picture of the curves."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import crfrefine
from crfrefine.io.atomic import write_small_file
from crfrefine.io.json import without_nonfinite
from crfrefine.metrics.regions import Region
from crfrefine.parameters.model import CrfParameters
from crfrefine.statistics.comparison import ResultTable, SummaryRow, summarize, summary_dicts
from crfrefine.statistics.verdict import Verdict
from crfrefine.train.baselines import VectorScaling
from crfrefine.train.comparison import LARGEST, NETWORK, TRAINED_LARGEST, MethodValues, judge, make_table
from crfrefine.train.dataset import LabeledCases
from crfrefine.train.fitting import FitResult
from crfrefine.train.options import TrainingOptions
from crfrefine.train.rounding import rounded

SCHEMA = 1


@dataclass(frozen=True)
class FoldResult:
    """A part of the cross-validation.

    Attributes:
        name: such as "fold 1 of 5".
        training: names of the cases whose gradients were followed.
        deciding: names of the cases on which early stopping and the choice of the start rest.
        held_out: names of the cases that were measured.
        fit: the trained CRF.
        scaling: the recalibrated network.
        sigma_mm: width of the smoothing Gaussian.
        keep_largest: which largest component is kept, "foreground" or "each".
        measured: values of each case held out.
    """

    name: str
    training: tuple[str, ...]
    deciding: tuple[str, ...]
    held_out: tuple[str, ...]
    fit: FitResult
    scaling: VectorScaling
    sigma_mm: float
    keep_largest: str
    measured: dict[str, MethodValues]


@dataclass(frozen=True)
class TrainingResult:
    """All that a run found.

    Attributes:
        options: what was asked for.
        cases: the cases.
        regions: what was measured.
        base: the model that was started from.
        folds: of the cross-validation.
        final: trained on all cases.
        scaling: the network recalibrated on all cases.
        sigma_mm: width of the smoothing Gaussian, of all cases.
        keep_largest: which largest component is kept, of all cases.
        seconds: of the run.
        device: where the CRF was computed.
        threads: CPU threads.
    """

    options: TrainingOptions
    cases: LabeledCases
    regions: tuple[Region, ...]
    base: CrfParameters
    folds: tuple[FoldResult, ...]
    final: FitResult
    scaling: VectorScaling
    sigma_mm: float
    keep_largest: str
    seconds: float
    device: str
    threads: int

    @cached_property
    def table(self) -> ResultTable:
        """Every method on every case, each measured in the fold that held it out."""
        measured = {case_id: values for fold in self.folds for case_id, values in fold.measured.items()}
        return make_table({case_id: measured[case_id] for case_id in sorted(measured)})

    @cached_property
    def summary(self) -> list[SummaryRow]:
        """Each method against the network alone."""
        return summarize(self.table, NETWORK, seed=self.options.seed)

    @cached_property
    def summary_of_largest(self) -> list[SummaryRow]:
        """The trained CRF with the largest component kept, against the largest component alone."""
        pair = ResultTable(line for line in self.table if line.method in (LARGEST, TRAINED_LARGEST))
        return summarize(pair, LARGEST, seed=self.options.seed)

    @cached_property
    def verdicts(self) -> tuple[Verdict, Verdict]:
        """The one to read, and the one on the CRF without postprocessing."""
        verdicts = judge(self.table)
        if not self.num_cut_short:
            return verdicts
        read, alone = (replace(one, sentence=f"the time ran out before the training was finished: {one.sentence}") for one in verdicts)
        return read, alone

    @property
    def num_cut_short(self) -> int:
        """Folds whose training the time limit ended."""
        return sum(fold.fit.stopped_by_time for fold in self.folds)

    @property
    def keeps_largest(self) -> bool:
        """Whether the verdict is on the CRF with the largest component, so that `infer` is to keep it."""
        return self.verdict.method == TRAINED_LARGEST and not self.final.is_network

    @property
    def verdict(self) -> Verdict:
        """The one to read."""
        return self.verdicts[0]

    @cached_property
    def parameters(self) -> CrfParameters:
        """What is written: trained on all cases, with as many digits as mean something, and the postprocessing that the verdict is on."""
        parameters = rounded(self.final.parameters)
        return parameters.replace(**{"postprocess.keep_largest": self.keep_largest}) if self.keeps_largest else parameters


def write_results(result: TrainingResult, options: TrainingOptions) -> None:
    """Write the picture, the report and, last, the parameters: each whole or not at all.

    Raises:
        CrfRefineError: a file cannot be written.
    """
    from crfrefine.train.curves import draw_curves

    write_small_file(options.curves, draw_curves(result))
    write_small_file(options.report, (json.dumps(make_report(result), indent=2, default=str, allow_nan=False) + "\n").encode())
    write_small_file(options.output, result.parameters.to_toml(describe_origin(result)).encode())


def describe_origin(result: TrainingResult) -> str:
    """Return the head of the parameter file: who wrote it, what the verdict was, and where each value comes from."""
    final, options = result.final, result.options
    lines = [
        f"Written by crfrefine {crfrefine.__version__} train-crf on {datetime.now(UTC):%Y-%m-%d}: {len(result.cases.files)} cases, "
        f"{len(result.folds)} folds, loss {options.loss}, seed {options.seed}.",
        f"Verdict on cases held out: {result.verdict.sentence}.",
    ]
    if result.cases.left_out:
        lines.append(f"{len(result.cases.left_out)} further cases were left out because a file was missing (see left_out in the report).")
    if result.num_cut_short:
        lines.append(
            f"The time (--max-minutes) ran out in {result.num_cut_short} of {len(result.folds)} folds before their training was finished."
        )
    if final.is_network:
        lines.append("No CRF was better than the network alone: all weights are 0, and `infer` returns the network's labels.")
        return _wrapped(lines)
    if final.stopped_by_time:
        lines.append("The time (--max-minutes) ran out before the training on all cases was finished.")
    if final.best_iteration == 0:
        lines.append(f"The values are those of {final.start}; training on all cases brought nothing better.")
    else:
        lines.append(f"Trained on all cases, beginning with {final.start}.")
    if result.keeps_largest:
        lines.append(f'postprocess.keep_largest: "{result.keep_largest}", best on all cases; the verdict is on the CRF together with it.')
    started = "the file or preset of --config" if options.parameters is not None else "the built-in start"
    lines.append("Where the values come from (value in this file; lowest and highest of the folds):")
    fold_tables = [dict(_entries(fold.fit.parameters)) for fold in result.folds if not fold.fit.is_network]
    for key, value in _entries(result.parameters):
        if _group_of(key) in options.learn:
            others = [table[key] for table in fold_tables if key in table]
            spread = f"; folds {_number(min(others))} to {_number(max(others))}" if others else ""
            lines.append(f"  {key}: trained, {_number(value)}{spread}")
    lines.append(f"All other values are those of {started}; mean_field.num_iterations and tolerance are as in training.")
    return _wrapped(lines)


def make_report(result: TrainingResult) -> dict[str, Any]:
    """Return the content of the report, as JSON has it."""
    options, cases = result.options, result.cases
    read, alone = result.verdicts
    report: dict[str, Any] = without_nonfinite(
        {
            "schema": SCHEMA,
            "version": crfrefine.__version__,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": result.seconds,
            "device": result.device,
            "threads": result.threads,
            "options": {
                "images": str(options.data.images),
                "labels": str(options.data.labels),
                "logits": str(options.data.logits),
                "masks": None if options.data.masks is None else str(options.data.masks),
                "learn": list(options.learn),
                "loss": options.loss,
                "num_folds": len(result.folds),
                "num_iterations": options.num_iterations,
                "seed": options.seed,
                "max_minutes": options.max_minutes,
                "config": None if options.config is None else str(options.config),
            },
            "cases": list(cases.case_ids),
            "left_out": [case.to_dict() for case in cases.left_out],
            "label_names": list(cases.label_names),
            "regions": {region.name: list(region.labels) for region in result.regions},
            "verdict": read.to_dict(),
            "verdict_without_postprocessing": alone.to_dict(),
            "parameters": result.parameters.to_dict(),
            "final": _fit_dict(result.final),
            "vector_scaling": asdict(result.scaling),
            "smoothing_sigma_mm": result.sigma_mm,
            "keep_largest": result.keep_largest,
            "folds": [
                {
                    "name": fold.name,
                    "training": list(fold.training),
                    "deciding": list(fold.deciding),
                    "held_out": list(fold.held_out),
                    "fit": _fit_dict(fold.fit),
                    "vector_scaling": asdict(fold.scaling),
                    "smoothing_sigma_mm": fold.sigma_mm,
                    "keep_largest": fold.keep_largest,
                }
                for fold in result.folds
            ],
            "comparison": summary_dicts(result.summary),
            "comparison_with_largest_component": summary_dicts(result.summary_of_largest),
            "measurements": [asdict(line) for line in result.table],
        }
    )
    return report


def _fit_dict(fit: FitResult) -> dict[str, Any]:
    return {**fit.to_dict(), "is_network": fit.is_network}


def _entries(parameters: CrfParameters) -> Iterable[tuple[str, float]]:
    """Yield each number that could have been trained, by its dotted key."""
    table = parameters.to_dict()
    kernels = table["bilateral"]
    named = [(f"bilateral.{number}" if len(kernels) > 1 else "bilateral", kernel) for number, kernel in enumerate(kernels)]
    spatial = [("spatial", table["spatial"])] if any(_flat(table["spatial"]["weight"])) else []
    for name, section in [*named, *spatial]:
        for key, value in section.items():
            yield from _indexed(f"{name}.{key}", value)
    for row, penalties in enumerate(table["compatibility"].get("matrix", [])):
        yield from ((f"compatibility.matrix[{row}][{column}]", float(value)) for column, value in enumerate(penalties) if column != row)
    yield "mean_field.temperature", table["mean_field"]["temperature"]


def _indexed(key: str, value: Any) -> Iterable[tuple[str, float]]:
    if isinstance(value, list):
        for number, entry in enumerate(value):
            yield from _indexed(f"{key}[{number}]", entry)
    else:
        yield key, float(value)


def _flat(value: Any) -> list[float]:
    return list(value) if isinstance(value, list) else [value]


def _group_of(key: str) -> str:
    if key.startswith("compatibility"):
        return "compatibility"
    if key.startswith("mean_field"):
        return "temperature"
    return "weights" if ".weight" in key else "theta"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _wrapped(lines: Sequence[str]) -> str:
    import textwrap

    return "\n".join(part for line in lines for part in textwrap.wrap(line, 118, subsequent_indent="  " if line.startswith("  ") else ""))
