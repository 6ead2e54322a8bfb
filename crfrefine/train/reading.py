"""Whole cases: read with their reference, and worked on side by side unless they are large."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from crfrefine.cases.case import Case, CaseFiles, ReadingOptions, load_case
from crfrefine.errors import InputError
from crfrefine.runs.execution.threads import Workers
from crfrefine.train.dataset import LabeledCases
from crfrefine.train.plan import Plan

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


# One case with its reference, whose labels fit the logits.


def read_labeled(files: CaseFiles, cases: LabeledCases, reading: ReadingOptions, *, threads: int) -> Case:
    """Read one case with its reference and check that labels and logits fit.

    Voxels with the ignore label get the label L, one above the last: they take part in the model but are not counted.

    Raises:
        InputError: the reference has a label that the logits have no channel for, or files cannot be used.
        GridMismatchError: files are on different grids.
        UnsupportedFormatError: a file is damaged.
    """
    case = load_case(files, reading, threads=threads, with_labels=True)
    if case.labels is None:
        raise InputError(f"case {files.case_id!r}: no labels")
    if case.regions != cases.regions:
        has = "labels" if case.regions is None else "regions"
        raise InputError(f"case {files.case_id!r}: its channels are {has}, unlike those of other cases\n  {files.logits[0]}")
    labels = case.labels
    ignored = None if cases.ignore_label is None else labels == cases.ignore_label
    largest = int(labels.max(initial=0) if ignored is None else labels.max(initial=0, where=~ignored))
    if largest >= case.num_labels and case.regions is not None:
        raise InputError(
            f"case {files.case_id!r}: labels and regions do not fit: the reference has a label {largest}, which belongs to no region\n"
            f"  {files.labels}\n  {case.regions.describe()}"
        )
    if largest >= case.num_labels and cases.declared is not None:
        raise InputError(
            f"case {files.case_id!r}: the reference has a label {largest}, but there are {case.num_labels} labels (0 to "
            f"{case.num_labels - 1}) according to {cases.declared.source}\n  {files.labels}\n"
            "  Add it there, or merge the labels of the reference."
        )
    if largest >= case.num_labels:
        raise InputError(
            f"case {files.case_id!r}: labels and logits do not fit: the reference has a label {largest}, but the logits have "
            f"{case.num_labels} channels (labels 0 to {case.num_labels - 1})\n  {files.labels}\n  {files.logits[0]}\n"
            "  Give logits with one channel per label, background first; or merge the labels of the reference."
        )
    if ignored is not None and ignored.any():
        if ignored.all():
            raise InputError(f"{files.labels}: every voxel has the label {cases.ignore_label}, to be ignored")
        case = replace(case, labels=np.where(ignored, case.num_labels, labels).astype(np.min_scalar_type(case.num_labels)))
    return case
