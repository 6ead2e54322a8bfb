"""The bilateral grid on the device: voxels to planes of cells, planes to the grid, and back; the three taps of its filter between."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from crfrefine.base.array_types import Float64
from crfrefine.engines.cuda.device import WIDEST_ROW, Room, check_memory, row_constants, row_width
from crfrefine.engines.cuda.filters import Filter
from crfrefine.engines.cuda.memory import grid_bytes
from crfrefine.engines.cuda.voxels import BilateralInput, Voxels, extremes
from crfrefine.errors import CapacityError, InputError

MAX_MODALITIES = 2

_SPAN, _CENTER_TAP, _SIDE_TAP = 4, 1.67591, 0.41632  # as in kernels/grid_math.h
LANES = 32
"""Places of a tile along its last axis: the threads of a warp."""
_THREADS = 128
_ROWS = _THREADS // LANES  # of a tile of voxels
_CELL_BYTES, _MAX_CELL_BYTES = 16 * 1024, 48 * 1024  # of shared memory for the cells of a block: as a rule; what every GPU has
_CELL_STEP = 256  # kernels are compiled for few numbers of cells
_MAX_PART = 4  # channels per thread of splat_planes
# As for the CPU engine: so many cells are no mistake, nor so many per voxel; beyond the last number they always are.
_GENEROUS_GRID, _GENEROUS_PER_VOXEL, _MAX_GRID = 1e7, 200.0, 2e9


@dataclass(frozen=True)
class GridSize:
    """The grid's extent, known before it is built."""

    cells: tuple[int, ...]  # along each axis of the box
    lowest: tuple[int, ...]  # the whole number at or below the lowest intensity of each modality, in bandwidths
    bins: tuple[int, ...]  # intensity cells of each modality
    num_planes: int  # planes of the box's last two axes
    num_voxels: int  # inside the mask
    tile_cells: int  # the most cells under the voxels of a tile, of one intensity cell
    itemsize: int  # bytes of a value

    @staticmethod
    def of(bilateral: BilateralInput) -> GridSize:
        """Compute it from the features."""
        voxels, modalities = bilateral.voxels, bilateral.features[: len(bilateral.theta_intensity)]
        positions = [_positions(bilateral, a) for a in range(voxels.num_axes)]
        cells = tuple(math.floor(position[-1]) - math.floor(position[0]) + _SPAN for position in positions)
        spans = [(math.floor(low), math.floor(high)) for low, high in extremes(voxels.device, modalities)]
        lowest = tuple(low for low, _ in spans)
        # One more than the span: a difference of intensities may be rounded up into the next cell.
        bins = tuple(high - low + _SPAN + 1 for low, high in spans)
        last = np.floor(positions[-1])
        ends = np.minimum(np.arange(0, len(last), LANES) + LANES, len(last)) - 1
        tile_cells = _ROWS * (int((last[ends] - last[::LANES]).max()) + _SPAN)
        itemsize = bilateral.features.dtype.itemsize
        return GridSize(cells, lowest, bins, math.prod(voxels.box_shape[:-2]), voxels.num_voxels, tile_cells, itemsize)

    @property
    def num_cells(self) -> int:
        """Of the whole grid."""
        return math.prod(self.cells) * math.prod(self.bins)

    @property
    def num_plane_cells(self) -> int:
        """Of all planes, before they are added up."""
        return self.num_planes * math.prod(self.cells[-2:]) * math.prod(self.bins)

    @property
    def is_possible(self) -> bool:
        """Whether the filter takes this input: one or two modalities, not far more cells than voxels, and cells not much smaller."""
        most = min(_MAX_GRID, max(_GENEROUS_GRID, _GENEROUS_PER_VOXEL * self.num_voxels))
        # Gradients are filtered in the widest rows whatever the number of labels.
        fits = self.shared_cells(WIDEST_ROW) * WIDEST_ROW * self.itemsize <= _MAX_CELL_BYTES
        return 1 <= len(self.bins) <= MAX_MODALITIES and self.num_cells <= most and fits

    def shared_cells(self, width: int) -> int:
        """Return the cells in a block's shared memory at a time, in rows of `width` channels; at least those of one intensity cell."""
        return max(_CELL_BYTES // (width * self.itemsize), -(-self.tile_cells // _CELL_STEP) * _CELL_STEP)


class _Axis:
    """The cells under the splines of an axis's places.

    Attributes:
        num_places: along the axis of the box.
        num_cells: that they reach.
        first_cell: (place) int32, the first of the four under its spline.
        begin: (cell + 1) int32, the first place with this or a later first cell.
        weight: (place, 4) of these cells.
        reach: (place, 6) weights of these cells and their neighbors, with the three taps.
    """

    def __init__(self, bilateral: BilateralInput, axis: int | None) -> None:
        """Compute them for an axis of the box; None: for a single place on the first of its cells."""
        voxels, dtype = bilateral.voxels, bilateral.features.dtype
        if axis is None:
            first_cell, weight, reach = np.zeros(1, dtype=np.int64), np.eye(1, _SPAN), np.eye(1, _SPAN + 2, k=1)
        else:
            position = _positions(bilateral, axis)
            whole = np.floor(position)
            first_cell, weight = (whole - whole[0]).astype(np.int64), _spline_weights(position - whole)
            reach = np.zeros((len(weight), _SPAN + 2))
            for k, tap in enumerate((_SIDE_TAP, _CENTER_TAP, _SIDE_TAP)):
                reach[:, k : k + _SPAN] += tap * weight
        self.num_places, self.num_cells = len(first_cell), int(first_cell[-1]) + _SPAN
        upload = voxels.device.upload
        self.first_cell = upload(first_cell.astype(np.int32))
        self.begin = upload(np.searchsorted(first_cell, np.arange(self.num_cells + 1)).astype(np.int32))
        self.weight, self.reach = upload(weight.astype(dtype)), upload(reach.astype(dtype))


def _positions(bilateral: BilateralInput, axis: int) -> Float64:
    """(place) positions along an axis of the box, in bandwidths from the feature origin."""
    voxels = bilateral.voxels
    place = bilateral.first[axis] + np.arange(voxels.box_shape[axis])
    return np.asarray(place * voxels.spacing[axis] / bilateral.theta_position[axis], dtype=np.float64)


def _spline_weights(fraction: Float64) -> Float64:
    """(place, 4) weights of the cells around points at these fractions of their cells."""
    f, weight = fraction, np.empty((len(fraction), _SPAN))
    weight[:, 0], weight[:, 3] = (1.0 - f) ** 3 / 6.0, f**3 / 6.0
    weight[:, 1] = 2.0 / 3.0 - f**2 + f**3 / 2.0
    weight[:, 2] = (1.0 + 3.0 * f + 3.0 * f**2 - 3.0 * f**3) / 6.0
    return weight


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


class GridFilter(Filter):
    """One or two modalities on a dense grid of positions and intensities; see `Filter`."""

    def __init__(self, bilateral: BilateralInput, num_channels: int = 1) -> None:
        """Lay out the grid, with memory for filtering so many channels; rows that turn out wider take more.

        Raises:
            InputError: no modality, or more than two.
            CapacityError: far more cells than voxels, or too little memory.
        """
        voxels, size = bilateral.voxels, GridSize.of(bilateral)
        if not 1 <= len(size.bins) <= MAX_MODALITIES:
            raise InputError(f'the grid filter takes one or two modalities, not {len(size.bins)}; use filter = "lattice" or "auto"')
        if not size.is_possible:
            raise CapacityError('the bilateral grid would have too many cells for these bandwidths; use filter = "auto"')
        self._voxels, self._device = voxels, voxels.device
        self._dtype = bilateral.features.dtype
        self._intensity = bilateral.features[: len(size.bins)]
        self._lowest = self._device.upload(np.array(size.lowest, dtype=self._dtype))
        self._bins, self._size = size.bins, size
        # Cells of the grid, then of the rest to be added up along one more axis, up to the planes; and of the grid once more.
        outer, num_axes = voxels.box_shape[:-2], voxels.num_axes
        self._plane_cells = math.prod(size.cells[-2:]) * (1 if num_axes > 1 else _SPAN) * math.prod(size.bins)
        levels = [math.prod(outer[:a]) * math.prod(size.cells[a : len(outer)]) * self._plane_cells for a in range(len(outer) + 1)]
        self._counts = [*levels, levels[0]]
        width = row_width(num_channels)
        needed = grid_bytes(sum(self._counts), width, num_places=sum(voxels.box_shape), num_voxels=voxels.num_voxels)
        check_memory(self._device, needed, "a bilateral grid")
        self._outer = [_Axis(bilateral, a) for a in range(len(outer))]
        self._rows = _Axis(bilateral, num_axes - 2 if num_axes > 1 else None)
        self._last = _Axis(bilateral, num_axes - 1)
        self._number, self._tiles = voxels.number, list_tiles(voxels, _ROWS)
        self._memory = Room(self._device, "the cells of a bilateral grid")
        self._arrays(width)
        self.description = f"grid ({size.num_cells} cells)"

    def _add(self, group: Any, sent: Any, to: tuple[Any, ...], *, transposed: bool) -> None:
        levels, other = self._arrays(group.shape[1])
        self._splat(group, sent, levels)
        grid, num_bins = levels[0], math.prod(self._bins)
        self._launch("blur_cells", grid, len(grid), self._last.num_cells, num_bins, self._inner_bins, other)
        # Where the grid is the planes, they are sliced from where it is now.
        levels[0] = other
        self._slice(levels, to)

    def _arrays(self, width: int) -> tuple[list[Any], Any]:
        """Memory for rows of so many channels: (row, width) of each level, and of the grid once more; its content is lost."""
        memory = self._memory.array((width * sum(self._counts),), self._dtype)
        ends = accumulate(width * count for count in self._counts)
        parts = zip(ends, self._counts, strict=True)
        *levels, other = (memory[end - width * count : end].reshape(count, width) for end, count in parts)
        return levels, other

    def _splat(self, group: Any, sent: Any, levels: list[Any]) -> None:
        num_parts = max(1, group.shape[1] // _MAX_PART)
        homes, bins, num_groups = self._groups()
        rows, last = self._rows, self._last
        geometry = (rows.num_places, last.num_places, rows.begin, rows.weight, rows.num_cells, last.begin, last.weight, last.num_cells)
        voxels = (self._intensity, self._lowest, self._number, self._voxels.num_voxels)
        num_planes = math.prod([axis.num_places for axis in self._outer])
        arguments = (group, sent, *voxels, *geometry, math.prod(self._bins), self._inner_bins, homes, bins, levels[-1])
        self._launch_blocks("splat_planes", group, num_planes * num_parts * num_groups, *arguments)
        after = self._plane_cells
        for a, axis in reversed(list(enumerate(self._outer))):
            to = levels[a]
            lists = (axis.first_cell, axis.begin, axis.reach)
            self._launch("splat_axis", levels[a + 1], len(to), axis.num_places, axis.num_cells, after, *lists, to)
            after *= axis.num_cells

    def _slice(self, levels: list[Any], target: tuple[Any, ...]) -> None:
        after = len(levels[0])
        for a, axis in enumerate(self._outer):
            after //= axis.num_cells
            to = levels[a + 1]
            self._launch("slice_axis", levels[a], len(to), axis.num_places, axis.num_cells, after, axis.first_cell, axis.weight, to)
        rows, last = self._rows, self._last
        geometry = (rows.num_places, last.num_places, rows.first_cell, rows.reach, rows.num_cells)
        along = (last.first_cell, last.weight, last.num_cells, math.prod(self._bins), self._inner_bins)
        voxels = (self._intensity, self._lowest, self._number, self._voxels.num_voxels)
        arguments = (levels[-1], self._tiles, *voxels, *geometry, *along, *target)
        self._launch_blocks("slice_tiles", levels[-1], int(self._tiles.size), *arguments)

    @property
    def _inner_bins(self) -> int:
        """Intensity cells of the second modality."""
        return math.prod(self._bins[1:])

    def _groups(self) -> tuple[int, int, int]:
        """Cells along the last axis and intensity cells per block of splat_planes, and the number of such groups: the fewest."""
        num_cells, num_bins = self._last.num_cells, math.prod(self._bins)

        def num_groups(bins: int) -> int:
            homes = _THREADS // bins
            return -(-num_bins // bins) * (1 + max(0, -(-(num_cells - homes) // (homes - _SPAN + 1))))

        bins = min(range(min(num_bins, _THREADS // (2 * _SPAN)), 0, -1), key=num_groups)
        return _THREADS // bins, bins, num_groups(bins)

    def _launch(self, kernel: str, *arguments: Any) -> None:
        to = arguments[-1]
        self._device.launch("grid", kernel, {**row_constants(to), "CRF_MODALITIES": len(self._bins)}, len(to), *arguments)

    def _launch_blocks(self, kernel: str, rows: Any, num_blocks: int, *arguments: Any) -> None:
        own = {"CRF_MODALITIES": len(self._bins), "CRF_THREADS": _THREADS}
        own["CRF_CELLS"] = self._size.shared_cells(rows.shape[1])
        self._device.launch_blocks("grid_voxels", kernel, {**row_constants(rows), **own}, num_blocks, *arguments)


def filtering_work(size: GridSize, width: int) -> tuple[float, float]:
    """Return the bytes that filtering `width` channels side by side must move, and its arithmetic (docs/decisions/gpu.md)."""
    num_modalities, row = len(size.bins), 4.0 * width
    of_voxels = size.num_voxels * (8.0 * num_modalities + 16.0 + 2.0 * row)
    of_cells = row * (4.0 * size.num_plane_cells + 4.0 * size.num_cells)
    splat = size.num_voxels * math.prod(size.bins) * (20.0 + 9.0 * num_modalities + 5.0 * width)
    slice_ = size.num_voxels * 4.0 * (4.0**num_modalities) * (3.0 + width)
    return of_voxels + of_cells, splat + slice_
