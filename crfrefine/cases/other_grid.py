"""Files on another grid of the same world: their values on the grid of work, with a note."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from crfrefine.arrays.grid_map import POSITION_TOLERANCE, GridMap, map_grid
from crfrefine.arrays.resampling import nearest, resample_logits
from crfrefine.base.array_types import Array, Bool, Float32
from crfrefine.base.limits import SMALL, require_memory
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import text_of_sizes
from crfrefine.cases.grid_differences import explain_difference, has_default_place, verb_for
from crfrefine.errors import GridMismatchError
from crfrefine.io.formats import LABELS_SUFFIXES
from crfrefine.io.paths import suffix_of
from crfrefine.io.streams import allocate_array
from crfrefine.io.volume import VolumeHeader, header_of_grid

# If a smaller part of the grid of work lies on another grid, the files hardly belong together.
SMALL_OVERLAP = 0.5
_NO_OVERLAP = (
    "They may be of two scans, one may lack its transform, or was written in LPS as if that were "
    "RAS: compare them with `crfrefine info`."
)
HOW = ("interpolated linearly", "interpolated cubically")


@dataclass(frozen=True)
class WorkGrid:
    """The grid that a case is worked on."""

    header: VolumeHeader  # of the file that defines it
    name: str = "image"  # the user's word for the file: "image", "reference" or "comparison"

    def interpolated_scores(
        self,
        other: VolumeHeader,
        values: Float32,
        notes: list[Note],
        *,
        outside: str,
        are_regions: bool,
        is_cubic: bool = False,
        threads: int = 1,
    ) -> tuple[Float32, Bool]:
        """Return logits, (channels, [z,] y, x) on this grid, and where they say nothing.

        `values` are those of the file `other`, which is on another grid: logits, or log-odds of
        regions. The second array, ([z,] y, x), is True outside their own grid and in padding, where
        they are 0. `notes` gets those on the file, and on the voxels `outside`. Nothing but the
        results is allocated.
        """
        grid_map = self.map_to(other)
        result = allocate_array((len(values), *self.header.stored_grid), other.path)
        unseen = resample_logits(
            grid_map, values, result, are_regions=are_regions, is_cubic=is_cubic, threads=threads
        )
        notes += self.describe(other, "logits", outside, how=HOW[is_cubic])
        return result, unseen

    def nearest(
        self,
        other: VolumeHeader,
        values: Array,
        what: str,
        notes: list[Note],
        *,
        outside: str,
    ) -> Array:
        """Return a label map or mask, of the nearest voxel: ([z,] y, x) on this grid.

        It is 0 outside its own grid. Arguments are as of `interpolated`.
        """
        shape = self.header.stored_grid
        if self.header.on_same_grid(other):
            return values.reshape(shape)
        grid_map = self.map_to(other)
        if grid_map.in_whole_voxels is None:
            notes += self.describe(other, what, outside, how="taken by nearest neighbor")
        elif grid_map.num_inside < grid_map.num_voxels:
            notes.append(
                NoteKind.PART_OF_GRID(
                    what=what,
                    verb=verb_for(what, "is", "are"),
                    grid=self.name,
                    box=describe_part(grid_map),
                    outside=outside,
                )
            )
        size = values.itemsize * grid_map.num_voxels
        if size > SMALL:
            takes = verb_for(what, "takes", "take")
            message = f"{other.path}: on the grid of the {self.name}, the {what} {takes}"
            require_memory(size, message)
        own_map = WorkGrid(other).map_to(self.header)
        num_left_out = np.count_nonzero(values.reshape(own_map.shape)[~own_map.all_inside()])
        if num_left_out:
            notes.append(
                NoteKind.CUT_OFF(
                    left_out=int(num_left_out),
                    voxels=int(np.count_nonzero(values)),
                    what=what,
                    grid=self.name,
                )
            )
        return nearest(grid_map, values).reshape(shape)

    def part(self, other: VolumeHeader, what: str, *, may_be_apart: bool = False) -> GridMap | None:
        """Return the places of voxels of this grid on another that holds a part of them; else None.

        The other grid has the same axes and spacing, a whole number of voxels away, and may reach
        beyond this one, or with `may_be_apart` be apart. A header that shows a mistake is not
        taken at its word.
        """
        if other.affine is None or self.header.affine is None:
            return None
        grid_map = self.map_to(other).in_whole_voxels
        if grid_map is None or not (grid_map.num_inside or may_be_apart):
            return None
        if self._doubt(other, grid_map) or explain_difference(self.header, self.name, other, what):
            return None
        return grid_map

    def _doubt(self, other: VolumeHeader, grid_map: GridMap) -> str | None:
        """Return why the place of a part of this grid may be a mistake.

        None if nothing shows it, if the other grid has other voxels, or for a file of 3D Slicer,
        which stores parts at their place.
        """
        whole = grid_map.in_whole_voxels
        paths = (self.header.path, other.path)
        if whole is None or any(suffix_of(path) in LABELS_SUFFIXES for path in paths):
            return None
        if not whole.offset.any():
            return (
                f"It begins at the first voxel of the {self.name}, as a crop does that was saved "
                "with the affine of the whole."
            )
        if sorted(whole.shape) == sorted(whole.source_shape):
            return f"It has the sizes of the {self.name}, at another place."
        smaller = min(self.header, other, key=lambda header: header.num_voxels)
        if has_default_place(smaller):
            return (
                f"The first voxel or the center of {smaller.path.name} is at 0, as programs write "
                "without a header."
            )
        return None

    def require_overlap(self, other: VolumeHeader, what: str, *, either_way: bool = False) -> None:
        """Raise GridMismatchError if fewer than half of this grid's voxels lie on another one.

        It is raised as well if headers or sizes show that the two grids should be one. With
        `either_way`, half of the other grid's voxels may lie on this one instead.
        """
        problem = f"{what} on another grid than the {self.name}"
        advice = explain_difference(self.header, self.name, other, what)
        if advice is None:
            grid_map = self.map_to(other)
            if self._is_enough(other, grid_map, either_way=either_way):
                return
            problem = f"the {self._coverage(grid_map, what)}; expected at least half of them"
            advice = (
                "Do the files belong together? Where a network has seen only a part, crop the "
                f"{self.name} to that part, or export the {what} on the {self.name}'s grid."
            )
            if not grid_map.num_inside:
                problem = f"the {what} and the {self.name} do not overlap in the world"
                advice = _NO_OVERLAP
            elif what == "modality":
                advice = (
                    "Do the files belong together? Crop the image to the part that all modalities "
                    "show, or leave this one out: the grid is that of the first modality."
                )
            reason = explain_difference(self.header, self.name, other, what, is_elsewhere=True)
            advice = reason or advice
        raise GridMismatchError(
            f"{other.path}: {problem}\n{self.header.difference_from(other)}\n  {advice}"
        )

    def _is_enough(
        self, other: VolumeHeader, grid_map: GridMap, *, either_way: bool = False
    ) -> bool:
        """Return whether half of the voxels lie on another grid, or with `either_way` half of its.

        `grid_map` leads from this grid to the other one.
        """
        if either_way and not self._is_enough(other, grid_map):
            grid_map = WorkGrid(other).map_to(self.header)
        return grid_map.num_inside >= SMALL_OVERLAP * grid_map.num_voxels

    def _coverage(self, grid_map: GridMap, what: str) -> str:
        """Return in words how much of this grid a file covers."""
        covers = verb_for(what, "covers", "cover")
        share = grid_map.num_inside / grid_map.num_voxels
        return f"{what} {covers} {share:.1%} of the voxels of the {self.name}"

    def map_to(self, other: VolumeHeader) -> GridMap:
        """Return where the voxels of this grid lie on another.

        Where voxels of both are at the same places, the map has whole numbers.
        """
        like = self.header.required_affine
        affine = other.required_affine
        grid_map = map_grid(self.header.grid_shape, like, other.grid_shape, affine)
        return grid_map.in_whole_voxels or grid_map

    def advice(self, other: VolumeHeader, what: str, hint: str, *, either_way: bool = False) -> str:
        """Return advice about a file on another grid: why it is, or the hint and --resample.

        --resample is advised only where `require_overlap` lets the file pass.
        """
        reason = explain_difference(self.header, self.name, other, what)
        if reason is not None:
            return reason
        grid_map = self.map_to(other)
        if not self._is_enough(other, grid_map):
            reason = explain_difference(self.header, self.name, other, what, is_elsewhere=True)
            if reason is not None:
                return reason
        if not grid_map.num_inside:
            return f"{hint}\n  The two do not overlap in the world. {_NO_OVERLAP}"
        doubt = self._doubt(other, grid_map)
        if doubt is not None:
            hint = f"{hint}\n  {doubt}"
        if not self._is_enough(other, grid_map, either_way=either_way):
            covered = self._coverage(grid_map, what)
            return f"{hint}\n  The {covered}; --resample expects at least half of them."
        if doubt is not None:
            return f"{hint}\n  If it lies there, give --resample."
        return f"{hint}\n  Or give --resample, which interpolates onto the {self.name}'s grid."

    def describe(
        self, other: VolumeHeader, what: str, outside: str, *, how: str = HOW[False]
    ) -> list[Note]:
        """Return the notes for the user about a file on another grid."""
        grid_map = self.map_to(other)
        source = other.describe_grid()
        notes = [NoteKind.RESAMPLED(what=what, how=how, source=source, grid=self.name)]
        num_voxels = grid_map.num_voxels
        num_outside = num_voxels - grid_map.num_inside
        if num_outside:
            notes.append(
                NoteKind.OUTSIDE_GRID(
                    what=what,
                    outside=outside,
                    left_out=num_outside,
                    voxels=num_voxels,
                    share=1 - grid_map.num_inside / num_voxels,
                )
            )
        return notes


def describe_part(grid_map: GridMap) -> str:
    """Return the box of a grid that lies on another one: its size and its first voxel, x first."""
    inside = [np.flatnonzero(along) for along in reversed(grid_map.inside_along)]
    size = text_of_sizes(str(len(part)) for part in inside)
    whole = text_of_sizes(reversed(grid_map.shape))
    first = ", ".join(str(part[0]) for part in inside)
    return f"{size} of {whole} voxels from ({first}) on"


def union_of(grid: VolumeHeader, others: Iterable[VolumeHeader]) -> VolumeHeader:
    """Return the header of a grid that is extended to hold other grids, too.

    It is extended where another grid has voxel centers outside of it: the border of a coarser voxel
    may be outside.
    """
    first = np.zeros(3)
    last = np.array((*grid.grid_shape, 1)[:3]) - 1.0
    end = last + 0.5
    for other in others:
        grid_map = WorkGrid(other).map_to(grid)
        sizes = np.array(grid_map.shape)
        lengths = np.abs(grid_map.matrix)  # of a voxel along each axis, in voxels of the grid
        middle = (grid_map.matrix @ (sizes - 1) / 2 + grid_map.offset)[::-1]
        to_centers = (lengths @ (sizes - 1) / 2)[::-1] - POSITION_TOLERANCE
        to_borders = (lengths @ sizes / 2)[::-1] + POSITION_TOLERANCE
        is_below = middle - to_centers < -0.5
        is_above = middle + to_centers > end
        first = np.minimum(first, np.where(is_below, np.ceil(middle - to_borders), 0.0))
        last = np.maximum(last, np.where(is_above, np.floor(middle + to_borders), 0.0))
    num_axes = grid.num_axes
    first[num_axes:] = 0.0
    shape = tuple((last - first + 1).astype(int)[:num_axes].tolist())
    if shape == grid.grid_shape:
        return grid
    moved = grid.required_affine.copy()
    moved[:3, 3] += moved[:3, :3] @ first
    return header_of_grid(shape, moved, grid.path)
