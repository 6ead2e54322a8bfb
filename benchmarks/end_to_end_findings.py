"""What the trainings end to end found, read from the files that they wrote: complete folds only."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from end_to_end_arms import PARAMETERS, RESULT

from crfrefine import CrfParameters
from crfrefine.metrics.regions import ALL_LABELS
from crfrefine.statistics.comparison import Measurement, ResultTable

STAGES = ("network", "longer", "end_to_end", "added")
ENVIRONMENT = "environment.json"


@dataclass(frozen=True)
class Results:
    """Of a data set and a number of training cases.

    Attributes:
        data: name of the folder.
        num_cases: to train on, as asked for: a number or "all".
        folds: the complete ones.
        table: all methods on the cases that these folds held out.
        learned: parameters of each fold's CRF, by stage.
        seconds: of processor time, mean over the folds, by stage.
        environment: what the last fold ran on.
    """

    data: str
    num_cases: str
    folds: tuple[int, ...]
    table: ResultTable
    learned: dict[str, list[CrfParameters]]
    seconds: dict[str, float]
    environment: dict[str, Any]

    @property
    def structures(self) -> tuple[str, ...]:
        """The regions whose mean counts."""
        return tuple(region for region in self.table.regions if region != ALL_LABELS)


def find_results(output: Path) -> list[Results]:
    """Return what there is below a folder: data sets by name, few training cases first."""
    homes = [home for home in output.glob("*/cases_*") if home.is_dir()]
    found = [_read(home) for home in sorted(homes, key=lambda home: (home.parent.name, _number(home)))]
    return [results for results in found if results is not None]


def _number(home: Path) -> float:
    number = home.name.removeprefix("cases_")
    return float(number) if number.isdecimal() else math.inf


def _read(home: Path) -> Results | None:
    needed = [ENVIRONMENT, *(f"{stage}/{RESULT}" for stage in STAGES)]
    folds = sorted(fold for fold in home.glob("fold_*") if all((fold / name).exists() for name in needed))
    if not folds:
        return None
    found = {(fold, stage): json.loads((fold / stage / RESULT).read_text()) for fold in folds for stage in STAGES}
    lines = (row | {"value": math.nan if row["value"] is None else row["value"]} for one in found.values() for row in one["measurements"])
    return Results(
        home.parent.name,
        home.name.removeprefix("cases_"),
        tuple(int(fold.name.removeprefix("fold_")) for fold in folds),
        ResultTable(Measurement(**row) for row in lines),
        {stage: [CrfParameters.load(fold / stage / PARAMETERS) for fold in folds] for stage in STAGES[2:]},
        {stage: sum(found[fold, stage]["processor_seconds"] for fold in folds) / len(folds) for stage in STAGES},
        json.loads((folds[-1] / ENVIRONMENT).read_text()),
    )
