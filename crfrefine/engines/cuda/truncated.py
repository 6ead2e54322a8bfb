"""The two kernels for a truncated sum: each thread by itself, or in tiles that the threads of a block share."""

from __future__ import annotations

import math
from typing import Any

from crfrefine.engines.cuda.device import Device, check_memory, precision
from crfrefine.engines.cuda.sources import padded_count
from crfrefine.engines.cuda.voxels import BilateralInput
from crfrefine.engines.cuda.window import LOG2E, Planes, Tiling, list_neighbors, list_tiles, sender_bytes
from crfrefine.errors import CapacityError

HALF_EXPONENT = math.sqrt(0.5 * LOG2E)
"""exp(-d^2 / 2) = 2^-(d * this)^2."""


class Box:
    """Intensities and values at their places in a box, zero elsewhere."""

    def __init__(self, bilateral: BilateralInput, index: Any, size: int) -> None:
        """Put the intensities there.

        Args:
            bilateral: the features.
            index: (voxel) place of each voxel.
            size: total number of places.
        """
        self._device: Device = bilateral.voxels.device
        self._size, self._num_voxels, self.index = size, bilateral.voxels.num_voxels, index
        num_modalities, dtype = len(bilateral.theta_beta), bilateral.features.dtype
        self.constants = {"CRF_FEATURES": num_modalities, **precision(dtype)}
        self.intensity = self._device.xp.zeros((size, padded_count(num_modalities)), dtype=dtype)
        arguments = (bilateral.features, self._num_voxels, index, HALF_EXPONENT, self.intensity)
        self._device.launch("direct", "place_intensities", {**self.constants, "CRF_WIDTH": 1}, self._num_voxels, *arguments)
        self._values: dict[int, Any] = {}

    def place(self, values: Any, scale: Any) -> Any:
        """Put the values of one group there; the next group of that width overwrites them."""
        width = values.shape[1]
        if width not in self._values:
            check_memory(self._device, float(values.dtype.itemsize) * width * self._size, "the box of a truncated sum")
            self._values[width] = self._device.xp.zeros((self._size, width), dtype=values.dtype)
        box = self._values[width]
        constants = {**self.constants, "CRF_WIDTH": width}
        self._device.launch("direct", "place_values", constants, self._num_voxels, values, scale, self._num_voxels, self.index, box)
        return box


class PlainWindow:
    """Each thread reads its own neighbors, in a box with padding to read beyond its faces."""

    def __init__(self, bilateral: BilateralInput, radius: list[int]) -> None:
        voxels = bilateral.voxels
        self._device = voxels.device
        # Padding as wide as the window's radius follows each row, plane, ...: it also precedes the next one.
        padded = [extent + r for extent, r in zip(voxels.box_shape, radius, strict=True)]
        strides = [math.prod(padded[a + 1 :]) for a in range(len(padded))]
        lead = sum(r * stride for r, stride in zip(radius, strides, strict=True))
        size = math.prod(padded) + 2 * lead
        num_modalities = padded_count(len(bilateral.theta_beta))
        num_bytes = float(bilateral.features.dtype.itemsize) * size * (num_modalities + 8)
        check_memory(self._device, num_bytes, "the padded box of a truncated sum")
        self.box = Box(bilateral, voxels.linear_index(padded) + lead, size)
        offsets, distances = list_neighbors(bilateral, radius, strides)
        self._neighbors = (self._device.upload(offsets), self._device.upload(distances), len(offsets))

    def add(self, box: Any, received: Any, channel_weight: Any, total: Any, *, adds: bool) -> None:
        """Add the sums of what lies in the box, or store them."""
        num_voxels, width = total.shape
        arguments = (self.box.intensity, self.box.index, num_voxels, *self._neighbors, box, received, channel_weight, total, int(adds))
        self._device.launch("direct", "filter_window", {**self.box.constants, "CRF_WIDTH": width}, num_voxels, *arguments)


class TiledWindow:
    """The threads of a block read their tile's surroundings together; tiles without a voxel are left out."""

    def __init__(self, bilateral: BilateralInput, planes: Planes) -> None:
        voxels = bilateral.voxels
        self._voxels, self._device, self._planes = voxels, voxels.device, planes
        upload = self._device.upload
        self.box = Box(bilateral, voxels.box_index, voxels.box_size)
        self._number = voxels.number
        self._geometry = tuple(upload(array) for array in (planes.extent, planes.radius, planes.offset))
        distances = (planes.plane_distance, planes.distance_y, planes.distance_x)
        self._window = (*(upload(array) for array in (*distances, planes.half_height)), len(planes.offset))
        self._num_modalities = len(bilateral.theta_beta)
        self._tilings: dict[int, tuple[Tiling, Any]] = {}

    def add(self, box: Any, received: Any, channel_weight: Any, total: Any, *, adds: bool) -> None:
        """Add the sums of what lies in the box, or store them."""
        width = total.shape[1]
        if width not in self._tilings:
            tiling = self._planes.tiling(sender_bytes(self._num_modalities, width, total.dtype.itemsize))
            if tiling is None:
                raise CapacityError("the window of a truncated sum does not fit into shared memory; use smaller bandwidths")
            self._tilings[width] = tiling, list_tiles(self._voxels, tiling.rows)
        tiling, tiles = self._tilings[width]
        self._device.launch_blocks(
            "window_tiles",
            "filter_window_tiles",
            {**self.box.constants, "CRF_WIDTH": width, "CRF_OUTER": self._planes.num_outer, **tiling.constants()},
            int(tiles.size),
            self.box.intensity,
            box,
            self._number,
            tiles,
            *self._geometry,
            *self._window,
            tiling.steps,
            received,
            channel_weight,
            total,
            int(adds),
        )
