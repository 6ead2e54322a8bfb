"""Files on another grid of the same world: their values on the grid of work, with a note."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from crfrefine.arrays.resampling import (
    GridMap,
    interpolation_jobs,
    map_grid,
    nearest,
    resample_logits,
)
from crfrefine.base.geometry import describe_grid
from crfrefine.base.limits import run_all
from crfrefine.cases.grid_differences import LABEL_AXIS_FIRST, explain_difference, verb_for
from crfrefine.errors import GridMismatchError
from crfrefine.io.streams import allocate_array
from crfrefine.io.volume import VolumeHeader

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Number = TypeVar("Number", bound=np.generic)

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
    name: str = "image"  # the user's word for the file: "image" or "reference"

    def interpolated(
        self,
        other: VolumeHeader,
        values: NDArray[np.float32],
        what: str,
        notes: list[str],
        *,
        outside: str,
        are_of_labels: bool = False,
        is_cubic: bool = False,
        threads: int = 1,
    ) -> NDArray[np.float32]:
        """Return channels, interpolated: (channels, [z,] y, x) on this grid; 0 outside their own.

        `values` are the channels of the file `other`, (channels, [z,] y, x). `notes` gets sentences
        about `what`, and the voxels `outside`. Logits of labels (`are_of_labels`) are all equal
        only outside their grid and in padding. Nothing but the result is allocated.
        """
        shape = (len(values), *self.header.grid_shape[::-1])
        if self.header.on_same_grid(other):
            return values.reshape(shape)
        grid_map = self.require_overlap(other, what)
        result = allocate_array(shape, other.path)
        if are_of_labels:
            resample_logits(grid_map, values, result, is_cubic=is_cubic, threads=threads)
        else:
            run_all(interpolation_jobs(grid_map, values, result, is_cubic=is_cubic), threads)
        notes += self.describe(grid_map, other, what, HOW[is_cubic], outside)
        return result

    def nearest(
        self,
        other: VolumeHeader,
        values: NDArray[Number],
        what: str,
        notes: list[str],
        *,
        outside: str,
    ) -> NDArray[Number]:
        """Return a label map or mask, of the nearest voxel: ([z,] y, x) on this grid.

        It is 0 outside its own grid. Arguments are as of `interpolated`.
        """
        shape = self.header.grid_shape[::-1]
        if self.header.on_same_grid(other):
            return values.reshape(shape)
        grid_map = self.require_overlap(other, what)
        notes += self.describe(grid_map, other, what, "taken by nearest neighbor", outside)
        return nearest(grid_map, values).reshape(shape)

    def require_overlap(self, other: VolumeHeader, what: str) -> GridMap:
        """Return where the voxels of this grid lie on another.

        Raises GridMismatchError if fewer than half of them do, or headers or sizes show that the
        two grids should be one.
        """
        reason = explain_difference(self.header, self.name, other, what)
        if reason is not None:
            raise self._mismatch(other, f"{what} on another grid than the {self.name}", reason)
        grid_map = self._map_to(other, what)
        share = grid_map.num_inside / grid_map.num_voxels
        if share >= SMALL_OVERLAP:
            return grid_map

        order = explain_difference(self.header, self.name, other, what, is_elsewhere=True)
        if not grid_map.num_inside:
            problem = f"the {what} and the {self.name} do not overlap in the world"
            raise self._mismatch(other, problem, order or _NO_OVERLAP)
        covers = verb_for(what, "covers", "cover")
        problem = (
            f"the {what} {covers} {share:.1%} of the voxels of the {self.name}; "
            "expected at least half of them"
        )
        advice = (
            "Do the files belong together? Where a network has seen only a part, crop the "
            f"{self.name} to that part, or export the {what} on the {self.name}'s grid."
        )
        raise self._mismatch(other, problem, order or advice)

    def _map_to(self, other: VolumeHeader, what: str) -> GridMap:
        """Return where the voxels of this grid lie on another.

        A file without geometry covers the same field of view. Raises GridMismatchError if it has
        another number of axes.
        """
        shape = self.header.grid_shape
        affine, _ = self.header.geometry()
        if other.affine is not None:
            return map_grid(shape, affine, other.grid_shape, other.affine)

        extents = (*shape, 1)[:3]
        other_extents = (*other.grid_shape, 1)[:3]
        is_plane = extents[2] == 1 and other_extents[2] == 1
        if len(shape) != len(other.grid_shape) and not is_plane:
            problem = f"{what} of another number of axes than the {self.name}"
            raise self._mismatch(other, problem, LABEL_AXIS_FIRST)
        factors = np.divide(extents, other_extents)
        other_affine = affine.copy()
        other_affine[:3, :3] *= factors
        other_affine[:3, 3] += affine[:3, :3] @ (0.5 * factors - 0.5)
        return map_grid(shape, affine, other.grid_shape[: len(shape)], other_affine)

    def _mismatch(self, other: VolumeHeader, problem: str, advice: str) -> GridMismatchError:
        return GridMismatchError(
            f"{other.path}: {problem}\n{self.header.difference_from(other)}\n  {advice}"
        )

    def advice(self, other: VolumeHeader, what: str, hint: str) -> str:
        """Return advice about a file on another grid: why it is, or the hint and --resample."""
        like = self.header
        reason = explain_difference(like, self.name, other, what)
        if reason is not None:
            return reason
        if like.affine is None or other.affine is None:
            return (
                f"{hint}\n  Or give --resample, if the {self.name} and the other file cover the "
                "same field of view."
            )
        grid_map = map_grid(like.grid_shape, like.affine, other.grid_shape, other.affine)
        if grid_map.num_inside < SMALL_OVERLAP * grid_map.num_voxels:
            reason = explain_difference(like, self.name, other, what, is_elsewhere=True)
            if reason is not None:
                return reason
        if not grid_map.num_inside:
            return f"{hint}\n  The two do not overlap in the world. {_NO_OVERLAP}"
        return f"{hint}\n  Or give --resample, which interpolates onto the {self.name}'s grid."

    def describe(
        self, grid_map: GridMap, other: VolumeHeader, what: str, how: str, outside: str
    ) -> list[str]:
        """Return the note for the user about a file on another grid."""
        source = describe_grid(other.grid_shape, other.affine)
        notes = [f"{what} {how} from {source} onto the grid of the {self.name}"]
        if other.affine is None:
            notes.append(
                f"{other.path.name} has no geometry: it is taken to cover the whole field of view "
                f"of the {self.name}"
            )
        num_voxels = grid_map.num_voxels
        num_outside = num_voxels - grid_map.num_inside
        if num_outside:
            share = 1 - grid_map.num_inside / num_voxels
            notes.append(
                f"voxels outside the grid of the {what} {outside}: {num_outside} of {num_voxels} "
                f"voxels ({share:.1%})"
            )
        return notes
