"""Whole cases: read with their reference, and worked on side by side unless they are large."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from crfrefine.runs.execution.threads import Workers
from crfrefine.train.labeled_case import read_labeled
from crfrefine.train.plan import Plan

if TYPE_CHECKING:
    from crfrefine.cases.case import Case

LARGE_CASE_VOXELS = 4_000_000
"""Cases of more voxels are read and measured one at a time: several whole ones in memory would be too much."""

Result = TypeVar("Result")


def read_case(plan: Plan, number: int, threads: int) -> Case:
    """Read one case of a run."""
    return read_labeled(plan.cases.files[number], plan.cases, plan.reading, threads=threads)


def is_large(case: Case) -> bool:
    """Return whether only one such case at a time is to be in memory."""
    return bool(case.logits[0].size > LARGE_CASE_VOXELS)


def on_cases(function: Callable[[int, int], Result], numbers: Sequence[int], workers: Workers, *, one_at_a_time: bool) -> list[Result]:
    """Return `function(number, threads)` of each case, in order."""
    run = workers.run_one_by_one if one_at_a_time else workers.run
    return run(function, list(numbers))
