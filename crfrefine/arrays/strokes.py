"""The strokes of a case: voxels that somebody drew to correct a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from crfrefine.base.array_types import Array, Bool, Integers, Labels
from crfrefine.base.axes import Axes
from crfrefine.base.text import counted
from crfrefine.errors import InputError

BACKGROUND = 255  # value of a drawn voxel that is background; 0 means that nothing was drawn
OTHER_NUMBERS = "For strokes with other numbers, use `crfrefine convert --map OLD=NEW`"


@dataclass(frozen=True, eq=False)
class Strokes:
    """The drawn voxels of a case."""

    positions: Integers  # (axes, N), indices of voxels
    labels: Integers  # (N,), their labels; 0 is background
    # (N,), voxels that the network's map of the whole case has of the label of each, if these are
    # the strokes of a part of it, whose own map says too little
    volumes: Integers | None = None

    @classmethod
    def of_array(
        cls,
        values: Array,
        shape: Sequence[int],
        num_labels: int,
        *,
        name: str = "strokes",
    ) -> Strokes | None:
        """Return the drawn voxels of an array, (*grid) whole numbers; None if nothing is drawn.

        A value is 0 where nothing was drawn, a label, or 255 for background. Raises InputError for
        other shapes or values, or if half is drawn.
        """
        if values.shape != tuple(shape):
            expected = f"expected that of the image, {tuple(shape)}, without a label axis"
            raise InputError(f"{name}: shape {values.shape}; {expected}")
        if values.dtype.kind not in "iub":
            is_float = values.dtype.kind == "f"
            largest = np.float32(2**53)  # A Python number would overflow in float16.
            if not is_float or not ((values == np.rint(values)) & (abs(values) < largest)).all():
                raise InputError(
                    f"{name}: expected whole numbers: 0 where nothing is drawn, the label elsewhere"
                )
            values = values.astype(np.int64)
        # `np.nonzero` is slow, and so is the flattening of an array across its memory.
        order: Literal["C", "F"] = "F" if values.flags.fnc else "C"
        voxels = np.flatnonzero((values != 0).ravel(order))
        positions = np.stack(np.unravel_index(voxels, values.shape, order))
        labels = values[tuple(positions)].astype(np.int64)
        is_label = (labels >= 1) & (labels < num_labels)
        is_label |= labels == BACKGROUND
        unknown = np.unique(labels[~is_label])
        if len(unknown):
            numbers = ", ".join(str(number) for number in unknown[:5].tolist())
            raise InputError(
                f"{name}: has the values {numbers}; expected 0 where nothing is drawn, "
                f"{BACKGROUND} for background, and labels below {num_labels}. {OTHER_NUMBERS}"
            )
        if 2 * len(labels) > values.size:
            raise InputError(
                f"{name}: {len(labels)} of {values.size} voxels are drawn; expected a few strokes. "
                f"Is it a label map? {OTHER_NUMBERS}"
            )
        if not len(labels):
            return None
        labels[labels == BACKGROUND] = 0
        return cls(positions, labels)

    def in_order(self, order: Axes) -> Strokes:
        """Return the strokes with the axes in an order."""
        return replace(self, positions=self.positions[list(order.sources)])

    def within(self, mask: Bool | None, num_dims: int) -> Strokes:
        """Return the drawn voxels inside a mask, (*grid), of a grid with further leading axes."""
        num_leading = num_dims - len(self.positions)
        positions = np.pad(self.positions, ((num_leading, 0), (0, 0)))
        strokes = replace(self, positions=positions)
        return strokes if mask is None else strokes.chosen(mask[tuple(positions)])

    def chosen(self, is_chosen: Bool) -> Strokes:
        """Return some of the drawn voxels, (N,)."""
        volumes = None if self.volumes is None else self.volumes[is_chosen]
        return Strokes(self.positions[:, is_chosen], self.labels[is_chosen], volumes)

    def volume_of_label(self, is_drawn: Bool, has_label: Bool) -> int:
        """Return the voxels that the network has of the label of some drawn voxels.

        `has_label` is the map of these strokes, (*grid), which may be a part of the whole one.
        """
        if self.volumes is None:
            return int(np.count_nonzero(has_label))
        return int(self.volumes[is_drawn].max())

    def draw(self, label_map: Labels) -> Labels:
        """Return a label map with the drawn voxels."""
        if (label_map[tuple(self.positions)] != self.labels).any():
            label_map = label_map.copy(order="K")
            label_map[tuple(self.positions)] = self.labels
        return label_map


def combine(several: Sequence[Strokes], names: Sequence[str]) -> Strokes | None:
    """Return the strokes of several files of a case as one; None without any.

    Raises InputError if files contradict each other.
    """
    if not several:
        return None
    rows = []
    for strokes in several:
        rows.append(np.vstack([strokes.positions, strokes.labels]))
    drawn = np.unique(np.concatenate(rows, axis=1), axis=1)
    positions = drawn[:-1]
    places, counts = np.unique(positions, axis=1, return_counts=True)
    contradictions = places[:, counts > 1].T.tolist()
    if contradictions:
        shown = ", ".join(str(tuple(place)) for place in contradictions[:3])
        count = counted(len(contradictions), "voxel")
        raise InputError(
            f"{' and '.join(names)}: contradict each other at {count}, such as "
            f"{shown}; give one file, or erase the voxels in one of them"
        )
    return Strokes(positions, drawn[-1])
