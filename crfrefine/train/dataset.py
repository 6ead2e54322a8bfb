"""The labeled cases of a run: found, and compared with each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from crfrefine import io
from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.base.failures import expected_error
from crfrefine.base.text import listed, see
from crfrefine.errors import CrfRefineError, InputError, UnexpectedError
from crfrefine.io.paths import add_volumes
from crfrefine.runs.cases.case import Case, load_case
from crfrefine.runs.cases.case_files import (
    CaseFiles,
    Incomplete,
    describe_left_out,
    require_all_complete,
    too_few_complete,
)
from crfrefine.runs.cases.case_headers import CaseHeaders, read_case_headers
from crfrefine.runs.cases.dataset_description import DatasetDescription, read_descriptions
from crfrefine.runs.cases.discovery import discover_cases
from crfrefine.runs.cases.label_input import KIND
from crfrefine.runs.cases.nnunet import find_trained_cases, require_trained
from crfrefine.runs.cases.reading_options import (
    DeclaredLabels,
    ReadingOptions,
    RegionReading,
    declared_labels,
    find_regions,
)
from crfrefine.train.observer import Result, Workers
from crfrefine.train.options import DataFolders

_MAX_NAMED = 3
# cases of more voxels are read and measured one at a time: several of them in memory would be too
# much
LARGE_CASE_VOXELS = 4_000_000


def require_all(
    work: Callable[[CaseFiles, int], Result],
    files: Sequence[CaseFiles],
    folder: Path,
    workers: Workers | None = None,
    *,
    one_by_one: bool = False,
) -> list[Result]:
    """Return `work(case, threads)` of all cases.

    Raise the error of a single bad case, or an error that names the first few.
    """
    # A training without the bad cases would have to be repeated once they are fixed.
    errors: dict[str, CrfRefineError] = {}

    def attempt(case: CaseFiles, threads: int) -> Result | None:
        try:
            return work(case, threads)
        except Exception as error:
            named = errors[case.case_id] = expected_error(
                error, *case.images, *case.logits, case.labels, case.mask
            )
            if repr(case.case_id) not in str(named):
                named.args = (f"case {case.case_id!r}: {named}",)
            return None

    results = (workers or Workers(1)).run(attempt, files, one_by_one=one_by_one)
    failed = [errors[case.case_id] for case in files if case.case_id in errors]
    if not failed:
        return [result for result in results if result is not None]
    if len(failed) == 1:
        raise failed[0]
    more = [f"and {len(failed) - _MAX_NAMED} more"] if len(failed) > _MAX_NAMED else []
    lines = [
        f"{folder}: {len(failed)} of {len(files)} cases cannot be trained on:",
        *map(str, failed[:_MAX_NAMED]),
        *more,
    ]
    unexpected = next((error for error in failed if isinstance(error, UnexpectedError)), None)
    raise (UnexpectedError if unexpected else InputError)("\n  ".join(lines)) from unexpected


class LabeledCases(NamedTuple):
    """The cases of a run, all with the same labels, modalities and axes."""

    files: tuple[CaseFiles, ...]  # of each case, sorted by name
    # channels of the logits (one per label or region), modalities and axes
    sizes: tuple[int, int, int]
    label_names: tuple[str, ...]  # one per label, background first
    ignore_label: int | None  # marks voxels without a reference
    notes: tuple[str, ...]  # ignored files, and why
    left_out: Incomplete  # the cases that lack a file, sorted by name
    reading: RegionReading  # which channels are regions, and not labels
    # the regions of the channels; None means that the channels are labels
    regions: RegionScheme | None
    declared: DeclaredLabels | None  # the labels of label maps; None for logits
    are_large: bool  # whether any case has more than LARGE_CASE_VOXELS

    @property
    def case_ids(self) -> tuple[str, ...]:
        """Names of the cases."""
        return tuple(files.case_id for files in self.files)

    @property
    def num_labels(self) -> int:
        """L of a label map, background included: channels of the logits unless these are regions, or the declared labels."""
        return len(self.label_names)


def find_cases(
    data: DataFolders,
    *,
    strict: bool = False,
    input_type: str = "auto",
    add_background: bool = False,
    resample: str | None = None,
    num_labels: int | None = None,
) -> LabeledCases:
    """Find the complete cases.

    Raise InputError for fewer than two, unusable files, unlike sizes, or, with `strict`, incomplete
    cases.
    """
    advice: tuple[str, ...] = ()
    if data.nnunet is None:
        cases = discover_cases(
            data.images,
            data.logits,
            data.masks,
            data.labels,
            input_type=input_type,
            add_background=add_background,
            include_imageless=True,
        )
    else:
        cases, advice = find_trained_cases(
            require_trained(data.nnunet), images=data.images, labels=data.labels, masks=data.masks
        )
    description = next(
        read_descriptions([data.nnunet or data.images, data.images]),
        DatasetDescription(data.images),
    )
    add_volumes(
        data.images,
        data.labels,
        data.logits,
        data.masks,
        *(path for case in cases for path in case.paths),
    )
    left_out = {case.case_id: case.missing for case in cases if case.missing}
    if strict:
        require_all_complete(left_out, len(cases), advice)
    files = [case for case in cases if not case.missing]
    if len(files) < 2:
        expected = "at least two cases with image, labels and logits: training holds cases out to measure on"
        example = f"Names must agree, such as CASE_0000.nii.gz, CASE.nii.gz and CASE.npz ({see('docs/reference/formats.md')})."
        raise too_few_complete(left_out, len(cases), expected, "\n  ".join(advice) or example)
    descriptions = list(read_descriptions([data.logits, data.images]))
    reading = ReadingOptions(
        input_type,
        resample=resample,
        regions=find_regions(None, descriptions),
        add_background=add_background,
    )
    headers = require_all(lambda case, _: _read_headers(case, reading), files, data.images)
    sizes = [_sizes(own) for own in headers]
    for case, own_sizes in zip(files, sizes, strict=True):
        if own_sizes != sizes[0]:
            what = "(channels, modalities, axes), with 0 channels for a label map, are"
            raise InputError(
                f"case {case.case_id!r}: {what} {own_sizes}, but {sizes[0]} in case {files[0].case_id!r}; all must be alike"
            )
    num_channels = sizes[0][0]
    regions = None
    declared = None
    lacks_background = any(own.logits and own.logits.lacks_background for own in headers)
    if num_channels and not lacks_background and reading.regions.declares(num_channels):
        # Where the number of channels does not tell whether they are regions, the values of a case
        # do.
        is_sure = num_channels != reading.regions.num_labels
        regions = reading.regions.scheme if is_sure else load_case(files[0], reading).regions
    notes = [
        *([describe_left_out(left_out, len(cases))] if left_out else []),
        *advice,
        *cases.notes,
    ]
    if regions is not None:
        notes.append(
            f"the logits have one channel per region of {reading.regions.source}: {regions.describe()}"
        )
    if turned := [
        own.files.case_id for own in headers if any(header.turning for header in own.companions)
    ]:
        notes.append(
            f"other voxel axes than those of the image are turned, without interpolation: cases {listed(turned)}"
        )
    if num_channels == 0:
        declared = declared_labels(files, descriptions, num_labels) or _largest_label(files, data)
        num_channels = declared.num_labels
    names = {0: "background"} | description.label_names
    num_labels = num_channels if regions is None else regions.num_labels
    return LabeledCases(
        tuple(files),
        (num_channels, *sizes[0][1:]),
        label_names=tuple(names.get(label) or f"label {label}" for label in range(num_labels)),
        ignore_label=description.ignore_label,
        notes=tuple(notes),
        left_out=left_out,
        reading=reading.regions,
        regions=regions,
        declared=declared,
        are_large=any(math.prod(own.images[0].grid_shape) > LARGE_CASE_VOXELS for own in headers),
    )


def _read_headers(case: CaseFiles, reading: ReadingOptions) -> CaseHeaders:
    if case.problem:
        raise InputError(case.problem)
    if case.are_structures:
        advice = "merge them into a label map with the numbers of the reference"
        raise InputError(f"{case.logits[0].parent} has one file per structure; {advice}")
    return read_case_headers(case, reading)


def _sizes(headers: CaseHeaders) -> tuple[int, int, int]:
    """Return the numbers of channels (0 for a label map), modalities and axes."""
    logits = headers.logits
    num_channels = 0 if logits is None or logits.kind == KIND else logits.num_labels
    return num_channels, headers.num_modalities, len(headers.images[0].grid_shape)


def _largest_label(files: Sequence[CaseFiles], data: DataFolders) -> DeclaredLabels:
    """Return the labels up to the largest one of all label maps and references, if nothing else says how many there are."""

    def largest_of(case: CaseFiles, _: int) -> int:
        return max(
            int(io.read_labels(path).data.max(initial=1))
            for path in (*case.logits, case.labels)
            if path is not None
        )

    largest = max(require_all(largest_of, files, data.images))
    return DeclaredLabels(tuple(range(largest + 1)), "the label maps and references")


def read_labeled(
    files: CaseFiles, cases: LabeledCases, reading: ReadingOptions, *, threads: int
) -> Case:
    """Read one case with its reference, in which the label L marks voxels to ignore.

    Raise InputError if they do not fit each other.
    """
    case = load_case(files, reading, threads=threads, with_labels=True)
    assert case.labels is not None
    if case.regions != cases.regions:
        has = "labels" if case.regions is None else "regions"
        raise InputError(
            f"case {files.case_id!r}: its channels are {has}, unlike those of other cases\n  {files.logits[0]}"
        )
    if cases.ignore_label is None:
        ignored = np.zeros_like(case.labels, bool)
    else:
        ignored = case.labels == cases.ignore_label
    largest = int(case.labels.max(initial=0, where=~ignored))
    if largest >= case.num_labels:
        if case.regions:
            source = case.regions.describe()
        elif cases.declared:
            source = cases.declared.source
        else:
            source = "the channels of the logits"
        raise InputError(
            f"case {files.case_id!r}: the reference has a label {largest}, but there are {case.num_labels} labels (0 to "
            f"{case.num_labels - 1}) according to {source}\n  {files.labels}\n  {files.logits[0]}\n  Merge the labels of the reference."
        )
    if not ignored.any():
        return case
    if ignored.all():
        raise InputError(
            f"{files.labels}: every voxel has the label {cases.ignore_label}, to be ignored"
        )
    return replace(
        case,
        labels=np.where(ignored, case.num_labels, case.labels).astype(
            np.min_scalar_type(case.num_labels)
        ),
    )
