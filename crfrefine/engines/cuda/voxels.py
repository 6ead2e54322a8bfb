"""Which voxels take part, on the device: the numpy form of kernels/cpu/voxels.cpp, with the features of kernels/cpu/features.cpp."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.array_types import Array, Bool
from crfrefine.errors import CapacityError, InputError

if TYPE_CHECKING:
    from crfrefine.engines.cuda.cupy_device import CupyDevice

MAX_FEATURE = 1e6  # bandwidths, up to which single precision resolves a difference of one of them


class Voxels:
    """The masked voxels, numbered in raster order, inside the mask's bounding box.

    Axes of the box are those longer than a voxel, and the last one: `box_shape`, `spacing`, `source_axis`, and the number of their position
    feature, `feature`, which does not depend on the order in memory. `grid_index`, `box_index`: (voxel) linear indices, on the device.
    """

    def __init__(
        self,
        device: CupyDevice,
        grid_shape: Sequence[int],
        spacing: Sequence[float],
        mask: Bool | None,
        axes: Sequence[int] | None = None,
    ) -> None:
        """Number the voxels inside the mask (None means all); `axes` are those of `GridImage`. InputError: the mask is empty."""
        xp = device.xp
        self.device, self.grid_shape, self.grid_size = device, grid_shape, math.prod(grid_shape)
        if mask is None:
            self.grid_index = xp.arange(self.grid_size, dtype=np.int64)
        else:
            self.grid_index = xp.flatnonzero(device.upload(mask)).astype(np.int64)
        self.num_voxels = int(self.grid_index.size)
        if self.num_voxels == 0:
            raise InputError("the mask is empty")
        coordinates: list[Any] = []
        rest = self.grid_index
        for extent in reversed(grid_shape):
            coordinates.insert(0, rest % extent)
            rest = rest // extent
        ends = [(int(low), int(high) + 1) for low, high in extremes(device, coordinates)]
        last = len(grid_shape) - 1
        self.source_axis = [a for a, (low, high) in enumerate(ends) if high - low > 1 or a == last]
        self.box_shape = [ends[a][1] - ends[a][0] for a in self.source_axis]
        self.num_axes = len(self.box_shape)
        self.box_size = math.prod(self.box_shape)
        self.spacing = self.of_box_axes(spacing)
        number = self.source_axis if axes is None else [axes[a] for a in self.source_axis]
        self.feature = [sum(other < own for other in number) for own in number]
        self.coordinates = [
            (coordinates[a] - ends[a][0]).astype(np.int32) for a in self.source_axis
        ]
        self.box_index = self.linear_index(self.box_shape)

    @cached_property
    def number(self) -> Any:
        """(place of the box) int32 number of the voxel there, -1: none; None if every place is a voxel, in order."""
        if self.num_voxels == self.box_size:
            return None
        number = self.device.xp.full(self.box_size, -1, dtype=np.int32)
        number[self.box_index] = self.device.xp.arange(self.num_voxels, dtype=np.int32)
        return number

    def linear_index(self, shape: Sequence[int]) -> Any:
        """Return each voxel's linear index in a box of that shape with the voxels' box at its corner."""
        index = self.coordinates[0].astype(np.int64)
        for coordinate, extent in zip(self.coordinates[1:], shape[1:], strict=True):
            index = index * extent + coordinate
        return index

    def of_box_axes(self, per_grid_axis: Sequence[float]) -> list[float]:
        """Pick the values of the box's axes."""
        return [float(per_grid_axis[a]) for a in self.source_axis]

    def gather(self, grids: Any, out: Any) -> None:
        """Copy the voxels of (channel, *grid) values into (channel, voxel) ones."""
        for of_voxels, of_grid in zip(out, grids.reshape(len(out), -1), strict=True):
            of_voxels[...] = of_grid[self.grid_index]

    def scatter(self, values: Any, grids: Any) -> None:
        """Put (channel, voxel) values at their places in (channel, *grid) ones."""
        for of_grid, of_voxels in zip(grids.reshape(len(values), -1), values, strict=True):
            of_grid[self.grid_index] = of_voxels


def extremes(device: CupyDevice, arrays: Iterable[Any]) -> list[Array]:
    """Return (smallest, largest) of each array, one of them in memory at a time; the host waits once for all of them."""
    ends = [device.xp.stack([array.min(), array.max()]) for array in arrays]
    return list(device.download(device.xp.stack(ends))) if ends else []


def _too_narrow(bandwidth: str, span: str) -> CapacityError:
    return CapacityError(
        f"{bandwidth} is less than a millionth of {span}; use a larger bandwidth, and check spacing and intensities"
    )


class BilateralInput:
    """An appearance kernel's features at the voxels: intensities first, positions last.

    `features` are (modality + axis, voxel) float32 on the device, from the box's first voxel and the lowest intensities on; `ranges` their
    ends.
    """

    def __init__(
        self,
        voxels: Voxels,
        image: Any,
        theta_position: Sequence[float],
        theta_intensity: Sequence[float],
    ) -> None:
        """Compute the features of an image, (M, *grid) float32 on the device; CapacityError if one spans too many bandwidths."""
        self.voxels, self.theta_position, self.theta_intensity = (
            voxels,
            list(theta_position),
            list(theta_intensity),
        )
        for theta, extent, step in zip(
            theta_position, voxels.box_shape, voxels.spacing, strict=True
        ):
            if extent * step / theta > MAX_FEATURE:
                raise _too_narrow(
                    f"theta_alpha {theta:g}", f"the volume's extent, {extent} voxels {step:g} apart"
                )
        num_modalities = len(self.theta_intensity)
        ends = extremes(
            voxels.device,
            (modality.reshape(-1)[voxels.grid_index] for modality in image[:num_modalities]),
        )
        self.ranges = [
            (0.0, (float(high) - float(low)) / theta)
            for theta, (low, high) in zip(theta_intensity, ends, strict=True)
        ]
        for m, (_, most) in enumerate(self.ranges):
            if most > MAX_FEATURE:
                raise _too_narrow(
                    f"theta_beta {theta_intensity[m]:g} of modality {m}", "its range of intensities"
                )
        self.features = voxels.device.xp.empty(
            (num_modalities + voxels.num_axes, voxels.num_voxels), dtype=np.float32
        )
        # As cpu/features.cpp computes them, operation by operation: the lattice's integers follow from them.
        for feature, modality, (low, _), beta in zip(
            self.features, image, ends, theta_intensity, strict=False
        ):
            feature[...] = (modality.reshape(-1)[voxels.grid_index] - np.float32(low)) * np.float32(
                1.0 / beta
            )
        positions = [(0.0, 0.0)] * voxels.num_axes
        for a, coordinate in enumerate(voxels.coordinates):
            scale = voxels.spacing[a] / theta_position[a]
            self.features[num_modalities + voxels.feature[a]] = coordinate * scale
            positions[voxels.feature[a]] = (0.0, (voxels.box_shape[a] - 1) * scale)
        self.ranges += positions
        self.num_features = len(self.ranges)
