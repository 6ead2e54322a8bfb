"""Files on another grid of the same world: take their values at the voxels of the grid of work, with a note."""

from __future__ import annotations

from collections import Counter
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
from crfrefine.errors import GridMismatchError
from crfrefine.io.streams import allocate_array
from crfrefine.io.volume import VolumeHeader

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Number = TypeVar("Number", bound=np.generic)

# If a smaller part of the grid of work lies on another grid, logits are refused, others get a note.
SMALL_OVERLAP = 0.5
_NO_OVERLAP = (
    "They may be of two scans, one may lack its transform, or was written in LPS as if that were "
    "RAS: compare them with `crfrefine info`."
)
_OTHER_ORDER = (
    "Its axes are in another order. Move the label axis to the end, (x, y, z, label), as np.moveaxis(array, 0, -1) does; "
    "an .npz or .npy holds (label, z, y, x)."
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

        `values` are the channels of the file `other`, (channels, [z,] y, x). `notes` gets sentences about `what`, and the voxels `outside`.
        Logits of labels (`are_of_labels`) are all equal only outside their grid and in padding. Nothing but the result is allocated.
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
        """Return a label map or mask, of the nearest voxel: ([z,] y, x) on this grid, like `linear`; 0 outside its own."""
        shape = self.header.grid_shape[::-1]
        if self.header.on_same_grid(other):
            return values.reshape(shape)
        grid_map = self.require_overlap(other, what)
        notes += self.describe(grid_map, other, what, "taken by nearest neighbor", outside)
        return nearest(grid_map, values).reshape(shape)

    def require_overlap(self, other: VolumeHeader, what: str) -> GridMap:
        """Return where the voxels of this grid lie on another; GridMismatchError: nowhere, or for logits on less than half."""
        like, (own_affine, _) = self.header, self.header.geometry()
        if self._has_other_order(other):
            raise self._mismatch(
                other, f"{what} on another grid than the {self.name}", _OTHER_ORDER
            )
        affine, shape = other.affine, other.grid_shape
        if affine is None:  # A file without geometry covers the same field of view.
            own, its = ((*each, 1)[:3] for each in (like.grid_shape, shape))
            if len(like.grid_shape) != len(shape) and (own[2] > 1 or its[2] > 1):
                raise self._mismatch(
                    other, f"{what} of another number of axes than the {self.name}", _OTHER_ORDER
                )
            factors, affine, shape = (
                np.divide(own, its),
                own_affine.copy(),
                shape[: len(like.grid_shape)],
            )
            affine[:3, :3] *= factors
            affine[:3, 3] += own_affine[:3, :3] @ (0.5 * factors - 0.5)
        grid_map = map_grid(like.grid_shape, own_affine, shape, affine)
        if not grid_map.num_inside:
            raise self._mismatch(
                other, f"the {what} and the {self.name} do not overlap in the world", _NO_OVERLAP
            )
        share = grid_map.num_inside / grid_map.num_voxels
        if what == "logits" and share < SMALL_OVERLAP:
            problem = f"the logits cover {share:.1%} of the voxels of the {self.name}; expected at least half of them"
            advice = f"Do the files belong together? Where a network has seen only a part, crop the {self.name} to that part."
            raise self._mismatch(other, problem, advice)
        return grid_map

    def _mismatch(self, other: VolumeHeader, problem: str, advice: str) -> GridMismatchError:
        return GridMismatchError(
            f"{other.path}: {problem}\n{self.header.difference_from(other)}\n  {advice}"
        )

    def _has_other_order(self, other: VolumeHeader) -> bool:
        """Return whether the sizes of a file fit this grid with its axes in another order."""
        own, grid = Counter(self.header.grid_shape), Counter(other.grid_shape)
        is_reversed = other.affine is None and other.grid_shape == self.header.grid_shape[::-1]
        return is_reversed or (own != grid and own <= grid + Counter([other.num_channels]))

    def advice(self, other: VolumeHeader, hint: str) -> str:
        """Return advice about a file on another grid: the order of its axes, or the hint and --resample."""
        like = self.header
        if self._has_other_order(other):
            return _OTHER_ORDER
        if like.affine is None or other.affine is None:
            return f"{hint}\n  Or give --resample, if the {self.name} and the other file cover the same field of view."
        if not map_grid(like.grid_shape, like.affine, other.grid_shape, other.affine).num_inside:
            return f"{hint}\n  The two do not overlap in the world. {_NO_OVERLAP}"
        return f"{hint}\n  Or give --resample, which interpolates onto the {self.name}'s grid."

    def describe(
        self, grid_map: GridMap, other: VolumeHeader, what: str, how: str, outside: str
    ) -> list[str]:
        """Return the note for the user about a file on another grid."""
        notes = [
            f"{what} {how} from {describe_grid(other.grid_shape, other.affine)} onto the grid of the {self.name}"
        ]
        if other.affine is None:
            notes.append(
                f"{other.path.name} has no geometry: it is taken to cover the whole field of view of the {self.name}"
            )
        share, num_outside = (
            grid_map.num_inside / grid_map.num_voxels,
            grid_map.num_voxels - grid_map.num_inside,
        )
        if num_outside:
            doubt = "; do the files belong together?" if share < SMALL_OVERLAP else ""
            outside = f"voxels outside the grid of the {what} {outside}: {num_outside} of {grid_map.num_voxels} voxels"
            notes.append(f"{outside} ({1 - share:.1%}){doubt}")
        return notes
