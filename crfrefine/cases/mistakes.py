"""Recognizes files that were given in the wrong place and folders that lack what a run needs, and says so once.

What a single case lacks is in `discovery` and `label_files`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.axes import StorageOrder
from crfrefine.base.text import listed
from crfrefine.cases.case_files import CaseList
from crfrefine.cases.discovery import discover_cases, list_files, logits_named
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io.paths import LOGITS_SUFFIXES, SCORES_SUFFIXES, suffix_of
from crfrefine.io.recognition import describe_others

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.io.volume import VolumeHeader

EXCHANGED = "-i and -p seem to be exchanged: -i takes the images, -p the network's output."

_VOXELS_LOOKED_AT = 1 << 16
_MAX_LABELS = 256
_MIN_GRAY_VALUES = 32
_MIN_ALIKE = 0.5
"""Share of foreground voxels that have the value of their neighbor: nearly all in a label map, few in an image, which has noise."""


def require_any_output(cases: CaseList, folder: Path) -> None:
    """Raise InputError if no case has a network's output, because the folder holds none."""
    lacking = [reason for case in cases for reason in case.missing if reason.startswith(("no logits", "no label map"))]
    if not cases or len(lacking) < len(cases):
        return
    names = [case.case_id for case in cases]
    message = f"{cases[0].problem}"
    if len(cases) > 1:
        what = lacking[0].partition(" in ")[0]
        message = f"{folder}: {what} of any of the {len(cases)} cases, {listed(names)}; expected names such as {logits_named(names[0])}"
        message += f"{cases[0].problem}".partition("or the like")[2]
    there = [path.name for path in list_files(folder, LOGITS_SUFFIXES)]
    found = f"\n  There are {listed(there)}." if there else describe_others(folder)
    raise InputError(message + (found if any(folder.iterdir()) else "\n  The folder is empty."))


def seem_exchanged(images: Sequence[Path], logits: Sequence[Path]) -> bool:
    """Return whether the cases of the two options are complete the other way round."""
    if not images or not logits:
        return False
    if not (images[0].is_dir() and logits[0].is_dir()):
        return suffix_of(images[0]) in SCORES_SUFFIXES and suffix_of(logits[0]) not in SCORES_SUFFIXES
    try:
        return any(case.logits for case in discover_cases(logits, images))
    except CrfRefineError:
        return False


@contextmanager
def naming_exchanged_files(images: Sequence[VolumeHeader], network: VolumeHeader) -> Generator[None]:
    """Add to an error about a case with a label map that `-i` and `-p` were exchanged, if its files seem so."""
    try:
        yield
    except InputError as error:
        if len(images) == 1 and images[0].num_channels > 1 and network.num_channels == 1:
            raise InputError(f"{error}\n  {EXCHANGED}") from error
        raise


def label_maps_among(images: Sequence[VolumeHeader], values: NDArray[Any]) -> list[str]:
    """Return a note for each image that looks like a label map: a few whole numbers, in areas; only some rows of voxels are looked at.

    `values` are (M, [z,] y, x), as read from the files.
    """
    found: dict[Path, str] = {}
    for number, modality in enumerate(values):
        path = images[number if len(images) > 1 else 0].path
        if _count_labels(modality):
            count = len(np.unique(modality))  # A sample lacks the labels of few voxels.
            found[path] = (
                f"{path.name} looks like a label map, not like an image: {count} values, whole numbers in connected areas; "
                "-i takes the images"
            )
    return list(found.values())


def looks_like_image(values: NDArray[Any]) -> bool:
    """Return whether a sample of values that were read as a label map looks like an image: many values, with noise."""
    stored = StorageOrder.of_files(values.ndim).to_storage(values)
    return len(np.unique(_sample(stored))) > _MIN_GRAY_VALUES and _count_labels(stored) == 0


def _count_labels(values: NDArray[Any]) -> int:
    """Return the number of different values if they are labels as far as a sample tells; 0 for an image."""
    sample = _sample(values)
    inside = sample[:, 1:] != 0
    # np.unique imports numpy.ma, a twentieth of the time of a small case.
    present = np.sort(sample, axis=None)
    present = present[np.append(True, present[1:] != present[:-1])]
    if not inside.any() or not 1 < len(present) <= _MAX_LABELS or present[0] < 0 or np.mod(present, 1).any():
        return 0
    alike = np.mean(sample[:, 1:][inside] == sample[:, :-1][inside])
    return len(present) if alike >= _MIN_ALIKE else 0


def _sample(values: NDArray[Any]) -> NDArray[Any]:
    """Return rows of voxels, at random: every n-th row might be at the border of its plane."""
    rows = values.reshape(-1, values.shape[-1])
    if rows.size <= _VOXELS_LOOKED_AT:
        return rows
    return rows[np.random.default_rng(0).integers(len(rows), size=_VOXELS_LOOKED_AT // rows.shape[1] + 1)]
