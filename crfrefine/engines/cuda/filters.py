"""The common part of the GPU engine's filters; its direct sums, its spatial kernel, and its bilateral grid."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from crfrefine.base.array_types import Float64
from crfrefine.engines.cuda.rows import WIDEST_ROW, Room, row_constants
from crfrefine.engines.cuda.voxels import BilateralInput, Voxels, extremes
from crfrefine.errors import CapacityError, InputError

TRUNCATION_RADIUS, SPATIAL_RADIUS = (
    3.0,
    4.0,
)  # standard deviations: of a window, and up to which a spatial tap counts in full
ROUNDING = 1e-6  # relative tolerance: voxels on the window's surface belong to it
_MAX_OFFSETS = 1 << 27
_HALF_LOG2E = 0.5 * math.log2(math.e)  # exp(-d^2 / 2) = 2^-(d^2 times this)


class Filter(ABC):
    """A symmetric kernel that can be applied to rows of channels at the voxels."""

    description: str

    def accumulate(
        self,
        values: Any,
        sent: Any,
        received: Any,
        channel_weight: Any,
        total: Any,
        *,
        transposed: bool = False,
        adds: bool = True,
    ) -> None:
        """Total += channel_weight * received * K (sent * values); with `adds` False, total is replaced.

        On the device, float32: values and total (group, voxel, width), channel_weight (group, width), sent and received (voxel), or None
        for ones. The transpose of K differs only for the lattice.
        """
        for group, weight, out in zip(values, channel_weight, total, strict=True):
            self._add(group, sent, (received, weight, out, int(adds)), transposed=transposed)

    @abstractmethod
    def _add(self, group: Any, sent: Any, to: tuple[Any, ...], *, transposed: bool) -> None:
        """Filter a group of channels, (voxel, width); `to` has a kernel's last arguments: received, channel_weight, total, adds."""


class ExactFilter(Filter):
    """All pairs of voxels; see `Filter`."""

    def __init__(self, bilateral: BilateralInput) -> None:
        self._device = bilateral.voxels.device
        self._features = bilateral.features * math.sqrt(_HALF_LOG2E)
        self.description = f"exact (all {bilateral.voxels.num_voxels} x N pairs)"

    def _add(self, group: Any, sent: Any, to: tuple[Any, ...], *, transposed: bool) -> None:
        constants = {"CRF_FEATURES": len(self._features), **row_constants(group)}
        self._device.launch(
            "direct",
            "filter_all_pairs",
            constants,
            len(group),
            self._features,
            len(group),
            group,
            sent,
            *to,
        )


def window_radius(bilateral: BilateralInput) -> list[int]:
    """Voxels on either side along each box axis; compared as floating point, since a huge bandwidth overflows any integer."""
    voxels = bilateral.voxels
    return [
        int(min(TRUNCATION_RADIUS * theta / step * (1.0 + ROUNDING), extent - 1))
        for theta, step, extent in zip(
            bilateral.theta_position, voxels.spacing, voxels.box_shape, strict=True
        )
    ]


class TruncatedFilter(Filter):
    """The pairs of voxels up to three theta_alpha apart; see `Filter`."""

    def __init__(self, bilateral: BilateralInput) -> None:
        """List the window, and number the voxels in a box with padding; raise CapacityError if the window is too large."""
        voxels, radius = bilateral.voxels, window_radius(bilateral)
        num_offsets = math.prod(2 * r + 1 for r in radius)
        if num_offsets > _MAX_OFFSETS:
            raise CapacityError(
                f"a truncated sum with theta_alpha {bilateral.theta_position} visits up to {num_offsets:.2g} neighbors of each voxel; "
                "use smaller bandwidths, or mean_field.filter = lattice"
            )
        # Padding as wide as the window's radius follows each row, plane, ...: it also precedes the next one.
        padded = [extent + r for extent, r in zip(voxels.box_shape, radius, strict=True)]
        strides = [math.prod(padded[a + 1 :]) for a in range(len(padded))]
        lead = sum(r * stride for r, stride in zip(radius, strides, strict=True))
        self._device, xp = voxels.device, voxels.device.xp
        self._features = bilateral.features[: len(bilateral.theta_intensity)] * math.sqrt(
            _HALF_LOG2E
        )
        self._index = voxels.linear_index(padded) + lead
        self._number = xp.full(math.prod(padded) + 2 * lead, -1, dtype=np.int32)
        self._number[self._index] = xp.arange(voxels.num_voxels, dtype=np.int32)
        # Linear distances of the window's voxels in ascending order, the voxel itself among them, and minus log2 of their weights.
        squared: Any = np.zeros(())
        linear: Any = np.zeros((), dtype=np.int64)
        for theta, step, r, stride in zip(
            bilateral.theta_position, voxels.spacing, radius, strides, strict=True
        ):
            distance = np.arange(-r, r + 1)
            squared = squared[..., None] + (distance * (step / theta)) ** 2
            linear = linear[..., None] + distance * stride
        inside = squared <= TRUNCATION_RADIUS**2 * (1.0 + ROUNDING)
        offsets, distances = linear[inside], (_HALF_LOG2E * squared[inside]).astype(np.float32)
        self._neighbors = (
            self._device.upload(offsets),
            self._device.upload(distances),
            len(offsets),
        )
        self.description = f"truncated ({len(offsets) // 2} pairs per voxel)"

    def _add(self, group: Any, sent: Any, to: tuple[Any, ...], *, transposed: bool) -> None:
        constants = {"CRF_FEATURES": len(self._features), **row_constants(group)}
        window = (self._features, len(group), self._number, self._index, *self._neighbors)
        self._device.launch(
            "direct", "filter_window", constants, len(group), *window, group, sent, *to
        )


def spatial_taps(sigma: float, extent: int) -> tuple[Float64, Float64]:
    """Weights of the spatial kernel at distance 0, 1, ... along an axis, and theta_gamma times their derivatives with respect to it.

    Within one voxel beyond `SPATIAL_RADIUS` the Gaussian fades to zero, so that no weight jumps when another voxel comes within reach.
    """
    reach = min(SPATIAL_RADIUS * sigma, 1e18)
    distance = np.arange(int(min(math.ceil(reach), extent - 1)) + 1)
    squared = (distance / sigma) ** 2
    gaussian = np.exp(-0.5 * squared)
    x = np.clip(reach + 1.0 - distance, 0.0, 1.0)
    fade = x * x * (3.0 - 2.0 * x)
    return gaussian * fade, gaussian * (squared * fade + 6.0 * x * (1.0 - x) * reach)


class SpatialFilter(Filter):
    """The spatial kernel, axis by axis; see `Filter`."""

    def __init__(
        self,
        voxels: Voxels,
        theta_gamma: Sequence[float],
        *,
        slope_of: int | None = None,
        boxes: Room | None = None,
    ) -> None:
        """Compute the taps for one theta_gamma per box axis; along `slope_of`, theta_gamma times the derivatives with respect to it."""
        self._voxels, self._device, self._theta_gamma = voxels, voxels.device, theta_gamma
        self._axes: list[tuple[int, int, Any, int]] = []
        for a, (theta, step, extent) in enumerate(
            zip(theta_gamma, voxels.spacing, voxels.box_shape, strict=True)
        ):
            weights, slopes = spatial_taps(theta / step, extent)
            taps = (slopes if a == slope_of else weights).astype(np.float32)
            self._axes.append(
                (
                    math.prod(voxels.box_shape[a + 1 :]),
                    extent,
                    self._device.upload(taps),
                    len(taps) - 1,
                )
            )
        self._boxes = Room(self._device.xp) if boxes is None else boxes
        self.description = "separable"

    def slopes(self) -> list[SpatialFilter]:
        """Return the filters of the derivatives with respect to theta_gamma of each axis."""
        return [
            SpatialFilter(self._voxels, self._theta_gamma, slope_of=a, boxes=self._boxes)
            for a in range(len(self._axes))
        ]

    def _add(self, group: Any, sent: Any, to: tuple[Any, ...], *, transposed: bool) -> None:
        voxels, constants, last = self._voxels, row_constants(group), len(self._axes) - 1
        box, other = self._boxes.array(2, voxels.box_size, group.shape[1])
        for place, axis in enumerate(reversed(self._axes)):
            given = (group, sent, None) if place == 0 else (None, None, box)
            out = (other, None, None, None, 0) if place < last else (None, *to)
            arguments = (voxels.number, voxels.box_size, *given, *axis, *out)
            self._device.launch("spatial", "filter_axis", constants, voxels.box_size, *arguments)
            box, other = other, box


MAX_MODALITIES = 2
OPERATIONS_A_BYTE = 8.0  # arithmetic in the time in which a GPU moves a byte, estimated on paper (docs/decisions/gpu.md)
_SPAN, _CENTER_TAP, _SIDE_TAP = 4, 1.67591, 0.41632  # as in kernels/grid_math.h
LANES = 32  # places of a tile along its last axis: the threads of a warp
_THREADS = 128
_ROWS = _THREADS // LANES  # of a tile of voxels
_SHARED_VALUES, _MAX_SHARED_VALUES = (
    4096,
    12 * 1024,
)  # of the cells of a block: as a rule; what every GPU has
_CELL_STEP = 256  # kernels are compiled for few numbers of cells
_MAX_PART = 4  # channels per thread of splat_planes
# As for the CPU engine: so many cells are no mistake, nor so many per voxel; beyond the last number they always are.
_GENEROUS_GRID, _GENEROUS_PER_VOXEL, _MAX_GRID = 1e7, 200.0, 2e9


class GridSize:
    """The grid's extent, known before it is built.

    Attributes:
        cells: along each axis of the box.
        lowest: the whole number at or below the lowest intensity of each modality, in bandwidths.
        bins: intensity cells of each modality.
        is_possible: whether there are one or two modalities, not far more cells than voxels, and cells not much smaller.
    """

    def __init__(self, bilateral: BilateralInput) -> None:
        voxels, modalities = bilateral.voxels, bilateral.features[: len(bilateral.theta_intensity)]
        positions = [_positions(bilateral, a) for a in range(voxels.num_axes)]
        self.cells: list[int] = [
            math.floor(position[-1]) - math.floor(position[0]) + _SPAN for position in positions
        ]
        spans = [
            (math.floor(low), math.floor(high)) for low, high in extremes(voxels.device, modalities)
        ]
        self.lowest = [low for low, _ in spans]
        # One more than the span: a difference of intensities may be rounded up into the next cell.
        self.bins: list[int] = [high - low + _SPAN + 1 for low, high in spans]
        self.num_cells = math.prod(self.cells) * math.prod(self.bins)
        self._num_planes, self._num_voxels = math.prod(voxels.box_shape[:-2]), voxels.num_voxels
        last = np.floor(positions[-1])
        ends = np.minimum(np.arange(0, len(last), LANES) + LANES, len(last)) - 1
        self._tile_cells = _ROWS * (
            int((last[ends] - last[::LANES]).max()) + _SPAN
        )  # the most under the voxels of a tile
        most = min(_MAX_GRID, max(_GENEROUS_GRID, _GENEROUS_PER_VOXEL * voxels.num_voxels))
        # Gradients are filtered in the widest rows whatever the number of labels.
        fits = self.shared_cells(WIDEST_ROW) * WIDEST_ROW <= _MAX_SHARED_VALUES
        self.is_possible = 1 <= len(self.bins) <= MAX_MODALITIES and self.num_cells <= most and fits

    def shared_cells(self, width: int) -> int:
        """Return the cells in a block's shared memory at a time, in rows of `width` channels; at least those of one intensity cell."""
        return max(_SHARED_VALUES // width, -(-self._tile_cells // _CELL_STEP) * _CELL_STEP)

    def work(self, width: int) -> float:
        """Return the work of filtering `width` channels side by side, bytes to be moved counted as operations (docs/decisions/gpu.md)."""
        num_modalities, row = len(self.bins), 4.0 * width
        of_voxels = self._num_voxels * (8.0 * num_modalities + 16.0 + 2.0 * row)
        of_cells = row * (
            4.0 * self._num_planes * math.prod(self.cells[-2:]) * math.prod(self.bins)
            + 4.0 * self.num_cells
        )
        splat = (
            self._num_voxels * math.prod(self.bins) * (20.0 + 9.0 * num_modalities + 5.0 * width)
        )
        slice_ = self._num_voxels * 4.0 * (4.0**num_modalities) * (3.0 + width)
        return OPERATIONS_A_BYTE * (of_voxels + of_cells) + splat + slice_


class _Axis:
    """The cells under the splines of an axis's places."""

    def __init__(self, bilateral: BilateralInput, axis: int | None) -> None:
        """Compute them for an axis of the box; None means a single place on the first of its cells."""
        upload = bilateral.voxels.device.upload
        if axis is None:
            first_cell, weight, reach = (
                np.zeros(1, dtype=np.int64),
                np.eye(1, _SPAN),
                np.eye(1, _SPAN + 2, k=1),
            )
        else:
            position = _positions(bilateral, axis)
            whole = np.floor(position)
            first_cell, f = (whole - whole[0]).astype(np.int64), position - whole
            middle, next_one = (
                2.0 / 3.0 - f**2 + f**3 / 2.0,
                (1.0 + 3.0 * f + 3.0 * f**2 - 3.0 * f**3) / 6.0,
            )
            weight = np.stack([(1.0 - f) ** 3 / 6.0, middle, next_one, f**3 / 6.0], axis=1)
            reach = np.zeros((len(weight), _SPAN + 2))
            for k, tap in enumerate((_SIDE_TAP, _CENTER_TAP, _SIDE_TAP)):
                reach[:, k : k + _SPAN] += tap * weight
        self.num_places, self.num_cells = len(first_cell), int(first_cell[-1]) + _SPAN
        self.first_cell = upload(
            first_cell.astype(np.int32)
        )  # (place), the first of the four under its spline
        # (cell + 1), the first place with this or a later first cell.
        self.begin = upload(
            np.searchsorted(first_cell, np.arange(self.num_cells + 1)).astype(np.int32)
        )
        # (place, 4) weights of these cells, and (place, 6) of these and their neighbors, with the three taps.
        self.weight, self.reach = (
            upload(weight.astype(np.float32)),
            upload(reach.astype(np.float32)),
        )


def _positions(bilateral: BilateralInput, axis: int) -> Float64:
    """(place) positions along an axis of the box, in bandwidths."""
    voxels = bilateral.voxels
    return np.asarray(
        np.arange(voxels.box_shape[axis]) * voxels.spacing[axis] / bilateral.theta_position[axis],
        dtype=np.float64,
    )


def list_tiles(voxels: Voxels, rows: int) -> Any:
    """Return the numbers of the tiles of `rows` x LANES places that hold a voxel, ascending; numbers run along x first, then y."""
    xp, shape, coordinates = voxels.device.xp, voxels.box_shape, voxels.coordinates
    if voxels.num_axes == 1:
        shape, coordinates = [1, *shape], [xp.zeros_like(coordinates[0]), *coordinates]
    tile = xp.zeros(voxels.num_voxels, dtype=np.int64)
    for coordinate, extent in zip(coordinates[:-2], shape[:-2], strict=True):
        tile = tile * extent + coordinate
    for coordinate, extent, size in zip(coordinates[-2:], shape[-2:], (rows, LANES), strict=True):
        tile = tile * -(-extent // size) + coordinate // size
    num_tiles = math.prod(shape[:-2]) * -(-shape[-2] // rows) * -(-shape[-1] // LANES)
    holds_voxel = xp.zeros(num_tiles, dtype=bool)
    holds_voxel[tile] = True
    return xp.flatnonzero(holds_voxel).astype(np.int64)


class GridFilter(Filter):
    """One or two modalities on a dense grid of positions and intensities; see `Filter`."""

    def __init__(self, bilateral: BilateralInput) -> None:
        """Lay out the grid; InputError unless there are one or two modalities, CapacityError for too many cells."""
        voxels, size = bilateral.voxels, GridSize(bilateral)
        if not 1 <= len(size.bins) <= MAX_MODALITIES:
            raise InputError(
                f'the grid filter takes one or two modalities, not {len(size.bins)}; use filter = "lattice" or "auto"'
            )
        if not size.is_possible:
            raise CapacityError(
                'the bilateral grid would have too many cells for these bandwidths; use filter = "auto"'
            )
        self._voxels, self._device, self._size = voxels, voxels.device, size
        self._num_bins, self._inner_bins = (
            math.prod(size.bins),
            math.prod(size.bins[1:]),
        )  # the latter of the second modality
        lowest = self._device.upload(np.array(size.lowest, dtype=np.float32))
        self._places = (
            bilateral.features[: len(size.bins)],
            lowest,
            voxels.number,
            voxels.num_voxels,
        )
        # Cells of the grid, then of the rest to be added up along one more axis, up to the planes; and of the grid once more.
        outer, num_axes = voxels.box_shape[:-2], voxels.num_axes
        self._plane_cells = (
            math.prod(size.cells[-2:]) * (1 if num_axes > 1 else _SPAN) * self._num_bins
        )
        levels = [
            math.prod(outer[:a]) * math.prod(size.cells[a : len(outer)]) * self._plane_cells
            for a in range(len(outer) + 1)
        ]
        self._counts = [*levels, levels[0]]
        self._outer = [_Axis(bilateral, a) for a in range(len(outer))]
        self._rows = _Axis(bilateral, num_axes - 2 if num_axes > 1 else None)
        self._last = _Axis(bilateral, num_axes - 1)
        self._tiles, self._memory = list_tiles(voxels, _ROWS), Room(self._device.xp)
        self.description = f"grid ({size.num_cells} cells)"

    def _add(self, group: Any, sent: Any, to: tuple[Any, ...], *, transposed: bool) -> None:
        width, counts, rows, last = group.shape[1], self._counts, self._rows, self._last
        memory, ends = (
            self._memory.array(width * sum(counts)),
            accumulate(width * count for count in counts),
        )
        *levels, other = (
            memory[end - width * count : end].reshape(count, width)
            for end, count in zip(ends, counts, strict=True)
        )
        homes, bins, num_groups = self._groups()
        geometry = (
            rows.num_places,
            last.num_places,
            rows.begin,
            rows.weight,
            rows.num_cells,
            last.begin,
            last.weight,
            last.num_cells,
        )
        num_blocks = (
            math.prod([axis.num_places for axis in self._outer])
            * max(1, width // _MAX_PART)
            * num_groups
        )
        arguments = (
            group,
            sent,
            *self._places,
            *geometry,
            self._num_bins,
            self._inner_bins,
            homes,
            bins,
            levels[-1],
        )
        self._launch_blocks("splat_planes", group, num_blocks, *arguments)
        after = self._plane_cells
        for a, axis in reversed(list(enumerate(self._outer))):
            lists = (axis.first_cell, axis.begin, axis.reach)
            self._launch(
                "splat_axis",
                levels[a + 1],
                len(levels[a]),
                axis.num_places,
                axis.num_cells,
                after,
                *lists,
                levels[a],
            )
            after *= axis.num_cells
        self._launch(
            "blur_cells",
            levels[0],
            len(levels[0]),
            last.num_cells,
            self._num_bins,
            self._inner_bins,
            other,
        )
        levels[0], after = (
            other,
            len(other),
        )  # Where the grid is the planes, they are sliced from where it is now.
        for a, axis in enumerate(self._outer):
            after //= axis.num_cells
            weights = (axis.first_cell, axis.weight)
            self._launch(
                "slice_axis",
                levels[a],
                len(levels[a + 1]),
                axis.num_places,
                axis.num_cells,
                after,
                *weights,
                levels[a + 1],
            )
        across = (rows.num_places, last.num_places, rows.first_cell, rows.reach, rows.num_cells)
        along = (last.first_cell, last.weight, last.num_cells, self._num_bins, self._inner_bins)
        arguments = (levels[-1], self._tiles, *self._places, *across, *along, *to)
        self._launch_blocks("slice_tiles", levels[-1], int(self._tiles.size), *arguments)

    def _groups(self) -> tuple[int, int, int]:
        """Cells along the last axis and intensity cells per block of splat_planes, and the number of such groups: the fewest."""
        num_cells, num_bins = self._last.num_cells, self._num_bins

        def num_groups(bins: int) -> int:
            homes = _THREADS // bins
            return -(-num_bins // bins) * (
                1 + max(0, -(-(num_cells - homes) // (homes - _SPAN + 1)))
            )

        bins = min(range(min(num_bins, _THREADS // (2 * _SPAN)), 0, -1), key=num_groups)
        return _THREADS // bins, bins, num_groups(bins)

    def _launch(self, kernel: str, *arguments: Any) -> None:
        to = arguments[-1]
        self._device.launch(
            "grid",
            kernel,
            {**row_constants(to), "CRF_MODALITIES": len(self._size.bins)},
            len(to),
            *arguments,
        )

    def _launch_blocks(self, kernel: str, rows: Any, num_blocks: int, *arguments: Any) -> None:
        own = {
            "CRF_MODALITIES": len(self._size.bins),
            "CRF_THREADS": _THREADS,
            "CRF_CELLS": self._size.shared_cells(rows.shape[1]),
        }
        self._device.launch_blocks(
            "grid_voxels", kernel, {**row_constants(rows), **own}, num_blocks, *arguments
        )
