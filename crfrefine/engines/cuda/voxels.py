"""The voxels that take part, and their features, on the device.

kernels/cuda/voxels.cu has the kernels; kernels/cpu/voxels.cpp and features.cpp do the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NoReturn

import numpy as np

from crfrefine.base.array_types import Bool, Float32
from crfrefine.base.numerics import MAX_SPAN
from crfrefine.engines.base import box_inside
from crfrefine.engines.cuda.cupy_device import CupyDevice
from crfrefine.engines.cuda.rows import ceil_divide
from crfrefine.errors import CapacityError

_THREADS = 256  # threads of a block
_BLOCKS_OF_ROW = 256  # blocks that share a row, such as a modality or an axis
CONSTANTS = {"CRF_THREADS": _THREADS}  # those of the kernels in voxels.cu


class Voxels:
    """The masked voxels of an image, numbered in raster order, inside the mask's bounding box.

    The box has the axes along which it is longer than one voxel, and the last axis in any case.

    Attributes:
        image: (M, *grid) float32 on the device.
        mask, axes: those of `GridImage`, on the host.
        grid_index: (voxel) linear indices, on the device.
        strides: voxels of the grid from one place along each of its axes to the next.
        box_shape, spacing: voxels along each axis of the box, and the distance between them.
        source_axis: the grid axis of each axis of the box.
        first: the coordinate of the box's first voxel along each of its axes.
        feature: the number of the position feature of each axis of the box, which does not depend
            on the order in memory.
    """

    def __init__(
        self,
        device: CupyDevice,
        image: Any,
        spacing: Sequence[float],
        mask: Bool | None,
        axes: Sequence[int] | None = None,
    ) -> None:
        """Number the voxels inside the mask (None means all); raise InputError if it is empty.

        `axes` are those of `GridImage`.
        """
        self.device = device
        self.image = image
        self.mask = mask
        self.axes = axes
        self.grid_shape = grid_shape = image.shape[1:]
        self.grid_size = math.prod(grid_shape)
        self.strides = strides_of(grid_shape)
        if mask is None:
            self.grid_index = device.xp.arange(self.grid_size, dtype=np.int64)
        else:
            inside = device.upload(mask)
            self.grid_index = device.xp.flatnonzero(inside).astype(np.int64, copy=False)
        self.num_voxels = self.grid_index.size

        last = len(grid_shape) - 1
        self.source_axis = []
        self.box_shape = []
        self.first = []
        for axis, side in enumerate(box_inside(mask, grid_shape)):
            extent = side.stop - side.start
            if extent > 1 or axis == last:
                self.source_axis.append(axis)
                self.box_shape.append(extent)
                self.first.append(side.start)
        self.num_axes = len(self.box_shape)
        self.box_size = math.prod(self.box_shape)
        self.spacing = self.of_box_axes(spacing)

        users_axes = self.source_axis
        if axes is not None:
            users_axes = [axes[axis] for axis in self.source_axis]
        self.feature = [sorted(users_axes).index(axis) for axis in users_axes]

    @cached_property
    def intensity_ranges(self) -> tuple[Float32, Float32]:
        """The smallest and the largest intensity of each modality, at the voxels."""
        of_modalities = self.image.reshape(len(self.image), self.grid_size)
        return row_ranges(self.device, of_modalities, self.grid_index)

    @cached_property
    def coordinates(self) -> list[Any]:
        """Position of each voxel along each axis of the box, (voxel) int32 on the device."""
        coordinates = []
        for axis, first in zip(self.source_axis, self.first, strict=True):
            # CuPy's unravel_index would wait for the device, and keep all axes in 64 bits.
            of_grid = self.grid_index // self.strides[axis] % self.grid_shape[axis]
            coordinates.append((of_grid - first).astype(np.int32))
        return coordinates

    @cached_property
    def axis_layout(self) -> Any:
        """What `find_features` reads of each axis of the box, (axis, 4) int64 on the device.

        These are stride and extent in the grid, first coordinate, and number of the feature.
        """
        of_grid = np.take([self.strides, self.grid_shape], self.source_axis, axis=1)
        layout = np.stack([*of_grid, self.first, self.feature], axis=1, dtype=np.int64)
        return self.device.upload(layout)

    @cached_property
    def ones(self) -> Any:
        """Return ones, (1, voxel, 1) float32 on the device."""
        return self.device.xp.ones((1, self.num_voxels, 1), dtype=np.float32)

    @cached_property
    def number(self) -> Any:
        """Number of the voxel at each place of the box, (place) int32, -1 without one.

        None means that every place is a voxel, and its number is that of the place.
        """
        if self.places is None:
            return None
        return self.numbers_at(self.places, self.box_size)

    def numbers_at(self, places: Any, size: int) -> Any:
        """Return so many int32 numbers on the device: each voxel's at its place, elsewhere -1."""
        xp = self.device.xp
        numbers = xp.full(size, -1, dtype=np.int32)
        numbers[places] = xp.arange(self.num_voxels, dtype=np.int32)
        return numbers

    @cached_property
    def places(self) -> Any:
        """Place of each voxel in the box, (voxel) int64; None where it is the voxel's number."""
        if self.num_voxels == self.box_size:
            return None
        return self.linear_index(self.box_shape)

    def linear_index(self, shape: Sequence[int]) -> Any:
        """Return each voxel's linear index in a box of that shape that begins where theirs does."""
        index = self.coordinates[0].astype(np.int64)
        for coordinate, extent in zip(self.coordinates[1:], shape[1:], strict=True):
            index = index * extent + coordinate
        return index

    def of_box_axes(self, per_grid_axis: Sequence[float]) -> list[float]:
        """Return the values of the box's axes from one per grid axis."""
        return [float(per_grid_axis[axis]) for axis in self.source_axis]

    def launch(
        self, source: str, kernel: str, constants: Mapping[str, int], /, **arguments: Any
    ) -> None:
        """Run a kernel with a thread for each voxel; see `Launcher.launch`."""
        num_voxels = self.num_voxels
        self.device.launch(
            source, kernel, constants, num_voxels, num_voxels=num_voxels, **arguments
        )

    def gather(self, grids: Any, out: Any) -> None:
        """Copy the voxels of (channel, *grid) values into (channel, voxel) ones."""
        for of_voxels, of_grid in zip(out, grids.reshape(len(out), -1), strict=True):
            of_voxels[...] = of_grid[self.grid_index]

    def scatter(self, values: Any, grids: Any) -> None:
        """Put (channel, voxel) values at their places in (channel, *grid) ones."""
        grids.reshape(len(values), -1)[:, self.grid_index] = values


def strides_of(shape: Sequence[int]) -> list[int]:
    """Return the places of an array of that shape from one along each axis to the next."""
    return [math.prod(shape[axis:]) for axis in range(1, len(shape) + 1)]


def row_ranges(device: CupyDevice, rows: Any, places: Any = None) -> tuple[Float32, Float32]:
    """Return the smallest and the largest value of each row of (row, place) float32 numbers.

    `places`, (voxel) on the device, are those that count; None means all.
    """
    num_rows, row_size = rows.shape
    num_voxels = row_size if places is None else places.size
    num_blocks = min(_BLOCKS_OF_ROW, ceil_divide(num_voxels, _THREADS))
    ends = device.xp.empty((2, num_rows, num_blocks), dtype=np.float32)
    device.launch(
        "voxels",
        "find_ranges",
        CONSTANTS,
        num_rows * num_blocks,
        image=rows,
        grid_size=row_size,
        grid_index=places,
        num_voxels=num_voxels,
        num_blocks=num_blocks,
        lowest=ends[0],
        highest=ends[1],
    )
    lowest, highest = device.download(ends)
    return lowest.min(axis=1), highest.max(axis=1)


class BilateralInput:
    """An appearance kernel's features at the voxels: intensities first, positions last.

    Attributes:
        device, num_points, num_features: those of the voxels, as a `FeatureSource` has them.
        features: (modality + axis, voxel) float32 on the device, counted from the box's first
            voxel and from the lowest intensities.
        spans: the largest value of each feature; the smallest one is 0.
    """

    def __init__(
        self,
        voxels: Voxels,
        theta_position: Sequence[float],
        theta_intensity: Sequence[float],
    ) -> None:
        """Compute the features; raise CapacityError if one spans too many bandwidths."""
        self.voxels = voxels
        self.device = voxels.device
        self.num_points = voxels.num_voxels
        self.theta_position = theta_position
        self.theta_intensity = theta_intensity
        num_modalities = len(self.theta_intensity)
        lowest, highest = [ends[:num_modalities] for ends in voxels.intensity_ranges]
        spans = np.subtract(highest, lowest, dtype=np.float64) / self.theta_intensity
        axes = zip(self.theta_position, voxels.box_shape, voxels.spacing, strict=True)
        for theta, extent, step in axes:
            if extent * step / theta > MAX_SPAN:
                span = f"the volume's extent, {extent} voxels {step:g} apart"
                _refuse_narrow(f"theta_alpha {theta:g}", span)
        for number, theta in enumerate(theta_intensity):
            if spans[number] > MAX_SPAN:
                bandwidth = f"theta_beta {theta:g} of modality {number}"
                _refuse_narrow(bandwidth, "its range of intensities")
        steps = np.divide(voxels.spacing, self.theta_position)
        position_spans = np.empty(voxels.num_axes)
        position_spans[voxels.feature] = np.subtract(voxels.box_shape, 1) * steps
        self.spans = [*spans.tolist(), *position_spans.tolist()]
        self.num_features = len(self.spans)

        device = voxels.device
        inverse_theta = np.divide(1.0, theta_intensity).astype(np.float32)
        intensity = device.upload(np.stack([lowest, inverse_theta]))
        shape = (self.num_features, voxels.num_voxels)
        self.features = device.xp.empty(shape, dtype=np.float32)
        voxels.launch(
            "voxels",
            "find_features",
            CONSTANTS,
            image=voxels.image,
            grid_size=voxels.grid_size,
            grid_index=voxels.grid_index,
            num_modalities=num_modalities,
            lowest=intensity[0],
            inverse_theta=intensity[1],
            num_axes=voxels.num_axes,
            axes=voxels.axis_layout,
            step=device.upload(steps),
            features=self.features,
        )


def _refuse_narrow(bandwidth: str, span: str) -> NoReturn:
    raise CapacityError(
        f"{bandwidth} is less than a millionth of {span}; use a larger bandwidth, and check "
        "spacing and intensities"
    )
