"""The labeled cases of a run: found, compared with each other, and read one by one with their reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from crfrefine.cases.case import CaseFiles, DatasetDescription, discover_cases, load_case, read_case_headers, read_dataset_description
from crfrefine.cases.completeness import IncompleteCase, describe_left_out, require_all_complete, too_few_complete
from crfrefine.errors import CrfRefineError, InputError, UnexpectedError
from crfrefine.failures import expected_error
from crfrefine.text import shorten
from crfrefine.train.options import DataFolders

if TYPE_CHECKING:
    from crfrefine.cases.case import Case

_NAMES = {
    "images": ("images", "imagesTr"),
    "labels": ("labels", "labelsTr"),
    "logits": ("logits",),
    "masks": ("masks",),
}
_MOST_NAMED = 3

Result = TypeVar("Result")


@dataclass(frozen=True)
class LabeledCases:
    """The cases of a run, all with the same labels, modalities and axes.

    Attributes:
        files: files of each case, sorted by name.
        num_labels: L, background included: channels of the logits.
        num_modalities: channels of the image.
        num_dims: axes of the grid.
        label_names: one per label, background first.
        description: content of `dataset.json`, if there is one.
        notes: what was ignored, and why.
        left_out: the cases that lack a file, sorted by name.
    """

    files: tuple[CaseFiles, ...]
    num_labels: int
    num_modalities: int
    num_dims: int
    label_names: tuple[str, ...]
    description: DatasetDescription | None
    notes: tuple[str, ...]
    left_out: tuple[IncompleteCase, ...] = ()

    @property
    def case_ids(self) -> tuple[str, ...]:
        """Names of the cases."""
        return tuple(files.case_id for files in self.files)

    @property
    def ignore_label(self) -> int | None:
        """The label that marks voxels without a reference."""
        return None if self.description is None else self.description.ignore_label


def locate_folders(
    folder: Path | None,
    *,
    images: Path | None = None,
    labels: Path | None = None,
    logits: Path | None = None,
    masks: Path | None = None,
) -> DataFolders:
    """Return the folders of images, labels, logits and masks.

    Args:
        folder: contains `images/ labels/ logits/` and perhaps `masks/`; None if all are named.
        images: replaces the one in `folder`; the others likewise.
        labels: see `images`.
        logits: see `images`.
        masks: see `images`.

    Raises:
        InputError: one of them does not exist.
    """
    given = {"images": images, "labels": labels, "logits": logits, "masks": masks}
    found: dict[str, Path | None] = {}
    if folder is not None and not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one that holds images/, labels/ and logits/")
    for what, names in _NAMES.items():
        path = given[what]
        if path is None and folder is not None:
            path = next((folder / name for name in names if (folder / name).is_dir()), None)
        elif path is not None and not path.is_dir():
            raise InputError(f"{path}: no such folder; --{what} names the folder of {what}")
        found[what] = path
    if found["images"] is None or found["labels"] is None or found["logits"] is None:
        missing = [what for what in ("images", "labels", "logits") if found[what] is None]
        named = _and(f"--{what}" for what in missing)
        advice = f"name {named} too, or the folder that holds all"
        if folder is not None:
            advice = f"expected {_and(f'{folder / what}/' for what in missing)}; or name them with {named}"
        raise InputError(f"{folder or 'the data'}: no folder of {_and(missing)}: {advice}")
    return DataFolders(found["images"], found["labels"], found["logits"], found["masks"])


def find_cases(data: DataFolders, *, strict: bool = False) -> LabeledCases:
    """Find the complete cases and compare their headers: all must have the same labels, modalities and axes.

    A case that lacks a file is left out. A file that exists but cannot be used is an error: it can be fixed, and a long training without
    the case would have to be repeated.

    Args:
        data: the folders.
        strict: refuse cases that lack a file.

    Raises:
        InputError: a case is ambiguous or differs from the others; fewer than two cases are complete; with `strict`, a case lacks a file.
        GridMismatchError: files of one case are on different grids.
    """
    found = discover_cases(data.images, data.logits, data.masks, data.labels, include_imageless=True)
    left_out = tuple(IncompleteCase(case.case_id, case.missing) for case in found if case.missing)
    if strict:
        require_all_complete(left_out, len(found))
    files = [case for case in found if not case.missing]
    problems = [case.problem for case in files if case.problem]
    if problems:
        shown = "\n  ".join(problems[:_MOST_NAMED])
        more = f"\n  and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
        raise InputError(f"{data.images}: {len(problems)} of {len(files)} cases cannot be trained on:\n  {shown}{more}")
    if len(files) < 2 and left_out:
        raise too_few_complete(
            left_out,
            len(found),
            "at least two cases with image, labels and logits"
            + ("" if data.masks is None else " and mask")
            + ": training holds cases out to measure on",
            "Names must agree, such as CASE_0000.nii.gz, CASE.nii.gz and CASE.npz (docs/reference/formats.md).",
        )
    if len(files) < 2:
        raise InputError(f"{data.images}: found one case; training holds cases out to measure on, so at least two are needed")
    first: tuple[int, int, int] | None = None
    failed: list[CrfRefineError] = []
    for case in files:
        sizes = attempt(partial(_sizes, case, data), case)
        if isinstance(sizes, CrfRefineError):
            failed.append(sizes)
            continue
        first = first or sizes
        for what, size, expected in zip(("labels in the logits", "modalities", "axes"), sizes, first, strict=True):
            if size != expected:
                raise InputError(f"case {case.case_id!r}: {size} {what}, but case {files[0].case_id!r} has {expected}; all must be alike")
    raise_all(failed, len(files), data.images)
    if first is None:
        raise InputError(f"{data.images}: no case found")
    description = read_dataset_description(data.images)
    notes = [*([describe_left_out(left_out, len(found))] if left_out else []), *found.notes]
    return LabeledCases(tuple(files), *first, _label_names(description, first[0]), description, tuple(notes), left_out)


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
        InputError: several failed; the first few are named.
        CrfRefineError: the error of the one that failed.
        UnexpectedError: the error of one of them was not foreseen.
    """
    if len(failed) == 1:
        raise failed[0]
    if not failed:
        return
    shown = "\n  ".join(str(error) for error in failed[:_MOST_NAMED])
    more = f"\n  and {len(failed) - _MOST_NAMED} more" if len(failed) > _MOST_NAMED else ""
    message = f"{folder}: {len(failed)} of {num_cases} cases cannot be trained on:\n  {shown}{more}"
    unexpected = next((error for error in failed if isinstance(error, UnexpectedError)), None)
    if unexpected is not None:
        raise UnexpectedError(message) from unexpected
    raise InputError(message)


def _sizes(case: CaseFiles, data: DataFolders) -> tuple[int, int, int]:
    """Return the numbers of labels, modalities and axes of a case."""
    headers = read_case_headers(case)
    if headers.logits is None:
        raise InputError(f"case {case.case_id!r}: no logits in {data.logits}")
    return headers.logits.num_labels, headers.num_modalities, len(headers.images[0].grid_shape)


def read_labeled(files: CaseFiles, cases: LabeledCases, *, input_type: str, mask_mode: str, threads: int) -> Case:
    """Read one case with its reference and check that labels and logits fit.

    Voxels with the ignore label get the label L, one above the last: they take part in the model but are not counted.

    Raises:
        InputError: the reference has a label that the logits have no channel for, or files cannot be used.
        GridMismatchError: files are on different grids.
        UnsupportedFormatError: a file is damaged.
    """
    case = load_case(files, input_type=input_type, mask_mode=mask_mode, threads=threads, with_labels=True)
    if case.labels is None:
        raise InputError(f"case {files.case_id!r}: no labels")
    labels = case.labels
    ignored = None if cases.ignore_label is None else labels == cases.ignore_label
    largest = int(labels.max(initial=0) if ignored is None else labels.max(initial=0, where=~ignored))
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


def _label_names(description: DatasetDescription | None, num_labels: int) -> tuple[str, ...]:
    names = {0: "background"}
    if description is not None:
        names.update({value: name for name, value in description.labels.items() if isinstance(value, int)})
        names.update({value[0]: name for name, value in description.labels.items() if isinstance(value, tuple) and len(value) == 1})
    # No tabs or line breaks in tables.
    return tuple(shorten(" ".join(names.get(label, "").split())) or f"label {label}" for label in range(num_labels))


def _and(parts: Iterable[str]) -> str:
    listed = list(parts)
    return listed[0] if len(listed) == 1 else ", ".join(listed[:-1]) + " and " + listed[-1]
