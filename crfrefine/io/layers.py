"""Put segments that are stored one by one, or in layers, together to one label map; segments that overlap are an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.text import shorten
from crfrefine.errors import InputError
from crfrefine.io.decode import allocate_array
from crfrefine.io.segments import Segment

if TYPE_CHECKING:
    from numpy.typing import NDArray


def with_unique_labels(segments: Sequence[Segment]) -> tuple[tuple[Segment, ...], str | None]:
    """Return segments whose labels differ, and a note if they had to be numbered anew because two had the same one."""
    if len({segment.label for segment in segments}) == len(segments):
        return tuple(segments), None
    numbered = tuple(replace(segment, label=number) for number, segment in enumerate(segments, 1))
    return numbered, "several segments have one label value; labels are the numbers of the segments, from 1"


@dataclass
class LabelMapBuilder:
    """A label map that segments are written into, one after the other.

    Attributes:
        path: the file, for errors.
        labels: ([z,] y, x); 0 where no segment is.
    """

    path: Path
    labels: NDArray[np.unsignedinteger[Any]]

    @classmethod
    def of(cls, path: Path, shape: tuple[int, ...], segments: Sequence[Segment]) -> LabelMapBuilder:
        """Return an empty label map whose type holds the labels of all segments."""
        largest = max((segment.label for segment in segments), default=0)
        labels = allocate_array(shape, path, np.dtype(np.uint8 if largest <= 255 else np.uint16))
        labels.fill(0)
        return cls(path, labels)

    def add(self, segment: Segment, inside: NDArray[np.bool_], planes: slice, name_of: Callable[[int], str]) -> None:
        """Write a segment into some planes.

        Args:
            segment: its label is written.
            inside: (planes, [y,] x), where it is.
            planes: of the label map.
            name_of: returns the name of the segment with a label, for the error.

        Raises:
            InputError: another segment is there already.
        """
        there = self.labels[planes]
        taken = inside & (there != 0) & (there != segment.label)
        if taken.any():
            other = name_of(int(there[taken][0]))
            raise InputError(
                f"{self.path}: the segments {shorten(other)!r} and {shorten(segment.name)!r} overlap, "
                f"in {np.count_nonzero(taken)} voxels at least\n"
                "  A label map holds one label per voxel. "
                "Let one of them give way (in 3D Slicer: Segment Editor, Masking), and save it again."
            )
        there[inside] = segment.label
