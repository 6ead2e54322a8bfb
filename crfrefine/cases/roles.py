"""Roles: the role of each input of a case is checked by its voxels.

An image that looks like a label map is an error of its case, and only a note if the user named this
file or its modality; one that equals the reference or the network's output is an error always. A
mask or strokes that look like an image are errors, and so are label maps (`label_input`). The
arrays are those that are read anyway. docs/reference/roles.md has all rules by which a role, or
what a file means, is taken for granted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from crfrefine.arrays.label_maps import map_labels
from crfrefine.arrays.network import ReadPieces
from crfrefine.arrays.scales import ROUNDED, TOPS
from crfrefine.base.array_types import Array
from crfrefine.base.limits import MAX_LABEL
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import shorten
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.content import Look, blocks_of, evidence_of_labels
from crfrefine.errors import InputError
from crfrefine.io.paths import stem_of, suffix_of
from crfrefine.io.reading import Piece

# Names of inputs in errors.
NETWORK = "network's output"
_LEAKS = (
    "The CRF would refine with the answer; name the file of the image there, or list the "
    "modalities in the pattern: {modality:t1,t2}."
)
ADVICE_ON_STROKES = (
    "Name the file of the labels there; is it that of the image? Resample label maps with nearest "
    "neighbor, and cut a mask with a smoothed border at half of its range."
)
_NONZERO = (
    "A mask is not 0 where the model applies. For the voxels in which the image is not 0, give "
    "--set intensity.mask=nonzero in its place."
)

# The volumes of a file are a network's channels if the largest one tells the label of a label map
# at so many of the voxels with one. A coarse prediction and its reference agree so.
_MAX_ALIKE = 0.6


class Modality:
    """A channel of the image of a case, and the evidence of its voxels."""

    def __init__(self, path: Path, values: Array, name: str) -> None:
        self.path = path
        self.values = values  # ([z,] y, x)
        self.evidence = evidence_of_labels(values)  # why it is rather a label map, or ""
        self.name = name  # for messages, such as " of modality t1"

    def error_of_equal(self, role: str, path: Path) -> InputError:
        """Return the error for a modality that is an input with another role."""
        return InputError(
            f"{self.path}: expected an image{self.name}, found the {role}: all of its voxels are "
            f"equal to those of {path}\n  {_LEAKS}",
            cause=f"an image{self.name} is the {role}",
        )


def require_images(files: CaseFiles, modalities: Sequence[Modality], notes: list[Note]) -> None:
    """Raise InputError if a modality is a label map; `notes` gets one on each that is named."""
    wrong = []
    for modality in modalities:
        if modality.evidence and modality.path in files.unnamed:
            wrong.append(modality)
        elif modality.evidence:
            notes.append(NoteKind.NAMED_IMAGE(modality.path.name, reason=modality.evidence))
    if not wrong:
        return
    first = wrong[0]
    raise InputError(
        f"{first.path}: expected an image{first.name}, found a label map by its voxels: "
        f"{first.evidence}\n  {advice_on_images(files, [modality.path for modality in wrong])}",
        cause=f"an image{first.name} is a label map",
    )


def require_no_scores(path: Path, values: Array, labels: Array | None) -> None:
    """Raise InputError if the volumes of one file, (M, [z,] y, x), are a network's channels.

    They are if they sum to 1, 100 or 255 at each voxel, as probabilities do, or if the largest one
    tells the label of nearly each voxel of the network's label map, ([z,] y, x), None for none.
    """
    if len(values) < 2:
        return
    evidence = ""
    top = _total_of(values)
    if top:
        evidence = f"its {len(values)} volumes sum to {top:g} at each voxel, as probabilities do"
    elif labels is not None and _largest_is_label(values, labels):
        evidence = f"the largest of its {len(values)} volumes tells the label of nearly each voxel"
    if evidence:
        raise InputError(
            f"{path}: expected an image, found a network's output by its voxels: {evidence}\n"
            "  -i takes the images, -p the network's output. For images nevertheless, write each "
            "volume to a file, `crfrefine convert IN FOLDER --split`, and name these.",
            cause="the image is a network's output",
        )


def _total_of(values: Array) -> float:
    """Return what volumes, (M, [z,] y, x), sum to at each voxel where they differ; 0 for no top."""
    middle = slice(values.shape[1] // 2, values.shape[1] // 2 + 1)
    found = 0.0
    for planes in (values[:, middle], values):  # Images are known by a plane.
        differs = planes.min(axis=0) != planes.max(axis=0)
        sums = planes.sum(axis=0, dtype=np.float64)[differs]
        found = 0.0
        for top in TOPS:
            if sums.size and np.abs(sums - top).max() <= ROUNDED * top:
                found = top
        if not found or planes.min() < -ROUNDED * found:
            return 0.0
    return found


def _largest_is_label(values: Array, labels: Array) -> bool:
    """Return whether the number of the largest volume is the label, at nearly all labeled voxels.

    The voxels are those where either of them is not 0.
    """
    if values.shape[1:] != labels.shape or not 0 < labels.max() < len(values):
        return False
    largest = values.argmax(axis=0)
    is_labeled = (largest > 0) | (labels > 0)
    num_alike = np.count_nonzero(largest[is_labeled] == labels[is_labeled])
    return bool(num_alike >= _MAX_ALIKE * np.count_nonzero(is_labeled))


def advice_on_images(files: CaseFiles, wrong: Sequence[Path]) -> str:
    """Return what to do about files that a pattern or a folder took for images."""
    if files.modalities:
        named = zip(files.modalities, files.images, strict=True)
        others = [name for name, path in named if path not in wrong]
        advice = "Give a pattern of the images"
        if others:
            advice = f"List the images in the pattern, {{modality:{','.join(others)}}}"
        pattern = f"{{modality:{','.join(files.modalities)}}}"
        return f"{advice}; if it is an image all the same, list it, too: {pattern}."
    path = wrong[0]
    stem = stem_of(path)
    pattern = f"{path.parent.parent}/{{modality:{path.parent.name}}}/{{case}}{suffix_of(path)}"
    if re.search(r"_[0-9]{4}$", stem):
        pattern = f"{path.parent}/{{case}}_{{modality:{stem[-4:]}}}{suffix_of(path)}"
    return (
        "Name the folder of the images, or give a pattern of them; if it is an image all the same, "
        f"name it: -i {shorten(path, 200)}, or, in many cases, -i '{shorten(pattern, 200)}'."
    )


def modalities_of(files: CaseFiles, place: int, values: Array) -> list[Modality]:
    """Return the modalities in a file of images, by its place; its values are (M, [z,] y, x)."""
    path = files.images[place]
    modalities = []
    for channel, of_channel in enumerate(values):
        name = ""
        if files.modalities:
            name = f" of modality {shorten(files.modalities[place])}"
        elif len(values) > 1:
            name = f" in channel {channel}"
        modalities.append(Modality(path, of_channel, name))
    return modalities


def require_other_labels(
    modalities: Iterable[Modality],
    labels: Array,
    role: str,
    path: Path,
    mapping: Mapping[int, int] | None = None,
) -> None:
    """Raise InputError if a modality equals a label map, ([z,] y, x).

    Its values have new labels by a mapping.
    """
    for modality in modalities:
        values = modality.values
        if mapping and modality.evidence and is_in_range(values):
            values, _ = map_labels(np.rint(values).astype(np.uint16), mapping)
        if have_same_values(values, labels):
            raise modality.error_of_equal(role, path)


def require_other_channels(modalities: Sequence[Modality], channels: Array, path: Path) -> None:
    """Raise InputError if a modality is one of a network's (channels, [z,] y, x)."""
    for modality in modalities:
        for channel in channels:
            if have_same_values(modality.values, channel):
                raise modality.error_of_equal(NETWORK, path)


def watched(read: ReadPieces, modalities: Sequence[Modality], path: Path) -> ReadPieces:
    """Return a function that reads pieces as `read` does, and compares channels with modalities.

    A modality that equals a channel is an InputError at the end of the first pass. The modalities
    are let go then, so that they can be freed.
    """
    compared = [*modalities]

    def pieces() -> Iterator[Piece]:
        equal: dict[int, list[Modality]] = {}  # the modalities that equal each channel so far
        for piece in read():
            for number, values in enumerate(piece.values, start=piece.channels.start):
                alike = []
                for modality in equal.get(number, compared):
                    if have_same_parts(modality.values[piece.planes], values):
                        alike.append(modality)
                equal[number] = alike
            yield piece
        for alike in equal.values():
            for modality in alike:
                if not is_constant(modality.values):
                    raise modality.error_of_equal(NETWORK, path)
        compared.clear()

    return pieces


def require_mask(path: Path, look: Look) -> None:
    """Raise InputError for a mask that looks like an image, as its values show."""
    evidence = look.evidence_of_image()
    if evidence:
        raise error_of_image(path, "a mask", evidence, _NONZERO)


def error_of_image(path: Path, role: str, evidence: str, advice: str) -> InputError:
    """Return the error for an input whose voxels look like those of an image."""
    return InputError(
        f"{path}: expected {role}, found an image by its voxels: {evidence}\n  {advice}",
        cause=f"{role} is an image",
    )


def have_same_values(one: Array, other: Array) -> bool:
    """Return whether two arrays, ([z,] y, x), are equal, and not the same number everywhere."""
    return have_same_parts(one, other) and not is_constant(one)


def have_same_parts(one: Array, other: Array) -> bool:
    """Return whether two arrays, ([z,] y, x), are equal; mostly a few values show it."""
    if one.shape != other.shape:
        return False
    for part, same in zip(blocks_of(one), blocks_of(other), strict=True):
        if not np.array_equal(part, same):
            return False
    return True


def is_constant(values: Array) -> bool:
    """Return whether an array has the same number everywhere, which shows nothing."""
    return bool(values.min() == values.max())


def is_in_range(values: Array) -> bool:
    """Return whether the values may be labels by their range."""
    return bool(values.min() >= 0 and values.max() <= MAX_LABEL)


def require_modalities(
    cases: Iterable[CaseFiles], names: Sequence[str], expected: Sequence[str]
) -> None:
    """Raise InputError if images have a modality at another place than the parameters have it.

    The modalities are the `names` of a run, or those by which the files of a case are called: files
    that are named one by one have no names of modalities. Names that only one of them has say
    nothing, and no names neither.
    """
    places = {name.casefold(): place for place, name in enumerate(expected)}
    if len(places) < len(expected):
        return
    found = [names]
    if not names and len(expected) > 1:
        found = [_expected_in_names(files.images, expected) for files in cases]
    for names_of_case in found:
        for place, name in enumerate(names_of_case):
            if places.get(name.casefold(), place) != place:
                in_order = ",".join(expected)
                raise InputError(
                    f"expected the modalities {', '.join(expected)}, in the order of the "
                    f"parameters; found {', '.join(names_of_case)}\n  List them in the pattern, "
                    f"{{modality:{in_order}}}, or name their files in this order: the parameters "
                    "have values for each."
                )


def _expected_in_names(paths: Sequence[Path], expected: Sequence[str]) -> list[str]:
    """Return the modality by which each file is called, [] unless each one is by another one."""
    found: list[str] = []
    for path in paths:
        words = _words_in(stem_of(path), expected) or _words_in(path.parent.name, expected)
        if len(words) != 1 or words[0] in found:
            return []
        found += words
    return found


def _words_in(text: str, words: Sequence[str]) -> list[str]:
    """Return the words that a text has, in any case of letters, not as a part of another one."""
    found = []
    for word in words:
        expression = rf"(?<![^\W_]){re.escape(word.casefold())}(?![^\W_])"
        if re.search(expression, text.casefold()):
            found.append(word)
    return found
