"""One case with its reference, whose labels fit the logits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from crfrefine.cases.case import Case, CaseFiles, ReadingOptions, load_case
from crfrefine.errors import InputError
from crfrefine.train.dataset import LabeledCases


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
