"""Which voxels take part, on the device: the numpy form of kernels/cpu/voxels.cpp, with the features of kernels/cpu/features.cpp."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from crfrefine.base.array_types import Array, Bool
from crfrefine.engines.cuda.device import Device, check_memory
from crfrefine.engines.grid_image import FeatureOrigin
from crfrefine.errors import CapacityError, InputError

MAX_FEATURE = 1e6
"""Single precision resolves a difference of one bandwidth up to about this many bandwidths."""


class Voxels:
    """The masked voxels, numbered in raster order, inside the mask's bounding box.

    Attributes:
        num_voxels: inside the mask.
        grid_size: voxels of the whole grid.
        grid_index, box_index: (voxel) linear indices in the grid and in the box, on the device.
        box_shape, spacing, source_axis: values of the box's axes; axes one voxel long are left out, except the last one.
        first: the box's first voxel along each of these axes, in the grid.
        feature: number of each axis among the position features, which does not depend on its place in memory.
    """

    def __init__(
        self, device: Device, grid_shape: Sequence[int], spacing: Sequence[float], mask: Bool | None, axes: Sequence[int] | None = None
    ) -> None:
        """Number the voxels inside the mask (None means all). `axes`: the user's number of each grid axis; None means the user's order.

        Raises:
            InputError: the mask is empty.
        """
        xp = device.xp
        self.device = device
        self.grid_size = math.prod(grid_shape)
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
        ends = [(int(low), int(high)) for low, high in extremes(device, coordinates)]
        low, high = [first for first, _ in ends], [last + 1 for _, last in ends]
        last = len(grid_shape) - 1
        self.source_axis = [a for a in range(last + 1) if high[a] - low[a] > 1 or a == last]
        self.box_shape = [high[a] - low[a] for a in self.source_axis]
        self.first = [low[a] for a in self.source_axis]
        self.box_size = math.prod(self.box_shape)
        self.spacing = [float(spacing[a]) for a in self.source_axis]
        number = self.source_axis if axes is None else [axes[a] for a in self.source_axis]
        self.feature = [sum(other < own for other in number) for own in number]
        self.coordinates = [(coordinates[a] - low[a]).astype(np.int32) for a in self.source_axis]
        self.box_index = self.linear_index(self.box_shape)

    @cached_property
    def number(self) -> Any:
        """(place of the box) int32 number of the voxel there, -1: none; None if every place is a voxel, in order."""
        if self.num_voxels == self.box_size:
            return None
        check_memory(self.device, 4.0 * self.box_size + 4.0 * self.num_voxels, "the numbers of the voxels in the mask's bounding box")
        number = self.device.xp.full(self.box_size, -1, dtype=np.int32)
        number[self.box_index] = self.device.xp.arange(self.num_voxels, dtype=np.int32)
        return number

    @property
    def num_axes(self) -> int:
        """Number of axes of the box."""
        return len(self.box_shape)

    def linear_index(self, shape: Sequence[int]) -> Any:
        """Return each voxel's linear index in a box of that shape with the voxels' box at its corner."""
        index = self.coordinates[0].astype(np.int64)
        for coordinate, extent in zip(self.coordinates[1:], shape[1:], strict=True):
            index = index * extent + coordinate
        return index

    def of_box_axes(self, per_grid_axis: Sequence[float]) -> list[float]:
        """Pick the values of the box's axes."""
        return [float(per_grid_axis[a]) for a in self.source_axis]


def extremes(device: Device, arrays: Iterable[Any]) -> list[Array]:
    """Return (smallest, largest) of each array, one of them in memory at a time; NaN if an array has a NaN.

    The host waits once for all of them.
    """
    found = [device.xp.stack([array.min(), array.max()]) for array in arrays]
    return list(device.download(device.xp.stack(found))) if found else []


class BilateralInput:
    """An appearance kernel's features at the voxels: intensities first, positions last.

    Attributes:
        features: (modality + axis, voxel) in the image's precision, on the device.
        ranges: (smallest, largest) of each feature.
        first: the box's first voxel along each of its axes, from the feature origin.
    """

    def __init__(
        self,
        voxels: Voxels,
        image: Any,
        theta_position: Sequence[float],
        theta_intensity: Sequence[float],
        origin: FeatureOrigin | None = None,
    ) -> None:
        """Compute the features of an image, (M, *grid) on the device, with one bandwidth per box axis and one per modality.

        They count from `origin`; None: from the box's first voxel and the lowest intensities.

        Raises:
            InputError: an intensity is not finite.
            CapacityError: a feature spans too many bandwidths.
        """
        device, xp = voxels.device, voxels.device.xp
        dtype = image.dtype
        self.voxels, self._image, self.theta_position, self.theta_intensity = voxels, image, list(theta_position), list(theta_intensity)
        self._origin = origin
        begin = voxels.first if origin is None else [origin.position[a] for a in voxels.source_axis]
        first = self.first = [own - zero for own, zero in zip(voxels.first, begin, strict=True)]
        for theta, low, extent, step in zip(theta_position, first, voxels.box_shape, voxels.spacing, strict=True):
            if max(abs(low), abs(low + extent)) * step / theta > MAX_FEATURE:
                raise CapacityError(
                    f"theta_alpha {theta:g} is less than a millionth of the volume's extent, {extent} voxels {step:g} apart; use a larger "
                    "bandwidth, and check the spacing"
                )
        ends = extremes(device, (modality.reshape(-1)[voxels.grid_index] for modality in image[: len(self.theta_intensity)]))
        lowest, highest = [float(low) for low, _ in ends], [float(high) for _, high in ends]
        zero = list(lowest)
        for m, theta in enumerate(theta_intensity):
            if not math.isfinite(lowest[m]) or not math.isfinite(highest[m]):
                raise InputError(f"modality {m} of the image holds values that are not finite (NaN or infinity)")
            if origin is not None:
                zero[m] = float(dtype.type(origin.intensity[m]))
            if max(abs(lowest[m] - zero[m]), abs(highest[m] - zero[m])) / theta > MAX_FEATURE:
                raise CapacityError(
                    f"theta_beta {theta:g} of modality {m} is less than a millionth of its range of intensities; use a larger bandwidth, "
                    "or normalize the intensities"
                )
        num_features = len(self.theta_intensity) + voxels.num_axes
        position_scale = [step / theta for step, theta in zip(voxels.spacing, theta_position, strict=True)]
        self.features = xp.empty((num_features, voxels.num_voxels), dtype=dtype)
        # As cpu/features.cpp computes them, operation by operation: the lattice's integers follow from them.
        for feature, modality, base, beta in zip(self.features, image, zero, theta_intensity, strict=False):
            feature[...] = (modality.reshape(-1)[voxels.grid_index] - dtype.type(base)) * dtype.type(1.0 / beta)
        for a, coordinate in enumerate(voxels.coordinates):
            self.features[len(self.theta_intensity) + voxels.feature[a]] = (coordinate + first[a]) * position_scale[a]
        positions = [(0.0, 0.0)] * voxels.num_axes
        for a, scale in enumerate(position_scale):
            positions[voxels.feature[a]] = (first[a] * scale, (first[a] + voxels.box_shape[a] - 1) * scale)
        spans = zip(lowest, highest, zero, theta_intensity, strict=True)
        self.ranges = [((bottom - own) / theta, (top - own) / theta) for bottom, top, own, theta in spans] + positions

    def single(self) -> BilateralInput:
        """The same features from the image in float32, from which a lattice is built."""
        if self._image.dtype == np.float32:
            return self
        return BilateralInput(self.voxels, self._image.astype(np.float32), self.theta_position, self.theta_intensity, self._origin)

    @property
    def num_features(self) -> int:
        """Modalities and axes."""
        return len(self.ranges)
