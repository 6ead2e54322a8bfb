"""Files on another grid of the same world: take their values at the voxels of the grid of work, and say so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from crfrefine.arrays.grid_map import GridMap, boxes_overlap, map_grid, world_box
from crfrefine.arrays.resampling import linear_jobs, nearest, resample_logits
from crfrefine.base.geometry import describe_grid
from crfrefine.base.parallel import run_all
from crfrefine.errors import GridMismatchError
from crfrefine.io.decode import allocate_array
from crfrefine.io.volume import VolumeHeader

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Number = TypeVar("Number", bound=np.generic)

SMALL_OVERLAP = 0.5
"""If a smaller part of the grid of work lies on the other grid, the files may not belong together."""


@dataclass(frozen=True)
class WorkGrid:
    """The grid that a case is worked on."""

    header: VolumeHeader  # of the file that defines it
    name: str = "image"  # what the file is to the user: "image" or "reference"

    def linear(
        self, other: VolumeHeader, values: NDArray[np.float32], what: str, notes: list[str], *, outside: str, threads: int = 1
    ) -> NDArray[np.float32]:
        """Return channels, interpolated linearly: (channels, [z,] y, x) on this grid; 0 outside their own.

        Nothing but the result is allocated; the result does not depend on the number of threads.
        Values (channels, [z,] y, x) of a file on this grid are returned as they are. `what` is their content, such as "image"; `outside`
        says what becomes of voxels outside, such as "become background"; `notes` gets sentences about both.
        """
        shape = (len(values), *self.header.grid_shape[::-1])
        if self.header.on_same_grid(other):
            return values.reshape(shape)
        result, grid_map = self._allocate(other, len(values), what)
        run_all(linear_jobs(grid_map, values, result), threads)
        notes += self._describe(grid_map, other, what, "interpolated linearly", outside)
        return result

    def logits(
        self, other: VolumeHeader, values: NDArray[np.float32], notes: list[str], *, outside: str, threads: int = 1
    ) -> NDArray[np.float32]:
        """Return logits on another grid like `linear`; all labels are equal only outside their grid, and in padding, which becomes 0."""
        result, grid_map = self._allocate(other, len(values), "logits")
        resample_logits(grid_map, values, result, threads=threads)
        notes += self._describe(grid_map, other, "logits", "interpolated linearly", outside)
        return result

    def nearest(self, other: VolumeHeader, values: NDArray[Number], what: str, notes: list[str], *, outside: str) -> NDArray[Number]:
        """Return a label map or mask, of the nearest voxel: ([z,] y, x) on this grid, like `linear`; 0 outside its own."""
        shape = self.header.grid_shape[::-1]
        if self.header.on_same_grid(other):
            return values.reshape(shape)
        grid_map = self._map_with_voxels(other, what)
        notes += self._describe(grid_map, other, what, "taken by nearest neighbor", outside)
        return nearest(grid_map, values).reshape(shape)

    def require_overlap(self, other: VolumeHeader, what: str) -> GridMap:
        """Return where the voxels of this grid lie on another one, as far as the headers tell; raise GridMismatchError if they do not."""
        like = self.header
        if like.affine is None or other.affine is None:
            raise GridMismatchError(
                f"{other.path}: {what} on another grid than the {self.name}, and without the geometry to interpolate from\n"
                f"{like.difference_from(other)}\n"
                f"  Export them on the grid of the {self.name}, or in a format with geometry: crfrefine convert FILE.npz FILE.nii.gz\n"
                "  --like VOLUME, if there is a volume on the grid of the file."
            )
        if not _boxes_overlap(like, other):
            raise self._no_overlap(other, what)
        return map_grid(like.grid_shape, like.affine, other.grid_shape, other.affine)

    def way_out(self, other: VolumeHeader) -> str:
        """Return a further line of advice about a file on another grid: the option that interpolates it, if that is possible."""
        if self.header.affine is None or other.affine is None:
            return ""
        if not _boxes_overlap(self.header, other):
            return f"\n  The two do not overlap in the world. {_suspicion(self.header, other)}"
        return f"\n  Or give --resample, which interpolates onto the {self.name}'s grid."

    def _allocate(self, other: VolumeHeader, num_channels: int, what: str) -> tuple[NDArray[np.float32], GridMap]:
        """Return an uninitialized array for channels on this grid, and the map that fills it."""
        grid_map = self._map_with_voxels(other, what)
        return allocate_array((num_channels, *self.header.grid_shape[::-1]), other.path), grid_map

    def _map_with_voxels(self, other: VolumeHeader, what: str) -> GridMap:
        grid_map = self.require_overlap(other, what)
        if not grid_map.num_inside:  # The boxes of oblique grids may overlap nevertheless.
            raise self._no_overlap(other, what)
        return grid_map

    def _no_overlap(self, other: VolumeHeader, what: str) -> GridMismatchError:
        shown = (self.header, other)
        width = max(len(str(header.path)) for header in shown)
        lines = [f"  {header.path!s:<{width}}  {describe_grid(header.grid_shape, header.affine)}, {_extent(header)}" for header in shown]
        first = f"{other.path}: the {what} and the {self.name} do not overlap in the world"
        return GridMismatchError("\n".join([first, *lines, f"  {_suspicion(*shown)}"]))

    def _describe(self, grid_map: GridMap, other: VolumeHeader, what: str, how: str, outside: str) -> list[str]:
        """Return what the user should know about a file on another grid."""
        notes = [f"{what} {how} from {describe_grid(other.grid_shape, other.affine)} onto the grid of the {self.name}"]
        share, num_outside = grid_map.num_inside / grid_map.num_voxels, grid_map.num_voxels - grid_map.num_inside
        if num_outside:
            notes.append(
                f"voxels outside the grid of the {what} {outside}: {num_outside} of {grid_map.num_voxels} voxels ({1 - share:.1%})"
                + ("; do the files belong together?" if share < SMALL_OVERLAP else "")
            )
        return notes


def _boxes_overlap(one: VolumeHeader, other: VolumeHeader) -> bool:
    return boxes_overlap(*(world_box(header.grid_shape, header.geometry()[0]) for header in (one, other)))


def _suspicion(like: VolumeHeader, other: VolumeHeader) -> str:
    """Return the likely reason why two grids do not overlap."""
    turned = np.diag([-1.0, -1.0, 1.0, 1.0]) @ other.geometry()[0]
    if boxes_overlap(world_box(like.grid_shape, like.geometry()[0]), world_box(other.grid_shape, turned)):
        return "With the signs of world x and y exchanged they would: one file was probably written in LPS as if that were RAS."
    return "Is the transform missing in one of the headers, or is it of another scan? Compare them with `crfrefine info`."


def _extent(header: VolumeHeader) -> str:
    low, high = world_box(header.grid_shape, header.geometry()[0])
    return ", ".join(f"{axis} {start:.1f} to {stop:.1f}" for axis, start, stop in zip("xyz", low, high, strict=True)) + " mm"
