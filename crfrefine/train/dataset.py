"""The labeled cases of a run: found, and compared with each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from crfrefine import io
from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.base.failures import Causes, expected_error
from crfrefine.base.text import listed, see
from crfrefine.errors import CrfRefineError, InputError, UnexpectedError
from crfrefine.io.paths import add_volumes
from crfrefine.runs.cases.case import Case, load_case
from crfrefine.runs.cases.case_files import CaseFiles, CaseList, Incomplete, describe_left_out, require_all_complete, too_few_complete
from crfrefine.runs.cases.case_headers import read_case_headers
from crfrefine.runs.cases.dataset_description import DatasetDescription, read_dataset_description, read_descriptions
from crfrefine.runs.cases.discovery import discover_cases
from crfrefine.runs.cases.label_input import KIND
from crfrefine.runs.cases.nnunet import find_trained_cases, require_trained
from crfrefine.runs.cases.reading_options import NO_REGIONS, DeclaredLabels, ReadingOptions, RegionReading, declared_labels, find_regions
from crfrefine.train.options import DataFolders

_MAX_NAMED = 3

Result = TypeVar("Result")


def attempt(work: Callable[[CaseFiles], Result], case: CaseFiles) -> Result | CrfRefineError:
    """Return the result of the work on a case, or its error, so that all bad cases can be named at once."""
    try:
        return work(case)
    except Exception as error:
        named = expected_error(error, *case.images, *case.logits, case.labels, case.mask)
        if repr(case.case_id) not in str(named):
            named.args = (f"case {case.case_id!r}: {named}",)
        return named


def require_all(results: Sequence[Result | CrfRefineError], folder: Path) -> list[Result]:
    """Return the results of all cases; raise the error of a single bad case, or an error that names the first few and their causes."""
    # A training without the bad cases would have to be repeated once they are fixed.
    failed = [result for result in results if isinstance(result, CrfRefineError)]
    if len(failed) == 1:
        raise failed[0]
    if not failed:
        return [result for result in results if not isinstance(result, CrfRefineError)]
    causes, messages = Causes(), [str(error) for error in failed]
    # A message begins with the name of the case or of a file.
    first = [text for text in messages if causes.is_new(text.removeprefix("case ").partition(":")[0].strip("'"), text)]
    more = [f"and {len(first) - _MAX_NAMED} more"] if len(first) > _MAX_NAMED else []
    lines = [f"{folder}: {len(failed)} of {len(results)} cases cannot be trained on:", *first[:_MAX_NAMED], *causes.others(), *more]
    unexpected = next((error for error in failed if isinstance(error, UnexpectedError)), None)
    raise type(unexpected or InputError())("\n  ".join(lines)) from unexpected


@dataclass(frozen=True)
class LabeledCases:
    """The cases of a run, all with the same labels, modalities and axes."""

    files: tuple[CaseFiles, ...]  # of each case, sorted by name
    num_labels: int  # L of a label map, background included: channels of the logits unless these are regions, or the declared labels
    num_modalities: int
    num_dims: int
    label_names: tuple[str, ...]  # one per label, background first
    description: DatasetDescription | None  # content of `dataset.json`
    notes: tuple[str, ...]  # ignored files, and why
    left_out: Incomplete = field(default_factory=dict)  # the cases that lack a file, sorted by name
    reading: RegionReading = NO_REGIONS  # which channels are regions, and not labels
    regions: RegionScheme | None = None  # the regions of the channels; None means that the channels are labels
    declared: DeclaredLabels | None = None  # the labels of label maps; None for logits

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
    data: DataFolders, *, strict: bool = False, input_type: str = "auto", resample: str | None = None, num_labels: int | None = None
) -> LabeledCases:
    """Find the complete cases and compare their headers: all must have the same labels, modalities and axes."""
    # A case that lacks a file is left out. A file that exists but cannot be used is an error: it
    # can be fixed, and a long training without the case would have to be repeated. Raise InputError
    # also for fewer than two complete cases, and with `strict`, if a case lacks a file.
    cases, description, advice = _discover(data, input_type)
    add_volumes(data.images, data.labels, data.logits, data.masks, *(path for case in cases for path in case.paths))
    left_out = {case.case_id: case.missing for case in cases if case.missing}
    if strict:
        require_all_complete(left_out, len(cases), advice)
    files = [case for case in cases if not case.missing]
    require_all([InputError(case.problem) if case.problem else case for case in files], data.images)
    if len(files) < 2:
        needed = "image, labels, logits and mask" if data.masks is not None else "image, labels and logits"
        expected = f"at least two cases with {needed}: training holds cases out to measure on"
        example = f"Names must agree, such as CASE_0000.nii.gz, CASE.nii.gz and CASE.npz ({see('docs/reference/formats.md')})."
        raise too_few_complete(left_out, len(cases), expected, "\n  ".join(advice) or example)
    descriptions = list(read_descriptions([data.logits, data.images]))
    reading = ReadingOptions(input_type, resample=resample, regions=find_regions(None, descriptions))
    elsewhere: dict[str, list[str]] = {}
    sizes = require_all([attempt(lambda case: _sizes(case, data, reading, elsewhere), case) for case in files], data.images)
    what = "labels" if reading.regions.scheme is None else "channels"
    for case, own_sizes in zip(files, sizes, strict=True):
        for name, size, first in zip((f"{what} in the logits", "modalities", "axes"), own_sizes, sizes[0], strict=True):
            if size != first:
                this, other = (f"{number} {name}" if number else "a label map" for number in (size, first))
                raise InputError(f"case {case.case_id!r}: {this}, but case {files[0].case_id!r} has {other}; all must be alike")
    num_channels, num_modalities, num_dims = sizes[0]
    regions = None
    if num_channels and reading.regions.declares(num_channels):
        # Where the number of channels does not tell whether they are regions, the values of a case do.
        is_sure = num_channels != reading.regions.num_labels
        regions = reading.regions.scheme if is_sure else load_case(files[0], reading).regions
    notes = [*([describe_left_out(left_out, len(cases))] if left_out else []), *advice, *cases.notes]
    if regions is not None:
        notes.append(f"the logits have one channel per region of {reading.regions.source}: {regions.describe()}")
    notes += [f"files of {len(names)} of {len(files)} cases {what}: {listed(names)}" for what, names in elsewhere.items()]
    count, declared = num_channels if regions is None else regions.num_labels, None
    if count == 0:
        declared = declared_labels(files, descriptions, num_labels) or _largest_label(files, data)
        count = declared.num_labels
    sizes_and_names = (count, num_modalities, num_dims, _label_names(description, count))
    return LabeledCases(tuple(files), *sizes_and_names, description, tuple(notes), left_out, reading.regions, regions, declared)


def _discover(data: DataFolders, input_type: str) -> tuple[CaseList, DatasetDescription | None, tuple[str, ...]]:
    """Return all cases, the description of their labels, and how to complete the incomplete ones."""
    if data.nnunet is None:
        cases = discover_cases(data.images, data.logits, data.masks, data.labels, input_type=input_type, include_imageless=True)
        return cases, read_dataset_description(data.images), ()
    trained = find_trained_cases(require_trained(data.nnunet), images=data.images, labels=data.labels, masks=data.masks)
    return trained.cases, trained.description or read_dataset_description(data.images), trained.advice


def _sizes(case: CaseFiles, data: DataFolders, reading: ReadingOptions, elsewhere: dict[str, list[str]]) -> tuple[int, int, int]:
    """Return the numbers of channels (0 for a label map), modalities and axes; `elsewhere` lists the cases on another grid."""
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
    num_channels = 0 if headers.logits.kind == KIND else headers.logits.num_labels
    return num_channels, headers.num_modalities, len(headers.images[0].grid_shape)


def _largest_label(files: Sequence[CaseFiles], data: DataFolders) -> DeclaredLabels:
    """Return the labels up to the largest one of all label maps and references, if nothing else says how many there are."""

    def largest_of(case: CaseFiles) -> int:
        return max(int(io.read_labels(path).data.max(initial=1)) for path in (*case.logits, case.labels) if path is not None)

    largest = require_all([attempt(largest_of, case) for case in files], data.images)
    return DeclaredLabels(tuple(range(max(largest) + 1)), "the label maps and references")


def _label_names(description: DatasetDescription | None, num_labels: int) -> tuple[str, ...]:
    names = {0: "background"} | ({} if description is None else description.label_names)
    return tuple(names.get(label) or f"label {label}" for label in range(num_labels))


def read_labeled(files: CaseFiles, cases: LabeledCases, reading: ReadingOptions, *, threads: int) -> Case:
    """Read one case with its reference and check that labels and logits fit."""
    # Voxels with the ignore label get the label L, one above the last: they take part in the model
    # but are not counted. Raise InputError if the reference has a label that the logits have no
    # channel for, and the errors of `load_case`.
    case = load_case(files, reading, threads=threads, with_labels=True)
    if case.labels is None:
        raise InputError(f"case {files.case_id!r}: no labels")
    if case.regions != cases.regions:
        has = "labels" if case.regions is None else "regions"
        raise InputError(f"case {files.case_id!r}: its channels are {has}, unlike those of other cases\n  {files.logits[0]}")
    ignored = np.zeros_like(case.labels, bool) if cases.ignore_label is None else case.labels == cases.ignore_label
    largest = int(case.labels.max(initial=0, where=~ignored))
    if largest >= case.num_labels:
        source = "the channels of the logits" if cases.declared is None else cases.declared.source
        raise InputError(
            f"case {files.case_id!r}: the reference has a label {largest}, but there are {case.num_labels} labels (0 to "
            f"{case.num_labels - 1}) according to {source if case.regions is None else case.regions.describe()}\n  {files.labels}\n"
            f"  {files.logits[0]}\n  Give logits with one channel per label, background first; or merge the labels of the reference."
        )
    if not ignored.any():
        return case
    if ignored.all():
        raise InputError(f"{files.labels}: every voxel has the label {cases.ignore_label}, to be ignored")
    return replace(case, labels=np.where(ignored, case.num_labels, case.labels).astype(np.min_scalar_type(case.num_labels)))
