"""The options of `crfrefine evaluate`, and their checks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from crfrefine.base.labels import MAX_LABEL
from crfrefine.base.text import listed, shorten, shorten_value
from crfrefine.errors import ConfigError, InputError

METRICS_NAME, SUMMARY_NAME, REPORT_NAME, CASES_NAME = "metrics.csv", "summary.json", "report.html", "cases"
"""Names in the output folder."""

DEFAULT_NAME = "prediction"


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation: what to measure, against what, and where to write the results."""

    predictions: Path  # a folder or a file: label maps, or logits or probabilities of all labels. This is the judged method.
    labels: Path  # a folder or a file: the reference
    output: Path  # folder for the results
    name: str = DEFAULT_NAME  # name of the judged method
    # Name and folder of other methods; the judged method is compared with the first one, the others are its rivals.
    baselines: tuple[tuple[str, Path], ...] = ()
    # Name of a method and the folder of its logits or probabilities, if they are not beside its label maps.
    probabilities: tuple[tuple[str, Path], ...] = ()
    images: Path | None = None  # a folder or a file; shown in the report
    regions: tuple[str, ...] = ()  # each "NAME=1+3+4", or the name of a JSON file
    tolerance_mm: float = 1.0  # tolerance of the surface Dice
    ignore_label: int | None = None  # voxels where the reference has this value are ignored; None: as in `dataset.json`
    processes: int | None = None  # number of cases measured at a time; None: the cores this process may use
    structures: bool | None = None  # whether folders hold one binary file per structure of a case; None: where it is clear
    resample: bool = False  # whether predictions and images on another grid are interpolated onto that of the reference
    resume: bool = False  # reuse earlier results if files and options are the same
    report: bool = True  # also write `report.html`
    fail_fast: bool = False  # stop at the first bad case
    strict: bool = False  # refuse incomplete cases instead of leaving them out
    command_line: str = ""  # as typed, for the report

    @property
    def methods(self) -> dict[str, Path]:
        """Folder or file of each method by its name, the judged one first."""
        return {self.name: self.predictions, **dict(self.baselines)}

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The folders and files in which cases are found."""
        found = (self.labels, *self.methods.values(), *(path for _, path in self.probabilities), self.images)
        return tuple(path for path in found if path is not None)

    @property
    def baseline(self) -> str | None:
        """Name of the method to compare the judged one with."""
        return self.baselines[0][0] if self.baselines else None


def check_options(options: EvaluationOptions) -> None:
    """Raise ConfigError or InputError for invalid options, before anything is read."""
    names = [options.name, *(name for name, _ in options.baselines)]
    if not all(names):
        raise ConfigError("a method has an empty name; expected NAME=FOLDER")
    _require_different("--baseline", names)
    _require_different("--probabilities", [name for name, _ in options.probabilities])
    for name, _ in options.probabilities:
        if name not in names:
            raise ConfigError(f"--probabilities {shorten(name)}: no such method; there are {listed(names)}")
    if not 0 <= options.tolerance_mm < math.inf:
        raise ConfigError(f"--tolerance: expected a number of mm, at least 0, got {options.tolerance_mm:g}")
    if options.ignore_label is not None and not 1 <= options.ignore_label <= MAX_LABEL:
        raise ConfigError(f"--ignore-label: expected a label from 1 to {MAX_LABEL}, got {shorten_value(options.ignore_label)}")
    for path in options.inputs:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
        if path.is_dir() and options.output.is_dir() and path.samefile(options.output):
            raise InputError(
                f"{options.output}: is an input of this run, whose files could be replaced; choose another folder for the results"
            )
    if options.output.exists() and not options.output.is_dir():
        raise InputError(f"{options.output}: is a file; name a folder for the results")


def _require_different(option: str, names: Iterable[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ConfigError(f"{option} {shorten(name)}: two methods have this name; give each a different one")
