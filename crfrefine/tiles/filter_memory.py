"""Memory of the CPU engine's filters, from sizes alone; `crfrefine.tiles.estimate` adds up a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from crfrefine.specs import KernelSpec

_FLOAT = 4
_LANES = 16
HUGE_PAGE = 1 << 21

_WINDOW_RADIUS = 3.0
"""Reach of the truncated sum in bandwidths, kTruncationRadius."""
_CELLS_OF_SPLINE = 4
_GRID_BATCH = 1 << 22
"""Floats of planes that are splatted at once, kBatchFloats."""
_USUAL_RANGE = (-0.5, 1.5)
_MOST_CORNERS_OF_SHORT_KEYS = 8
"""Beyond seven features, and rarely before, the vertices' keys need more than 64 bits."""
_CORNERS_OF_LONG_LISTS = 8
"""From seven features on a quarter as many vertices as voxels are enough for chains of lists, are_lists_worth_it."""
_TILE_SCRATCH = 3 << 20
"""Largest table and buffers of a lattice's tile, per thread."""


@dataclass(frozen=True)
class Problem:
    """What the memory of a filter depends on.

    Attributes:
        num_voxels: voxels inside the mask.
        box_shape: extent of their bounding box, in memory order.
        distances: between neighboring voxels along each axis, in the unit of the bandwidths.
        num_modalities: M.
        intensity_ranges: lowest and highest intensity of each modality; empty: the usual ones.
        vertices_per_voxel: of the lattice, counted in each tile; None: the most there can be.
        num_cells: of the grid; None: as many as the ranges take.
        threads: CPU threads.
    """

    num_voxels: int
    box_shape: tuple[int, ...]
    distances: tuple[float, ...]
    num_modalities: int
    intensity_ranges: tuple[tuple[float, float], ...] = ()
    vertices_per_voxel: float | None = None
    num_cells: float | None = None
    threads: int = 1


@dataclass(frozen=True)
class FilterMemory:
    """Bytes of a filter.

    Attributes:
        kept: as long as the filter exists.
        working: beside it while it filters all channels.
        normalizing: beside it while it filters one channel.
        building: the most while it is built, what is kept included.
        in_heap: of what is kept and works, arrays that stay with the process when they are freed.
        is_lattice: whether it is a lattice.
    """

    kept: int
    working: int
    normalizing: int
    building: int
    in_heap: int
    is_lattice: bool = False


def in_buffer(size: float) -> int:
    """Return the bytes of an array of a filter: large ones may be blocks that were used before, which are whole huge pages."""
    size = int(size)
    return size if size < 2 * HUGE_PAGE else -(-size // HUGE_PAGE) * HUGE_PAGE


def left_in_heap(*sizes: float) -> int:
    """Return the bytes of arrays that stay with the process after they are freed: only large arrays are memory of the system itself."""
    return sum(int(size) for size in sizes if size < 2 * HUGE_PAGE)


def filter_memory(name: str, problem: Problem, kernel: KernelSpec, num_channels: int) -> FilterMemory:
    """Return the memory of a filter: "truncated", "grid", "lattice", "exact" or "spatial".

    Args:
        name: the filter.
        problem: the sizes.
        kernel: its bandwidths.
        num_channels: channels that are filtered.
    """
    if name == "truncated":
        return _truncated(problem, kernel, num_channels)
    if name == "grid":
        return _grid(problem, kernel)
    if name == "lattice":
        return _lattice(problem, num_channels)
    if name == "exact":
        features = in_buffer(_FLOAT * problem.num_voxels * (problem.num_modalities + len(problem.box_shape)))
        return FilterMemory(features, 0, 0, features, left_in_heap(features))
    box = in_buffer(_FLOAT * math.prod(problem.box_shape))
    return FilterMemory(0, box, box, 0, left_in_heap(box))


def _truncated(problem: Problem, kernel: KernelSpec, num_channels: int) -> FilterMemory:
    """Padded copies of the intensities, and of the values sent and received of up to four channels."""
    reach = [
        min(int(_WINDOW_RADIUS * theta / distance + 1e-6), size - 1)
        for theta, distance, size in zip(kernel.theta_position, problem.distances, problem.box_shape, strict=True)
    ]
    padded = [size + radius for size, radius in zip(problem.box_shape, reach, strict=True)]
    padded[-1] = -(-padded[-1] // _LANES) * _LANES
    # Voxels at the end reach beyond it, by a row and a plane for each voxel of the reach.
    size = (
        math.prod(padded)
        + 2 * padded[-1]
        + 2 * _LANES
        + sum(radius * math.prod(padded[axis + 1 :]) for axis, radius in enumerate(reach) if axis)
    )
    width = 4 if num_channels >= 3 else num_channels
    intensities, pairs = in_buffer(_FLOAT * problem.num_modalities * size), math.prod(padded) // 2
    kept, working = intensities + pairs, in_buffer(_FLOAT * 2 * width * size)
    return FilterMemory(kept, working, in_buffer(_FLOAT * 2 * size), kept, left_in_heap(intensities, pairs, working))


def _grid(problem: Problem, kernel: KernelSpec) -> FilterMemory:
    """The cells of one channel, and a batch of planes that are added to them."""
    ranges = problem.intensity_ranges or (_USUAL_RANGE,) * problem.num_modalities
    cells = [
        int((size - 1) * distance / theta) + _CELLS_OF_SPLINE
        for theta, distance, size in zip(kernel.theta_position, problem.distances, problem.box_shape, strict=True)
    ]
    bins = [
        int((high - low) / theta) + _CELLS_OF_SPLINE + 1 for (low, high), theta in zip(ranges, kernel.theta_intensity or (), strict=True)
    ]
    row = -(-cells[-1] * math.prod(bins) // _LANES) * _LANES
    plane = row * math.prod(cells[1:-1]) if problem.num_cells is None else int(problem.num_cells / cells[0])
    batch = min(max(_GRID_BATCH // plane, 8), problem.box_shape[0])
    kept = problem.threads * _FLOAT * (2 * plane + 4 * row)
    working = in_buffer(_FLOAT * (cells[0] * plane + batch * plane))
    per_thread = kept // problem.threads
    return FilterMemory(kept, working, working, kept, left_in_heap(*[per_thread] * problem.threads, working))


def _lattice(problem: Problem, num_channels: int) -> FilterMemory:
    """Corners of the voxels, vertices with their neighbors, and rows of values.

    The tiles have R vertices, V of them different. S are in several tiles, and take a row for each of these beside their own: with
    S <= min(V, R - V), there are R + S rows. Lattices with more than two vertices per voxel filter two channels at a time, not four.
    Neighbors are counted as if every vertex had one in each direction. With AVX-512, lattices with many vertices have chains of lists of
    vertices, at most one list per vertex, and two bits per vertex and direction; beyond four vertices per voxel, they filter two channels
    at a time. The larger of both is counted, so that an estimate holds for every processor.
    """
    voxels, corners = problem.num_voxels, problem.num_modalities + len(problem.box_shape) + 1
    records = int(min(problem.vertices_per_voxel or corners, corners) * voxels)
    key = 8 if corners <= _MOST_CORNERS_OF_SHORT_KEYS else 16
    pieces = voxels // 8  # Rows of at most 16 voxels, which a mask cuts.
    of_voxels = 2 * in_buffer(2 * corners * voxels) + 16 * pieces
    places = 2 * in_buffer(4 * records)
    in_tiles = problem.threads * _TILE_SCRATCH

    def neighbors(vertices: float) -> int:
        return corners * in_buffer(4 * vertices)

    def lists(vertices: float) -> int:
        return corners * (in_buffer(4 * vertices) + 2 * in_buffer(vertices / 8)) + in_buffer(4 * vertices)

    def in_steps(vertices: float, channels: int) -> tuple[int, int]:
        shared = min(vertices, records - vertices)
        width = 4 if channels >= 3 else channels
        kept = of_voxels + places + int(12 * shared)

        def with_rows(of_neighbors: int, most: int) -> tuple[int, int]:
            return kept + of_neighbors, in_buffer(_FLOAT * min(width, most) * (records + shared)) + in_tiles

        chained = with_rows(neighbors(vertices), 2 if vertices > 2 * voxels else 4)
        if vertices <= (voxels / 4 if corners >= _CORNERS_OF_LONG_LISTS else voxels):
            return chained
        return max(chained, with_rows(lists(vertices), 2 if vertices > 4 * voxels else 4), key=sum)

    # Between these numbers of vertices everything is linear.
    cases = [vertices for vertices in (records / 2, 2.0 * voxels, 4.0 * voxels, float(records)) if records / 2 <= vertices <= records]
    kept, working = max((in_steps(vertices, num_channels) for vertices in cases), key=sum)
    normalizing = max(in_steps(vertices, 1)[1] for vertices in cases)
    building = max(
        56 * pieces + (2 * key + 8) * records,  # tiles: keys, and the same sorted by block, with the place of each
        (key + 8) * records + key * records,  # merged: keys and numbers, and the keys of the vertices
        8 * records + (key + 12 + 5 + 4) * records + neighbors(records),  # neighbors: tables, marks, the list of one direction, all lists
        8 * records + places + neighbors(records),  # the place of each tile's share
    )
    # One list of neighbors per direction, of half of the records to all of them.
    of_direction = min(4 * records, 2 * HUGE_PAGE - 1) if records < HUGE_PAGE else 0
    in_heap = left_in_heap(*[2 * corners * voxels, 4 * records] * 2, 16 * pieces, *[of_direction] * corners, working - in_tiles)
    return FilterMemory(kept, working, normalizing, of_voxels + building + in_tiles, in_heap, is_lattice=True)
