"""The strokes of a case, voxels that somebody drew to correct a network, and the edits they make.

Edits change logits in an array or on tiles; `following` finds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from crfrefine.arrays.label_maps import ABSENT_LOGIT, Box
from crfrefine.base.array_types import Array, Bool, Float32, Integers, Labels
from crfrefine.base.axes import Axes
from crfrefine.base.notes import NoteKind, Notes
from crfrefine.base.text import counted, listed
from crfrefine.errors import InputError
from crfrefine.refinement.tiles.grid import TILE, LabelSets, TileGrid, TileNumbers

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
        order = Axes.of_memory(values)
        drawn = order.apply(values != 0)
        # np.nonzero is slow.
        voxels = np.flatnonzero(drawn)
        stored = np.stack(np.unravel_index(voxels, drawn.shape))
        positions = stored[np.argsort(order.sources)]
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

    def numbered(self, channel_labels: Sequence[int], order: Axes) -> Strokes:
        """Return the strokes in storage order, labeled with the numbers of channels.

        Those of regions, which have no labels of channels, keep theirs. Raises InputError for a
        label without a channel.
        """
        stored = replace(self, positions=self.positions[list(order.sources)])
        if not channel_labels:
            return stored
        unknown = sorted({*self.labels.tolist()} - {*channel_labels})
        if unknown:
            raise InputError(
                f"strokes: expected the labels of the channels, {listed(channel_labels)}, found "
                f"{listed(unknown)}"
            )
        numbers = np.zeros(max(channel_labels) + 1, np.int64)
        numbers[list(channel_labels)] = np.arange(len(channel_labels))
        return replace(stored, labels=numbers[self.labels])

    def within(self, mask: Bool | None, num_dims: int) -> Strokes:
        """Return the drawn voxels inside a mask, (*grid), of a grid with further leading axes."""
        num_leading = num_dims - len(self.positions)
        positions = np.pad(self.positions, ((num_leading, 0), (0, 0)))
        strokes = replace(self, positions=positions)
        return strokes if mask is None else strokes._chosen(mask[tuple(positions)])

    def outside(self, mask: Bool | None) -> Strokes | None:
        """Return the drawn voxels outside a mask, (*grid) of their axes; None without any."""
        if mask is None:
            return None
        is_outside = ~mask[tuple(self.positions)]
        return self._chosen(is_outside) if is_outside.any() else None

    def _chosen(self, is_chosen: Bool) -> Strokes:
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
    later = positions[:, 1:]
    is_repeated = (later == positions[:, :-1]).all(axis=0)
    repeated = np.unique(later[:, is_repeated], axis=1)
    contradictions = repeated.T.tolist()
    if contradictions:
        shown = ", ".join(str(tuple(place)) for place in contradictions[:3])
        count = counted(len(contradictions), "voxel")
        raise InputError(
            f"{' and '.join(names)}: contradict each other at {count}, such as "
            f"{shown}; give one file, or erase the voxels in one of them"
        )
    return Strokes(positions, drawn[-1])


# ---- Edits

# Nats over the temperature below the largest logit from which on a rise changes nothing around.
RULED_OUT = 20.0


@dataclass(frozen=True, eq=False)
class Edits:
    """The changes that strokes make to the logits of a case, in storage order."""

    strokes: Strokes  # those inside the mask
    # The change of the logits of a channel in a box of whole tiles, (*box); it is negative
    # outside of regions.
    rises: list[tuple[int, Box, Float32]]
    fixed: Float32  # (channels, N), the logits at the drawn voxels
    # The logit that a rise starts from where a logit is near ABSENT_LOGIT, as in label maps; None
    # means the logit itself.
    lifted: float | None

    def apply(self, logits: Float32) -> None:
        """Change logits or log-odds, (channels, *grid), in place."""
        for channel, box, values in self.rises:
            self._add_rise(logits[channel][box], values)
        logits[(slice(None), *self.strokes.positions)] = self.fixed

    def find_ruled_out(self, logits: Float32, temperature: float, *, are_regions: bool) -> Notes:
        """Return a note if the network rules out labels where they are drawn.

        Voxels around do not follow then. The network's logits or log-odds are (channels, *grid).
        """
        drawn = logits[(slice(None), *self.strokes.positions)]
        behind = np.where(self.fixed > 0, -drawn, drawn)
        labels_drawn = self.strokes.labels
        if not are_regions:
            logits_of_labels = drawn[labels_drawn, np.arange(len(labels_drawn))]
            behind = behind - logits_of_labels
        is_ruled_out = behind.max(axis=0) > RULED_OUT * temperature
        if not is_ruled_out.any():
            return ()
        labels = np.unique(labels_drawn[is_ruled_out]).tolist()
        note = NoteKind.RULED_OUT_STROKES(
            labels=labels,
            nats=RULED_OUT,
            voxels=int(np.count_nonzero(is_ruled_out)),
        )
        return (note,)

    def _add_rise(self, logits: Float32, rise: Float32) -> None:
        """Add a rise to logits in place."""
        if self.lifted is not None:
            is_lifted = (rise > 0) & (logits < 0.5 * ABSENT_LOGIT)
            np.copyto(logits, self.lifted, where=is_lifted)
        logits += rise

    def _drawn_tiles(self, grid: TileGrid) -> tuple[TileNumbers, Integers]:
        """Return the tile of each drawn voxel, (N,), and the voxel's number in its tile."""
        places, offsets = np.divmod(self.strokes.positions, np.array(TILE)[:, None])
        tiles = np.ravel_multi_index(tuple(places), grid.counts)
        return tiles, np.ravel_multi_index(tuple(offsets), TILE)

    def changed_tiles(self, grid: TileGrid, num_labels: int) -> Bool:
        """Return (L, *tiles), where labels are drawn or rise."""
        changed = np.zeros((num_labels, grid.num_tiles), np.bool_)
        tiles, _ = self._drawn_tiles(grid)
        changed[self.strokes.labels, tiles] = True
        for channel, box, values in self.rises:
            tiles, by_tile = grid.cut(box, values)
            changed[channel, tiles] |= by_tile.any(axis=1)
        return changed.reshape(num_labels, *grid.counts)

    def apply_to_tiles(
        self, logits: Float32, sets: LabelSets, grid: TileGrid, first_tile: int
    ) -> None:
        """Change logits of labels that take part in tiles, (entries, voxels of a tile), in place.

        The tiles of the sets are those of the grid from `first_tile` on.
        """
        for channel, box, values in self.rises:
            tiles, by_tile = grid.cut(box, values)
            entries, places = sets.find_entries(channel, tiles - first_tile)
            of_entries = logits[entries]
            self._add_rise(of_entries, by_tile[places])
            logits[entries] = of_entries
        tiles, offsets = self._drawn_tiles(grid)
        for label, fixed in enumerate(self.fixed):
            entries, places = sets.find_entries(label, tiles - first_tile)
            logits[entries, offsets[places]] = fixed[places]
