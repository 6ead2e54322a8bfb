"""Segments of a label map: what each label is called, its color, and its codes in a terminology. Some formats hold them.

Formats that store segments one by one, or in layers, put them together to one label map here; segments that overlap are an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.text import printable, shorten
from crfrefine.errors import InputError
from crfrefine.io.decode import allocate_array

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_OF_A_NAME = 64
"""Characters of a segment's name: DICOM holds no more."""

_MOST_OF_A_CODE = 64
_MOST_OF_A_SCHEME = 16


@dataclass(frozen=True)
class Code:
    """An entry of a terminology, such as 85756007, SCT, Tissue."""

    value: str
    scheme: str
    meaning: str

    @classmethod
    def of(cls, value: str, scheme: str, meaning: str) -> Code | None:
        """Return a code that every format can hold; None if a part is missing, or is too long to be a code."""
        if not (value and scheme and meaning) or len(value) > _MOST_OF_A_CODE or len(scheme) > _MOST_OF_A_SCHEME:
            return None
        return cls(printable(value), printable(scheme), shorten(meaning, MOST_OF_A_NAME))


TISSUE = Code("85756007", "SCT", "Tissue")
"""Category and type of a segment of which nothing is known."""


@dataclass(frozen=True)
class Segment:
    """A label of a label map."""

    label: int  # its number in the label map, from 1
    name: str  # for people
    color: tuple[float, float, float] | None = None  # (red, green, blue) from 0 to 1; None: one of a palette
    category: Code = TISSUE  # what kind of thing it is, such as an anatomical structure
    type: Code = TISSUE  # what it is
    type_modifier: Code | None = None  # narrows the type, such as Left
    region: Code | None = None  # where in the body it is
    region_modifier: Code | None = None  # narrows the region
    # All that its file says about it, for the module of that format, which writes it back.
    stored: object = field(default=None, repr=False, compare=False)

    @property
    def shown_color(self) -> tuple[float, float, float]:
        """The color, or the palette's."""
        return _PALETTE[(self.label - 1) % len(_PALETTE)] if self.color is None else self.color


# Colors that differ in hue and lightness, in the order of labels.
_PALETTE = (
    (0.50, 0.68, 0.50),
    (0.95, 0.84, 0.57),
    (0.69, 0.48, 0.40),
    (0.44, 0.72, 0.82),
    (0.85, 0.40, 0.31),
    (0.87, 0.51, 0.40),
    (0.56, 0.93, 0.56),
    (0.75, 0.40, 0.34),
    (0.86, 0.96, 0.08),
    (0.31, 0.25, 0.75),
)


def named_segments(names: Mapping[int, str]) -> tuple[Segment, ...]:
    """Return segments of labels with names, without the background."""
    return tuple(Segment(label, name) for label, name in sorted(names.items()) if label > 0)


def segments_of(labels: NDArray[np.integer[Any]], known: Sequence[Segment], *, with_empty: bool = True) -> tuple[Segment, ...]:
    """Return the known segments, and one for each further label that occurs, sorted by label.

    With `with_empty=False`, names without a voxel are left out; segments of a source
    segmentation stay.
    """
    occurring = set(_occurring(labels))
    by_label = {label: Segment(label, f"Label {label}") for label in occurring}
    for segment in known:
        if segment.label > 0 and (with_empty or segment.label in occurring or segment.stored is not None):
            by_label[segment.label] = segment
    return tuple(by_label[label] for label in sorted(by_label))


def with_unique_labels(segments: Sequence[Segment]) -> tuple[tuple[Segment, ...], str | None]:
    """Return segments whose labels differ, and a note if they had to be numbered anew because two had the same one."""
    if len({segment.label for segment in segments}) == len(segments):
        return tuple(segments), None
    numbered = tuple(replace(segment, label=number) for number, segment in enumerate(segments, 1))
    return numbered, "several segments have one label value; labels are the numbers of the segments, from 1"


def _occurring(labels: NDArray[np.integer[Any]]) -> Iterable[int]:
    stored = labels.ravel(order="K")
    counts = np.zeros(int(stored.max(initial=0)) + 1, np.int64)
    for start in range(0, stored.size, 1 << 20):  # bincount converts to 64 bits.
        counts += np.bincount(stored[start : start + (1 << 20)], minlength=len(counts))
    return (int(label) for label in np.flatnonzero(counts) if label > 0)


def empty_label_map(path: Path, shape: tuple[int, ...], segments: Iterable[Segment]) -> NDArray[np.unsignedinteger[Any]]:
    """Return a label map of zeros, ([z,] y, x), whose type holds the labels of all segments."""
    largest = max((segment.label for segment in segments), default=0)
    labels = allocate_array(shape, path, np.dtype(np.uint8 if largest <= 255 else np.uint16))
    labels.fill(0)
    return labels


def put_segment(
    labels: NDArray[np.unsignedinteger[Any]], segment: Segment, inside: NDArray[np.bool_], others: Iterable[Segment], path: Path
) -> None:
    """Write a segment into planes of a label map, where it is; raise InputError, with the name, if another one is there already."""
    taken = inside & (labels != 0) & (labels != segment.label)
    if taken.any():
        other = next(one.name for one in others if one.label == labels[taken][0])
        raise InputError(
            f"{path}: the segments {shorten(other)!r} and {shorten(segment.name)!r} overlap, "
            f"in {np.count_nonzero(taken)} voxels at least\n"
            "  A label map holds one label per voxel. "
            "Let one of them give way (in 3D Slicer: Segment Editor, Masking), and save it again."
        )
    labels[inside] = segment.label
