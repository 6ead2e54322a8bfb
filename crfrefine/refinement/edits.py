"""The edits that strokes make to the logits of a case, in an array or on tiles.

`following` finds them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crfrefine.arrays.label_maps import ABSENT_LOGIT, Box
from crfrefine.arrays.strokes import Strokes
from crfrefine.base.array_types import Bool, Float32, Integers
from crfrefine.base.notes import NoteKind, Notes
from crfrefine.refinement.tiles.grid import TILE, LabelSets, TileGrid, TileNumbers

# Nats over the temperature below the largest logit from which on a rise changes nothing around.
RULED_OUT = 20.0


@dataclass(frozen=True, eq=False)
class Edits:
    """The changes that strokes make to the logits of a case, in storage order."""

    # Those inside the mask; unlike regions, channels of labels are named by their numbers.
    strokes: Strokes
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
