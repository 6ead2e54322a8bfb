"""The labeled cases of a run: found, and compared with each other."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from crfrefine import io
from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.base.failures import Causes, expected_error
from crfrefine.base.text import listed, see, shorten
from crfrefine.cases.case import (
    Case,
    CaseFiles,
    CaseList,
    DatasetDescription,
    ReadingOptions,
    load_case,
    read_case_headers,
    read_dataset_description,
)
from crfrefine.cases.case_files import IncompleteCase, describe_left_out, require_all_complete, too_few_complete
from crfrefine.cases.dataset_description import read_descriptions
from crfrefine.cases.discovery import discover_cases
from crfrefine.cases.label_input import KIND
from crfrefine.cases.nnunet import find_trained_cases, require_trained
from crfrefine.cases.reading_options import NO_REGIONS, DeclaredLabels, RegionReading, declared_labels, find_regions
from crfrefine.errors import CrfRefineError, InputError, UnexpectedError
from crfrefine.io.paths import add_volumes
from crfrefine.train.options import DataFolders

_MAX_NAMED = 3

Result = TypeVar("Result")


def attempt(work: Callable[[], Result], case: CaseFiles) -> Result | CrfRefineError:
    """Return the result of the work on a case, or its error, so that all bad cases can be named at once."""
    try:
        return work()
    except Exception as error:
        named = expected_error(error, *case.images, *case.logits, case.labels, case.mask)
        if repr(case.case_id) not in str(named):
            named.args = (f"case {case.case_id!r}: {named}",)
        return named


def raise_all(failed: Sequence[CrfRefineError], num_cases: int, folder: Path) -> None:
    """Raise if any case failed: a training without it would have to be repeated once it is fixed.

    Raises:
        CrfRefineError: the error of the one that failed; of several, one that names the first few, with the first ones of a cause.
    """
    if len(failed) < 2:
        for error in failed:
            raise error
        return
    causes = Causes()
    first = [str(error) for error in failed if causes.is_new(_case_of(str(error)), str(error))]
    more = [f"and {len(first) - _MAX_NAMED} more"] if len(first) > _MAX_NAMED else []
    lines = [f"{folder}: {len(failed)} of {num_cases} cases cannot be trained on:", *first[:_MAX_NAMED], *causes.others(), *more]
    unexpected = next((error for error in failed if isinstance(error, UnexpectedError)), None)
    raise type(unexpected or InputError())("\n  ".join(lines)) from unexpected


def _case_of(problem: str) -> str:
    """Return the name of the case that a message begins with; otherwise its beginning, such as the name of a file."""
    found = re.match(r"case '([^']*)': ", problem)
    return problem.partition(":")[0] if found is None else found[1]


@dataclass(frozen=True)
class LabeledCases:
    """The cases of a run, all with the same labels, modalities and axes.

    Attributes:
        files: files of each case, sorted by name.
        num_labels: L of a label map, background included: channels of the logits unless these are regions, or the declared labels.
        num_modalities: channels of the image.
        num_dims: axes of the grid.
        label_names: one per label, background first.
        description: content of `dataset.json`, if there is one.
        notes: what was ignored, and why.
        left_out: the cases that lack a file, sorted by name.
        reading: which channels are regions, and not labels.
        regions: the regions of the channels; None: the channels are labels.
        declared: the labels of label maps in place of logits; None: there are logits.
    """

    files: tuple[CaseFiles, ...]
    num_labels: int
    num_modalities: int
    num_dims: int
    label_names: tuple[str, ...]
    description: DatasetDescription | None
    notes: tuple[str, ...]
    left_out: tuple[IncompleteCase, ...] = ()
    reading: RegionReading = NO_REGIONS
    regions: RegionScheme | None = None
    declared: DeclaredLabels | None = None

    @property
    def case_ids(self) -> tuple[str, ...]:
        """Names of the cases."""
        return tuple(files.case_id for files in self.files)

    @property
    def ignore_label(self) -> int | None:
        """The label that marks voxels without a reference."""
        return None if self.description is None else self.description.ignore_label

    @property
    def num_channels(self) -> int:
        """Channels of the logits: one per label, or one per region."""
        return self.num_labels if self.regions is None else self.regions.num_regions


def find_cases(
    data: DataFolders,
    *,
    strict: bool = False,
    input_type: str = "auto",
    resample: bool = False,
    num_labels: int | None = None,
) -> LabeledCases:
    """Find the complete cases and compare their headers: all must have the same labels, modalities and axes.

    A case that lacks a file is left out. A file that exists but cannot be used is an error: it can be fixed, and a long training without
    the case would have to be repeated.

    Raises:
        InputError: a case is ambiguous or differs from the others; fewer than two cases are complete; with `strict`, a case lacks a file.
        GridMismatchError: files of one case are on different grids.
    """
    found, description, advice = _discover(data, input_type)
    add_volumes(data.images, data.labels, data.logits, data.masks, *(path for case in found for path in case.paths))
    left_out = tuple(IncompleteCase(case.case_id, case.missing) for case in found if case.missing)
    if strict:
        require_all_complete(left_out, len(found), advice)
    files = [case for case in found if not case.missing]
    raise_all([InputError(case.problem) for case in files if case.problem], len(files), data.images)
    if len(files) < 2 and left_out:
        raise too_few_complete(
            left_out,
            len(found),
            "at least two cases with image, labels and logits"
            + ("" if data.masks is None else " and mask")
            + ": training holds cases out to measure on",
            "\n  ".join(advice)
            or f"Names must agree, such as CASE_0000.nii.gz, CASE.nii.gz and CASE.npz ({see('docs/reference/formats.md')}).",
        )
    if len(files) < 2:
        raise InputError(f"{data.images}: found one case; training holds cases out to measure on, so at least two are needed")
    descriptions = list(read_descriptions([data.logits, data.images]))
    reading = ReadingOptions(input_type, resample=resample, regions=find_regions(None, descriptions))
    first: tuple[int, int, int] | None = None
    failed: list[CrfRefineError] = []
    elsewhere: dict[str, list[str]] = {}
    for case in files:
        sizes = attempt(partial(_sizes, case, data, reading, elsewhere), case)
        if isinstance(sizes, CrfRefineError):
            failed.append(sizes)
            continue
        first = first or sizes
        if (sizes[0] == 0) != (first[0] == 0):
            own, others = ("a label map", "logits") if sizes[0] == 0 else ("logits", "a label map")
            raise InputError(f"case {case.case_id!r}: {own}, but case {files[0].case_id!r} has {others}; all must be alike")
        channels = f"{'labels' if reading.regions.scheme is None else 'channels'} in the logits"
        for what, size, expected in zip((channels, "modalities", "axes"), sizes, first, strict=True):
            if size != expected:
                raise InputError(f"case {case.case_id!r}: {size} {what}, but case {files[0].case_id!r} has {expected}; all must be alike")
    raise_all(failed, len(files), data.images)
    assert first is not None
    regions = None
    if first[0] and reading.regions.declares(first[0]):
        # Where the number of channels does not tell whether they are regions, the values of a case do.
        is_sure = first[0] != reading.regions.num_labels
        regions = reading.regions.scheme if is_sure else load_case(files[0], reading).regions
    count = first[0] if regions is None else regions.num_labels
    notes = [*([describe_left_out(left_out, len(found))] if left_out else []), *advice, *found.notes]
    if regions is not None:
        notes.append(f"the logits have one channel per region of {reading.regions.source}: {regions.describe()}")
    notes += [f"files of {len(names)} of {len(files)} cases {what}: {listed(names)}" for what, names in elsewhere.items()]
    declared = None
    if count == 0:
        declared = declared_labels(files, descriptions, num_labels) or _labels_found(files, data)
        count = declared.num_labels
    return LabeledCases(
        tuple(files),
        count,
        *first[1:],
        label_names=_label_names(description, count),
        description=description,
        notes=tuple(notes),
        left_out=left_out,
        reading=reading.regions,
        regions=regions,
        declared=declared,
    )


def _discover(data: DataFolders, input_type: str) -> tuple[CaseList, DatasetDescription | None, tuple[str, ...]]:
    """Return all cases, the description of their labels, and how to complete the incomplete ones."""
    if data.nnunet is None:
        found = discover_cases(data.images, data.logits, data.masks, data.labels, input_type=input_type, include_imageless=True)
        return found, read_dataset_description(data.images), ()
    trained = find_trained_cases(require_trained(data.nnunet), images=data.images, labels=data.labels, masks=data.masks)
    return trained.cases, trained.description or read_dataset_description(data.images), trained.advice


def _sizes(case: CaseFiles, data: DataFolders, reading: ReadingOptions, elsewhere: dict[str, list[str]]) -> tuple[int, int, int]:
    """Return the numbers of channels (0: a label map), modalities and axes; add it to `elsewhere` by what is done to a file."""
    if case.are_structures:
        raise InputError(
            f"case {case.case_id!r}: {case.logits[0].parent} has one file per structure; training needs label maps with the numbers of the "
            "reference: merge the structures first"
        )
    headers = read_case_headers(case, reading)
    if headers.logits is None:
        raise InputError(f"case {case.case_id!r}: no logits in {data.logits}")
    if headers.on_other_grids:
        elsewhere.setdefault("are interpolated onto the grid of the image", []).append(case.case_id)
    if headers.turnings:
        elsewhere.setdefault("have other voxel axes than the image and are turned, without interpolation", []).append(case.case_id)
    if headers.logits.kind == KIND:
        return 0, headers.num_modalities, len(headers.images[0].grid_shape)
    return headers.logits.num_labels, headers.num_modalities, len(headers.images[0].grid_shape)


def _labels_found(files: Sequence[CaseFiles], data: DataFolders) -> DeclaredLabels:
    """Return the labels up to the largest one of all label maps and references, if nothing else says how many there are."""
    failed: list[CrfRefineError] = []
    largest = 1
    for case in files:
        paths = [path for path in (*case.logits, case.labels) if path is not None]
        found = attempt(lambda paths=paths: max(int(io.read_labels(path).data.max(initial=0)) for path in paths), case)  # type: ignore[misc]
        if isinstance(found, CrfRefineError):
            failed.append(found)
        else:
            largest = max(largest, found)
    raise_all(failed, len(files), data.images)
    return DeclaredLabels(tuple(range(largest + 1)), "the label maps and references")


def _label_names(description: DatasetDescription | None, num_labels: int) -> tuple[str, ...]:
    names = {0: "background"}
    if description is not None:
        names.update({value: name for name, value in description.labels.items() if isinstance(value, int)})
        names.update({value[0]: name for name, value in description.labels.items() if isinstance(value, tuple) and len(value) == 1})
    # No tabs or line breaks in tables.
    return tuple(shorten(" ".join(names.get(label, "").split())) or f"label {label}" for label in range(num_labels))


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
    if largest >= case.num_labels:
        source = "the channels of the logits" if cases.declared is None else cases.declared.source
        raise InputError(
            f"case {files.case_id!r}: the reference has a label {largest}, but there are {case.num_labels} labels (0 to "
            f"{case.num_labels - 1}) according to {source if case.regions is None else case.regions.describe()}\n  {files.labels}\n"
            f"  {files.logits[0]}\n  Give logits with one channel per label, background first; or merge the labels of the reference."
        )
    if ignored is not None and ignored.any():
        if ignored.all():
            raise InputError(f"{files.labels}: every voxel has the label {cases.ignore_label}, to be ignored")
        case = replace(case, labels=np.where(ignored, case.num_labels, labels).astype(np.min_scalar_type(case.num_labels)))
    return case
