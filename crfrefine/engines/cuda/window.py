"""The window of a truncated sum, in the forms that its two kernels take: a list of neighbors, or planes of a tile's surroundings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.engines.cuda.device import check_memory
from crfrefine.engines.cuda.sources import padded_count
from crfrefine.engines.cuda.voxels import BilateralInput, Voxels

TRUNCATION_RADIUS = 3.0
"""Standard deviations of the spatial part of the kernel."""
ROUNDING = 1e-6
"""Relative tolerance: voxels on the window's surface belong to it."""
LOG2E = 1.4426950408889634
"""exp(x) = 2^(x log2 e)."""

SHARED_BYTES = 48 * 1024
"""Bytes of shared memory that every GPU gives a block by default."""
LANES = 32
"""Places of a tile along its last axis: the threads of a warp."""
_SHARED_STEP = 8 * 1024  # kernels are compiled for multiples of this, not again for each bandwidth
_LARGEST_BOX = 2**31 - 1  # voxels' numbers in a box are 32 bits wide
_PATCH_ROWS = 8
_FEWEST_VOXELS = 0.25  # share of a patch's places; with fewer, most threads of a tile would wait for the others


def _squared(bilateral: BilateralInput, axis: int, distance: NDArray[np.int64]) -> NDArray[np.float64]:
    """Squared distance along one axis of the box, in bandwidths."""
    steps: NDArray[np.float64] = distance.astype(np.float64) * (bilateral.voxels.spacing[axis] / bilateral.theta_alpha[axis])
    return steps * steps


def _is_inside(squared: NDArray[np.float64]) -> NDArray[np.bool_]:
    return squared <= TRUNCATION_RADIUS**2 * (1.0 + ROUNDING)


def list_neighbors(bilateral: BilateralInput, radius: Sequence[int], strides: Sequence[int]) -> tuple[Any, Any]:
    """Linear distances of the window's voxels in ascending order, including the voxel itself, and minus log2 of their weights."""
    squared: Any = np.zeros(())
    linear: Any = np.zeros((), dtype=np.int64)
    for axis, (r, stride) in enumerate(zip(radius, strides, strict=True)):
        distance = np.arange(-r, r + 1)
        squared = squared[..., None] + _squared(bilateral, axis, distance)
        linear = linear[..., None] + distance * stride
    inside = _is_inside(squared)
    return linear[inside], (0.5 * LOG2E * squared[inside]).astype(bilateral.features.dtype)


@dataclass(frozen=True)
class Planes:
    """The window cut into planes along the last two axes of a box, y and x; there are one or more outer axes before them.

    Attributes:
        extent, radius: (axis) extent of the box and radius of the window; boxes with one or two axes get leading axes of length one.
        offset: (plane, outer axis) steps to a plane.
        plane_distance, distance_y, distance_x: (plane), (steps along y), (steps along x): minus log2 of the weight's spatial part is their
            sum.
        half_height: (plane, 2 radius_x + 1) reach of the window along y; -1: none.
    """

    extent: NDArray[np.int64]
    radius: NDArray[np.int32]
    offset: NDArray[np.int32]
    plane_distance: NDArray[Any]
    distance_y: NDArray[Any]
    distance_x: NDArray[Any]
    half_height: NDArray[np.int32]

    @property
    def num_outer(self) -> int:
        """Number of axes before the last two."""
        return len(self.extent) - 2

    def tiling(self, num_bytes: int) -> Tiling | None:
        """See `choose_tiling`."""
        return choose_tiling(int(self.extent[-2]), int(self.radius[-2]), int(self.radius[-1]), num_bytes)


def cut_into_planes(bilateral: BilateralInput, radius: Sequence[int]) -> Planes:
    """Cut the window; its members are those of `list_neighbors`."""
    num_axes = len(radius)
    missing = max(0, 3 - num_axes)
    reach = [0] * missing + list(radius)
    along = [np.zeros(1)] * missing + [_squared(bilateral, axis, np.arange(r + 1)) for axis, r in enumerate(radius)]
    outer: Any = np.zeros(1)
    for r, squared in zip(reach[:-2], along[:-2], strict=True):
        outer = (outer[:, None] + squared[np.abs(np.arange(-r, r + 1))]).ravel()
    offset = np.array(list(itertools.product(*(range(-r, r + 1) for r in reach[:-2]))), dtype=np.int32)
    is_met = _is_inside(outer)
    outer, offset = outer[is_met], np.ascontiguousarray(offset[is_met])
    columns = along[-1][np.abs(np.arange(-reach[-1], reach[-1] + 1))]
    half_height = _is_inside(outer[:, None, None] + along[-2][:, None] + columns).sum(axis=1) - 1
    plane_distance, distance_y, distance_x = (
        (0.5 * LOG2E * squared).astype(bilateral.features.dtype) for squared in (outer, along[-2], along[-1])
    )
    return Planes(
        extent=np.array([1] * missing + list(bilateral.voxels.box_shape), dtype=np.int64),
        radius=np.array(reach, dtype=np.int32),
        offset=offset,
        plane_distance=plane_distance,
        distance_y=distance_y,
        distance_x=distance_x,
        half_height=half_height.astype(np.int32),
    )


@dataclass(frozen=True)
class Tiling:
    """How a block of threads covers its tile, and how much of the surroundings it loads at a time.

    Attributes:
        warps: warps per block.
        outputs: receivers per thread, one below the other.
        steps: steps along x that are summed between two loads.
        senders: senders that fit into the reserved shared memory.
    """

    warps: int
    outputs: int
    steps: int
    senders: int

    @property
    def rows(self) -> int:
        """Places of a tile along y."""
        return self.warps * self.outputs

    def constants(self) -> dict[str, int]:
        """The constants that the kernel is compiled with."""
        return {"CRF_THREADS": self.warps * LANES, "CRF_OUTPUTS": self.outputs, "CRF_SENDERS": self.senders}


def sender_bytes(num_features: int, width: int, itemsize: int) -> int:
    """Bytes of shared memory per sender: its features and its channels."""
    return (padded_count(num_features) + width) * itemsize


def choose_tiling(extent_y: int, radius_y: int, radius_x: int, num_bytes: int) -> Tiling | None:
    """Choose the tiling with the fewest loads per voxel; None if not even one step along x fits into shared memory.

    Args:
        extent_y: extent of the box along y.
        radius_y: radius of the window along y.
        radius_x: radius of the window along x.
        num_bytes: bytes per sender.
    """
    outputs = 4 if num_bytes <= 32 else 2 if num_bytes <= 64 else 1  # as many as registers hold
    reach_y, span = 2 * radius_y, 2 * radius_x + 1
    best, fewest = None, math.inf
    for warps in (8, 4, 2, 1):
        rows = warps * outputs
        steps = min(span, SHARED_BYTES // (num_bytes * (rows + reach_y)) - (LANES - 1))
        if steps < 1:
            continue
        senders = (rows + reach_y) * (LANES - 1 + steps)
        loads = -(-span // steps) * senders * -(-extent_y // rows)
        if loads < fewest:
            set_aside = -(-senders * num_bytes // _SHARED_STEP) * _SHARED_STEP
            best, fewest = Tiling(warps, outputs, steps, set_aside // num_bytes), loads
    return best


def list_tiles(voxels: Voxels, rows: int) -> Any:
    """Return the numbers of the tiles of `rows` x LANES places that hold a voxel, ascending; numbers run along x first, then y."""
    xp = voxels.device.xp
    check_memory(voxels.device, 36.0 * voxels.num_voxels, "the numbers of the voxels' tiles")
    shape = [1, *voxels.box_shape] if voxels.num_axes == 1 else voxels.box_shape
    coordinates = [xp.zeros_like(voxels.coordinates[0]), *voxels.coordinates] if voxels.num_axes == 1 else voxels.coordinates
    tile = xp.zeros(voxels.num_voxels, dtype=np.int64)
    for coordinate, extent in zip(coordinates[:-2], shape[:-2], strict=True):
        tile = tile * extent + coordinate
    for coordinate, extent, size in zip(coordinates[-2:], shape[-2:], (rows, LANES), strict=True):
        tile = tile * -(-extent // size) + coordinate // size
    num_tiles = math.prod(shape[:-2]) * -(-shape[-2] // rows) * -(-shape[-1] // LANES)
    holds_voxel = xp.zeros(num_tiles, dtype=bool)
    holds_voxel[tile] = True
    return xp.flatnonzero(holds_voxel).astype(np.int64)


def is_worth_tiling(bilateral: BilateralInput, planes: Planes) -> bool:
    """Whether tiles fit for rows of any width, and voxels fill at least a quarter of those 8 x 32 patches that hold any."""
    voxels = bilateral.voxels
    widest = sender_bytes(len(bilateral.theta_beta), 8, bilateral.features.dtype.itemsize)
    if voxels.box_size > _LARGEST_BOX or planes.tiling(widest) is None:
        return False
    places = int(list_tiles(voxels, _PATCH_ROWS).size) * _PATCH_ROWS * LANES
    return voxels.num_voxels >= _FEWEST_VOXELS * places
