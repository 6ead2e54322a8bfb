"""The lists that splatting reads: the voxels of each vertex, cut into pieces that single threads add up, and sums of those."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_TOGETHER = 32
"""Entries of a list, or sums of such, that one thread adds up: several levels of sums are a tree."""


@dataclass(frozen=True)
class Pieces:
    """Neighbors in a list that are added up."""

    begin: Any  # (piece + 1) where each begins, among the entries or rows
    row: Any  # (piece) where its sum goes: to the row of the vertex if the list is in one piece, or else to a separate row

    def __len__(self) -> int:
        return int(self.row.size)


class VertexLists:
    """The voxels of each vertex.

    Attributes:
        entry_voxel, entry_weight: (entry) sorted by vertex, corner and voxel; weights in 1 / 65535.
        pieces: of the entries.
        levels: pieces of the rows, one level after the other, until each vertex has its sum.
        num_rows: of the vertices, which come first, and of the pieces of longer lists.
    """

    def __init__(self, xp: Any, entry_voxel: Any, entry_weight: Any, begin: Any) -> None:
        """Cut the lists, which begin at `begin` for each vertex, (vertex + 1) of them; none is empty."""
        self.entry_voxel, self.entry_weight = entry_voxel, entry_weight
        num_vertices = int(begin.size) - 1
        vertices = xp.arange(num_vertices, dtype=np.int64)
        first, free, num_lists = 0, num_vertices, num_vertices
        pieces, length, vertex = _cut(xp, begin[1:] - begin[:-1], vertices, first, free)
        self.pieces = pieces
        self.levels: list[Pieces] = []
        while vertex.size:
            # A list in one piece goes to its vertex, so the rows that were added are the pieces of the others.
            in_one = num_lists - len(vertex)
            first, free, num_lists = free, free + len(pieces) - in_one, len(vertex)
            pieces, length, vertex = _cut(xp, length, vertex, first, free)
            self.levels.append(pieces)
        self.num_rows = free


def _cut(xp: Any, length: Any, vertex: Any, first: int, free: int) -> tuple[Pieces, Any, Any]:
    """Cut lists into pieces of at most `MAX_TOGETHER`; return them, and of the lists in several pieces their number and the vertices.

    Args:
        xp: the device's array module.
        length: (list) of each; they lie one behind the other.
        vertex: (list) its vertex.
        first: where the first list begins.
        free: the first row that no vertex and no earlier piece has.
    """
    num_pieces = (length + (MAX_TOGETHER - 1)) // MAX_TOGETHER
    first_piece = xp.cumsum(num_pieces) - num_pieces
    total = int(num_pieces.sum())
    piece = xp.arange(total, dtype=np.int64)
    owner = xp.searchsorted(first_piece, piece, side="right") - 1
    begin = xp.empty(total + 1, dtype=np.uint32)
    begin[:-1] = (first + xp.cumsum(length) - length)[owner] + (piece - first_piece[owner]) * MAX_TOGETHER
    begin[-1] = first + length.sum()
    is_one_of_several = num_pieces[owner] > 1
    row = xp.where(is_one_of_several, free - 1 + xp.cumsum(is_one_of_several.astype(np.int64)), vertex[owner]).astype(np.uint32)
    longer = xp.flatnonzero(num_pieces > 1)
    return Pieces(begin, row), num_pieces[longer], vertex[longer]
