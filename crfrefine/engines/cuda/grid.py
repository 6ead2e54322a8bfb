"""The GPU engine's bilateral grid: one or two modalities on dense cells of position and intensity.

Values are splatted onto planes of the last two axes of the box, then along the other axes; the
cells are blurred, and sliced the same way back. kernels/cuda/grid*.cu have the kernels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from crfrefine.base.array_types import Float64
from crfrefine.engines.cuda.filters import Filter, Output
from crfrefine.engines.cuda.rows import WIDEST_ROW, Room, ceil_divide, row_constants
from crfrefine.engines.cuda.voxels import BilateralInput, Voxels
from crfrefine.errors import CapacityError, InputError

MAX_MODALITIES = 2
# Arithmetic in the time in which a GPU moves a byte, estimated on paper (docs/decisions/gpu.md).
OPERATIONS_A_BYTE = 8.0
# As in kernels/grid_math.h.
_SPAN = 4
_CENTER_TAP = 1.67591
_SIDE_TAP = 0.41632
LANES = 32  # places of a tile along its last axis: the threads of a warp
_THREADS = 128  # threads of a block
_ROWS = _THREADS // LANES  # rows of a tile of voxels
_SHARED_VALUES = 4096  # values of cells that a block shares, as a rule
_MAX_SHARED_VALUES = 12 * 1024  # values that a block can share on every GPU
_CELL_STEP = 256  # shared cells come in such steps, so that few kernels are compiled
_MAX_PART = 4  # channels per thread of splat_planes
# As in the CPU engine: a grid with up to so many cells, or so many per voxel, is no mistake; more
# cells than the last number always are.
_GENEROUS_GRID = 1e7
_GENEROUS_PER_VOXEL = 200.0
_MAX_GRID = 2e9


class GridSize:
    """The grid's extent, known before it is built.

    Attributes:
        cells: along each axis of the box.
        bins: intensity cells of each modality.
        is_possible: whether there are one or two modalities, not far more cells than voxels, and
            no more cells under a tile than a block can share.
    """

    def __init__(self, bilateral: BilateralInput) -> None:
        voxels = bilateral.voxels
        positions = [_positions(bilateral, axis) for axis in range(voxels.num_axes)]
        self.cells: list[int] = []
        for position in positions:
            first_cell = math.floor(position[0])
            last_cell = math.floor(position[-1])
            self.cells.append(last_cell - first_cell + _SPAN)
        self.bins: list[int] = []
        for highest in bilateral.highest_intensity.tolist():
            # As many as in the C++ engine, which has one to spare for rounding.
            self.bins.append(math.floor(highest) + _SPAN + 1)

        self.num_bins = math.prod(self.bins)
        self.num_cells = math.prod(self.cells) * self.num_bins
        self._num_planes = math.prod(voxels.box_shape[:-2])
        self._num_voxels = voxels.num_voxels
        self._tile_cells = _ROWS * _most_cells_of_a_tile(positions[-1])
        self.is_possible = self._is_possible()

    def _is_possible(self) -> bool:
        generous = max(_GENEROUS_GRID, _GENEROUS_PER_VOXEL * self._num_voxels)
        # Gradients are filtered in the widest rows whatever the number of labels.
        fits = self.shared_cells(WIDEST_ROW) * WIDEST_ROW <= _MAX_SHARED_VALUES
        has_cells = self.num_cells <= min(_MAX_GRID, generous)
        return 1 <= len(self.bins) <= MAX_MODALITIES and has_cells and fits

    def shared_cells(self, width: int) -> int:
        """Return the cells in a block's shared memory at a time, in rows of `width` channels.

        They are at least those of one intensity cell.
        """
        needed = ceil_divide(self._tile_cells, _CELL_STEP) * _CELL_STEP
        return max(_SHARED_VALUES // width, needed)

    def work(self, width: int) -> float:
        """Return the operations of filtering `width` channels side by side.

        Bytes to be moved are counted as operations (docs/decisions/gpu.md).
        """
        num_modalities = len(self.bins)
        num_voxels = self._num_voxels
        row = 4.0 * width
        voxel_bytes = num_voxels * (8.0 * num_modalities + 16.0 + 2.0 * row)
        cells_of_plane = math.prod(self.cells[-2:]) * self.num_bins
        plane_bytes: float = 4.0 * self._num_planes * cells_of_plane
        cell_bytes = row * (plane_bytes + 4.0 * self.num_cells)
        per_bin = 20.0 + 9.0 * num_modalities + 5.0 * width
        splat = num_voxels * self.num_bins * per_bin
        slice_: float = num_voxels * 4.0 * (4.0**num_modalities) * (3.0 + width)
        return OPERATIONS_A_BYTE * (voxel_bytes + cell_bytes) + splat + slice_


def _positions(bilateral: BilateralInput, axis: int) -> Float64:
    """Return the (place) positions along an axis of the box, in bandwidths."""
    voxels = bilateral.voxels
    places = np.arange(voxels.box_shape[axis])
    positions = places * voxels.spacing[axis] / bilateral.theta_position[axis]
    return np.asarray(positions, dtype=np.float64)


def _most_cells_of_a_tile(positions: Float64) -> int:
    """Return the most cells along the last axis under the splines of a tile's places."""
    cells = np.floor(positions)
    first = np.arange(0, len(cells), LANES)
    last = np.minimum(first + LANES, len(cells)) - 1
    return int((cells[last] - cells[first]).max()) + _SPAN


class _Axis:
    """The cells under the splines of an axis's places.

    Attributes:
        first_cell: (place), the first of the four under its spline.
        begin: (cell + 1), the first place with this or a later first cell.
        weight: (place, 4), of its four cells.
        reach: (place, 6), of these and their neighbors, with the three taps of the blur.
    """

    def __init__(self, bilateral: BilateralInput, axis: int | None) -> None:
        """Find the cells for an axis of the box; None means one place, on its first cell."""
        if axis is None:
            first_cell = np.zeros(1, dtype=np.int64)
            weight = np.eye(1, _SPAN)
            reach = np.eye(1, _SPAN + 2, k=1)
        else:
            position = _positions(bilateral, axis)
            whole = np.floor(position)
            first_cell = (whole - whole[0]).astype(np.int64)
            weight = _spline(position - whole)
            reach = np.zeros((len(weight), _SPAN + 2))
            for k, tap in enumerate((_SIDE_TAP, _CENTER_TAP, _SIDE_TAP)):
                reach[:, k : k + _SPAN] += tap * weight

        self.num_places = len(first_cell)
        self.num_cells = int(first_cell[-1]) + _SPAN
        begin = np.searchsorted(first_cell, np.arange(self.num_cells + 1))
        upload = bilateral.voxels.device.upload
        self.first_cell = upload(first_cell.astype(np.int32))
        self.begin = upload(begin.astype(np.int32))
        self.weight = upload(weight.astype(np.float32))
        self.reach = upload(reach.astype(np.float32))


def _spline(f: Float64) -> Float64:
    """Return the (place, 4) weights of cells under a cubic spline, for fractions `f` of a cell."""
    first = (1.0 - f) ** 3 / 6.0
    second = 2.0 / 3.0 - f**2 + f**3 / 2.0
    third = (1.0 + 3.0 * f + 3.0 * f**2 - 3.0 * f**3) / 6.0
    fourth = f**3 / 6.0
    return np.stack([first, second, third, fourth], axis=1)


def list_tiles(voxels: Voxels, rows: int) -> Any:
    """Return the numbers of the tiles of `rows` x LANES places that hold a voxel, ascending.

    Numbers run along x first, then y.
    """
    xp = voxels.device.xp
    shape = voxels.box_shape
    coordinates = voxels.coordinates
    if voxels.num_axes == 1:
        shape = [1, *shape]
        coordinates = [xp.zeros_like(coordinates[0]), *coordinates]
    sizes = [1] * (len(shape) - 2) + [rows, LANES]
    tile = xp.zeros(voxels.num_voxels, dtype=np.int64)
    num_tiles = 1
    for coordinate, extent, size in zip(coordinates, shape, sizes, strict=True):
        num_along = ceil_divide(extent, size)
        tile = tile * num_along + coordinate // size
        num_tiles *= num_along
    holds_voxel = xp.zeros(num_tiles, dtype=bool)
    holds_voxel[tile] = True
    return xp.flatnonzero(holds_voxel).astype(np.int64)


class _SplatGroups(NamedTuple):
    """How `splat_planes` divides the cells of a row of a plane among blocks."""

    homes: int  # cells along the last axis of a block
    bins: int  # intensity cells of a block
    num_groups: int


class GridFilter(Filter):
    """One or two modalities on a dense grid of positions and intensities; see `Filter`."""

    def __init__(self, bilateral: BilateralInput) -> None:
        """Lay out the grid.

        Raises InputError unless there are one or two modalities, CapacityError for too many cells.
        """
        voxels = bilateral.voxels
        size = GridSize(bilateral)
        num_modalities = len(size.bins)
        if not 1 <= num_modalities <= MAX_MODALITIES:
            raise InputError(
                f"the grid filter takes one or two modalities, not {num_modalities}; use "
                'filter = "lattice" or "auto"'
            )
        if not size.is_possible:
            raise CapacityError(
                "the bilateral grid would have too many cells for these bandwidths; use "
                'filter = "auto"'
            )
        self._device = voxels.device
        self._size = size
        self._bins = (size.num_bins, math.prod(size.bins[1:]))  # all; those of the second modality
        modalities = bilateral.features[:num_modalities]
        self._places = (modalities, voxels.number, voxels.num_voxels)

        num_axes = voxels.num_axes
        num_outer = max(num_axes - 2, 0)
        self._outer = [_Axis(bilateral, axis) for axis in range(num_outer)]
        self._rows = _Axis(bilateral, num_axes - 2 if num_axes > 1 else None)
        self._last = _Axis(bilateral, num_axes - 1)
        self._plane_cells = self._rows.num_cells * self._last.num_cells * size.num_bins
        # Rows of each level, from the grid to the planes: the next one has places of one more axis.
        self._counts = []
        for level in range(num_outer + 1):
            num_places = math.prod(voxels.box_shape[:level])
            num_cells = math.prod(size.cells[level:num_outer])
            self._counts.append(num_places * num_cells * self._plane_cells)

        self._groups = self._splat_groups()
        self._tiles = list_tiles(voxels, _ROWS)
        self._memory = Room(self._device.xp)
        self.description = f"grid ({size.num_cells} cells)"

    def _splat_groups(self) -> _SplatGroups:
        """Return the division of a row's cells into the fewest groups."""
        num_cells = self._last.num_cells
        num_bins = self._size.num_bins
        most_bins = min(num_bins, _THREADS // (2 * _SPAN))
        best = None
        for bins in range(most_bins, 0, -1):
            homes = _THREADS // bins
            num_further = ceil_divide(num_cells - homes, homes - _SPAN + 1)
            num_groups = ceil_divide(num_bins, bins) * (1 + max(0, num_further))
            if best is None or num_groups < best.num_groups:
                best = _SplatGroups(homes, bins, num_groups)
        assert best is not None
        return best

    def _add(self, group: Any, sent: Any, output: Output, *, transposed: bool) -> None:
        levels, blurred = self._arrays(group.shape[1])
        self._splat_planes(group, sent, levels[-1])
        inner_cells = self._plane_cells
        for level, axis in reversed(list(enumerate(self._outer))):
            geometry = (axis.num_places, axis.num_cells, inner_cells)
            lists = (axis.first_cell, axis.begin, axis.reach)
            to = levels[level]
            self._launch("splat_axis", levels[level + 1], len(to), *geometry, *lists, to)
            inner_cells *= axis.num_cells

        num_cells = self._last.num_cells
        self._launch("blur_cells", levels[0], len(blurred), num_cells, *self._bins, blurred)
        levels[0] = blurred  # With two axes or fewer, this is also the level of the planes.

        inner_cells = len(blurred)
        for level, axis in enumerate(self._outer):
            inner_cells //= axis.num_cells
            geometry = (axis.num_places, axis.num_cells, inner_cells)
            weights = (axis.first_cell, axis.weight)
            to = levels[level + 1]
            self._launch("slice_axis", levels[level], len(to), *geometry, *weights, to)
        self._slice_tiles(levels[-1], output)

    def _arrays(self, width: int) -> tuple[list[Any], Any]:
        """Return the rows of each level, and of the blurred grid, in one piece of memory."""
        counts = [*self._counts, self._counts[0]]
        memory = self._memory.array(sum(counts), width)
        arrays = []
        begin = 0
        for count in counts:
            arrays.append(memory[begin : begin + count])
            begin += count
        return arrays[:-1], arrays[-1]

    def _splat_planes(self, group: Any, sent: Any, planes: Any) -> None:
        rows = self._rows
        last = self._last
        geometry = (rows.num_places, last.num_places, rows.begin, rows.weight, rows.num_cells)
        along = (last.begin, last.weight, last.num_cells, *self._bins)
        blocks = (self._groups.homes, self._groups.bins)
        num_planes = math.prod(axis.num_places for axis in self._outer)
        num_parts = max(1, group.shape[1] // _MAX_PART)
        num_blocks = num_planes * num_parts * self._groups.num_groups
        arguments = (group, sent, *self._places, *geometry, *along, *blocks, planes)
        self._launch_blocks("splat_planes", group, num_blocks, *arguments)

    def _slice_tiles(self, planes: Any, output: Output) -> None:
        rows = self._rows
        last = self._last
        across = (rows.num_places, last.num_places, rows.first_cell, rows.reach, rows.num_cells)
        along = (last.first_cell, last.weight, last.num_cells, *self._bins)
        arguments = (planes, self._tiles, *self._places, *across, *along, *output)
        self._launch_blocks("slice_tiles", planes, int(self._tiles.size), *arguments)

    def _launch(self, kernel: str, rows: Any, num_rows: int, *arguments: Any) -> None:
        constants = {**row_constants(rows), "CRF_MODALITIES": len(self._size.bins)}
        self._device.launch("grid", kernel, constants, num_rows, rows, num_rows, *arguments)

    def _launch_blocks(self, kernel: str, rows: Any, num_blocks: int, *arguments: Any) -> None:
        constants = {
            **row_constants(rows),
            "CRF_MODALITIES": len(self._size.bins),
            "CRF_THREADS": _THREADS,
            "CRF_CELLS": self._size.shared_cells(rows.shape[1]),
        }
        self._device.launch_blocks("grid_voxels", kernel, constants, num_blocks, *arguments)
