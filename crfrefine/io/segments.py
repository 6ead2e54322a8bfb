"""Segments of a label map: what each label is called, and its color. Some formats hold them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_OF_A_NAME = 64
"""Characters of a segment's name: DICOM holds no more."""


@dataclass(frozen=True)
class Segment:
    """A label of a label map."""

    label: int  # its number in the label map, from 1
    name: str  # for people
    color: tuple[float, float, float] | None = None  # (red, green, blue) from 0 to 1; None: one of a palette

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


def segments_of(labels: NDArray[np.integer[Any]], known: Sequence[Segment]) -> tuple[Segment, ...]:
    """Return the known segments, and one for each further label that occurs, sorted by label."""
    by_label = {label: Segment(label, f"Label {label}") for label in _occurring(labels)}
    by_label.update({segment.label: segment for segment in known if segment.label > 0})
    return tuple(by_label[label] for label in sorted(by_label))


def _occurring(labels: NDArray[np.integer[Any]]) -> Iterable[int]:
    stored = labels.ravel(order="K")
    counts = np.zeros(int(stored.max(initial=0)) + 1, np.int64)
    for start in range(0, stored.size, 1 << 20):  # bincount converts to 64 bits.
        counts += np.bincount(stored[start : start + (1 << 20)], minlength=len(counts))
    return (int(label) for label in np.flatnonzero(counts) if label > 0)
