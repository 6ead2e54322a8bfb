"""Where the voxels of a grid lie on another grid of the same world, and its values there.

Values are those of the nearest neighbor, or linear or cubic interpolation. Along parallel axes,
interpolating one axis after the other takes a tenth of the time of scipy's general transformation,
which does oblique grids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import permutations, product
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from crfrefine.arrays.padding import find_padding
from crfrefine.arrays.probabilities import find_ties
from crfrefine.base.geometry import GRID_TOLERANCE
from crfrefine.base.limits import run_all

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.arrays.label_maps import Box
    from crfrefine.base.array_types import Array, Bool, Float32, Float64

    Number = TypeVar("Number", bound=np.generic)
    # (taps, n) ascending samples of n voxels, and their weights
    Taps = tuple[NDArray[np.intp], Float32]


# A position so few voxels below a tie or beyond an edge counts as on it: headers keep float32.
POSITION_TOLERANCE = 1e-4
# Axes that drift apart by at most so many voxels over the whole volume count as parallel.
TILT_TOLERANCE = 1e-4
# Weights of the samples at -1, 0, 1 and 2, a row each, as polynomials of the position from 0 to 1.
CATMULL_ROM = np.array([[0, -1, 2, -1], [2, 0, -5, 3], [0, 1, 4, -3], [0, 0, -1, 1]]) / 2


@dataclass(frozen=True, eq=False)
class GridMap:
    """Where the voxels of a grid lie on another one, the source.

    Axes are in storage order, (z, y, x); planes have one slice.
    """

    shape: tuple[int, int, int]  # voxels of the grid to fill, (z, y, x)
    source_shape: tuple[int, int, int]  # voxels of the source, (z, y, x)
    matrix: Float64  # (3, 3) index on the source = matrix @ index + offset
    offset: Float64  # (3,) see `matrix`

    @cached_property
    def source_axes(self) -> tuple[int, ...] | None:
        """The axis of the source that is parallel to each axis; None if axes are oblique."""
        sizes = np.abs(self.matrix)

        def alignment(source_axes: tuple[int, ...]) -> float:
            return float(sum(sizes[source, axis] for axis, source in enumerate(source_axes)))

        # All six orders are compared: the largest entries of two columns could be in one row.
        order = max(permutations(range(3)), key=alignment)
        drift = sizes * (np.array(self.shape) - 1)
        for axis, source in enumerate(order):
            drift[source, axis] = 0.0
        if drift.sum(axis=1).max() <= TILT_TOLERANCE:
            return order
        return None

    @cached_property
    def positions(self) -> tuple[Float64, ...]:
        """Along each axis, the voxels' indices on the parallel axis of the source."""
        assert self.source_axes is not None
        positions = []
        for axis, source in enumerate(self.source_axes):
            step = self.matrix[source, axis]
            positions.append(step * np.arange(self.shape[axis]) + self.offset[source])
        return tuple(positions)

    @cached_property
    def inside_along(self) -> tuple[Bool, ...]:
        """Along each axis, which voxels are within half a voxel of the source's parallel axis."""
        assert self.source_axes is not None
        sizes = [self.source_shape[source] for source in self.source_axes]
        return tuple(map(_is_inside, self.positions, sizes))

    @property
    def nearest_along(self) -> tuple[NDArray[np.intp], ...]:
        """Along each axis, the index of the nearest sample; of two equally near, the larger."""
        assert self.source_axes is not None
        last = [self.source_shape[source] - 1 for source in self.source_axes]
        return tuple(map(_nearest_sample, self.positions, last))

    def taps_along(self, *, is_cubic: bool) -> list[Taps]:
        """Return the samples and weights of each value along each axis.

        Beyond the edge, the outermost samples count.
        """
        assert self.source_axes is not None
        taps: list[Taps] = []
        for source, positions in zip(self.source_axes, self.positions, strict=True):
            last = self.source_shape[source] - 1
            clipped = np.clip(positions, 0, last)
            below = np.floor(clipped).astype(np.intp)
            below = np.minimum(below, max(last - 1, 0))
            fraction = clipped - below
            if is_cubic:
                neighbors = below + np.arange(-1, 3)[:, None]
                powers = np.stack([np.ones_like(fraction), fraction, fraction**2, fraction**3])
                weights = (CATMULL_ROM @ powers).astype(np.float32)
                taps.append((np.clip(neighbors, 0, last), weights))
            else:
                samples = np.stack([below, np.minimum(below + 1, last)])
                upper = fraction.astype(np.float32)
                taps.append((samples, np.stack([np.float32(1) - upper, upper])))
        return taps

    def inside(self, plane: int) -> Bool:
        """Return (y, x), True where a plane of the grid is within half a voxel of the source."""
        _, height, width = self.shape
        y, x = np.ogrid[:height, :width]
        inside: Bool = np.ones((height, width), np.bool_)
        for axis, size in enumerate(self.source_shape):
            along_z, along_y, along_x = self.matrix[axis]
            of_plane = along_z * plane + self.offset[axis]
            inside &= _is_inside(along_y * y + along_x * x + of_plane, size)
        return inside

    def all_inside(self) -> Bool:
        """Return (z, y, x), True where a voxel is within half a voxel of the source."""
        if self.source_axes is None:
            return np.stack([self.inside(plane) for plane in range(self.shape[0])])
        planes, rows, columns = self.inside_along
        inside: Bool = planes[:, None, None] & rows[:, None] & columns
        return inside

    @cached_property
    def num_inside(self) -> int:
        """Number of voxels that lie on the source."""
        if self.source_axes is None:
            planes = (self.inside(plane) for plane in range(self.shape[0]))
            return sum(int(np.count_nonzero(plane)) for plane in planes)
        return math.prod(int(np.count_nonzero(line)) for line in self.inside_along)

    @cached_property
    def in_whole_voxels(self) -> GridMap | None:
        """This map in whole numbers, if voxels of both grids are at the same places; else None.

        Both have the same axes, perhaps exchanged or mirrored, and the same spacing. Places are
        compared at the corners of the source.
        """
        matrix = self.matrix.copy()
        for axis, size in enumerate(self.shape):
            if size == 1:  # A step along it leads nowhere, and a plane may have any thickness.
                matrix[:, axis] /= np.abs(matrix[:, axis]).max()
        whole = GridMap(self.shape, self.source_shape, np.rint(matrix), np.rint(self.offset))
        steps = np.abs(whole.matrix)
        if (steps.sum(axis=0) != 1).any() or (steps.sum(axis=1) != 1).any():
            return None
        corners = np.array(list(product(*({0, size - 1} for size in self.source_shape))))
        voxels = (corners - whole.offset) @ whole.matrix
        distances = voxels @ matrix.T + self.offset - corners
        if np.abs(distances).max() > GRID_TOLERANCE:
            return None
        return whole

    def source_spacing(self, spacing: Sequence[float]) -> tuple[float, ...]:
        """Return mm between samples of the source along each axis of the grid, in order x, y, z.

        Args:
            spacing: mm between voxels of the grid, x, y, z; the result is at least that.
        """
        lengths = np.linalg.norm(self.matrix, axis=0)[::-1]
        steps = zip(spacing, lengths, strict=False)  # A plane has no spacing along z.
        return tuple(float(step / min(1.0, length)) for step, length in steps)

    @property
    def num_voxels(self) -> int:
        """Number of voxels of the grid."""
        return math.prod(self.shape)


class Interpolation:
    """Interpolation between grids with parallel axes, one axis after the other.

    Cubic is Catmull and Rom's: a value comes from four samples along each axis. The B-spline of
    order 3, which nnU-Net's export takes, depends on all samples of a line, and thus does not work
    tile by tile. Both pass through the samples and are exact for quadratic functions.
    """

    def __init__(
        self, grid_map: GridMap, nearest: int | None = None, *, is_cubic: bool = False
    ) -> None:
        """Prepare to interpolate boxes along the axes of a grid map, linearly or with cubics.

        Args:
            grid_map: the grid to fill and the source.
            nearest: the axis of the source along which values are those of the nearest sample.
            is_cubic: along the other axes, Catmull and Rom's cubics take the place of lines.
        """
        axes = grid_map.source_axes
        assert axes is not None
        self.grid_map = grid_map
        self.nearest = nearest
        self.axes = axes  # the axis of the source that is parallel to each axis of the grid to fill
        # samples on either side of a voxel that its value comes from
        self.reach = 2 if is_cubic else 1
        self.taps = grid_map.taps_along(is_cubic=is_cubic)
        if nearest is not None:
            number = axes.index(nearest)
            samples = grid_map.nearest_along[number][None]
            self.taps[number] = samples, np.ones(samples.shape, np.float32)

    def fill(self, source: Float32, target: Float32, planes: slice = slice(None)) -> None:
        """Write planes of a channel on the grid to fill, (z, y, x); 0 outside of the source."""
        target[planes] = 0.0
        first = planes.start or 0
        along_z, along_y, along_x = self.grid_map.inside_along
        inside = [np.flatnonzero(part) for part in (along_z[planes], along_y, along_x)]
        if not all(part.size for part in inside):
            return

        inside[0] += first
        box = tuple(_span(part[0], part[-1]) for part in inside)
        target[box] = self.of_box(source.__getitem__, box)

    def of_box(self, read: Callable[[Box], Float32], box: Box) -> Float32:
        """Return the values of a box of the grid to fill, (z, y, x).

        Args:
            read: returns the values of a box of the source, in the source's order of axes.
            box: the voxels to fill, within those inside the source.
        """
        source_box = [slice(0, 0)] * len(box)
        for axis, part, (samples, _) in zip(self.axes, box, self.taps, strict=True):
            first = samples[0, part].min()
            last = samples[-1, part].max()
            source_box[axis] = _span(first, last)
        values = read(tuple(source_box)).transpose(self.axes)

        for number, later_axes in ((2, ()), (1, (1,)), (0, (1, 1))):
            samples, weights = self.taps[number]
            part = box[number]
            first = source_box[self.axes[number]].start
            # Weighted values are added and not differences, which may overflow for two finite
            # values.
            total: Float32 | None = None
            for sample, weight in zip(samples[:, part] - first, weights[:, part], strict=True):
                if not weight.any():
                    continue
                term = values.take(sample, axis=number)
                if (weight != 1).any():
                    term *= weight.reshape(-1, *later_axes)
                if total is None:
                    total = term
                else:
                    total += term
            assert total is not None
            values = total
        return values


def _span(first: np.intp, last: np.intp) -> slice:
    return slice(int(first), int(last) + 1)


def map_grid(
    shape: Sequence[int], affine: Float64, source_shape: Sequence[int], source_affine: Float64
) -> GridMap:
    """Return where the voxels of a grid lie on another one.

    Shapes are voxels along x, y(, z), affines lead from voxels to world mm.
    """
    from_source = _in_space(source_shape, source_affine)
    to_source = np.linalg.solve(from_source, _in_space(shape, affine))
    matrix = to_source[2::-1, 2::-1].astype(np.float64)
    offset = to_source[2::-1, 3].astype(np.float64)
    return GridMap(stored_sizes(shape), stored_sizes(source_shape), matrix, offset)


def _is_inside(positions: Float64, size: int) -> Bool:
    """Return which positions are within half a voxel of the samples of an axis."""
    is_above = positions >= -0.5 - POSITION_TOLERANCE
    is_below = positions <= size - 0.5 + POSITION_TOLERANCE
    return is_above & is_below


def _nearest_sample(positions: Float64, last: int | NDArray[np.intp]) -> NDArray[np.intp]:
    """Return the index of the sample nearest to each position, at most the last."""
    rounded = np.floor(positions + (0.5 + POSITION_TOLERANCE))
    return np.clip(rounded, 0, last).astype(np.intp)


def _in_space(shape: Sequence[int], affine: Array) -> Float64:
    """Return the affine, in which a plane has a slice 1 mm thick at right angles to it.

    Files may say anything about the axis that a plane lacks.
    """
    full = np.array(affine, np.float64)
    if len(shape) < 3:
        along_x, along_y, _ = full[:3, :3].T
        normal = np.cross(along_x, along_y)
        full[:3, 2] = normal / np.linalg.norm(normal)
    return full


def stored_sizes(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return voxels along z, y, x from those along x, y(, z); a plane has one slice."""
    x, y, z = [*shape, 1][:3]
    return int(z), int(y), int(x)


JOB_VOXELS = 1 << 22  # voxels of one job: several threads may share a single channel
# Relative step that breaks a tie: a few roundings in float32, far below anything that counts.
_TIE_STEP = np.float32(1e-6)


def interpolation_jobs(
    grid_map: GridMap, source: Float32, target: Float32, *, is_cubic: bool = False
) -> list[Callable[[], None]]:
    """Return the jobs that interpolate channels, each from some planes of one of them.

    The jobs may run at the same time, in any order, with the same result. The target,
    (channels, [z,] y, x), gets the value at the edge up to half a voxel beyond it, then 0.
    Oblique grids take the B-spline of order 3 as the cubic interpolation.
    """
    if grid_map.source_axes is None:
        fill: Callable[..., None] = partial(_fill_oblique, grid_map, 3 if is_cubic else 1)
    else:
        fill = Interpolation(grid_map, is_cubic=is_cubic).fill

    sources = source.reshape(-1, *grid_map.source_shape)
    targets = target.reshape(-1, *grid_map.shape)
    depth, height, width = grid_map.shape
    step = max(1, JOB_VOXELS // (height * width))
    jobs: list[Callable[[], None]] = []
    for channel, filled in zip(sources, targets, strict=True):
        for start in range(0, depth, step):
            planes = slice(start, min(start + step, depth))
            jobs.append(partial(fill, channel, filled, planes))
    return jobs


def nearest(grid_map: GridMap, source: NDArray[Number]) -> NDArray[Number]:
    """Return the value of the nearest sample at each voxel, ([z,] y, x) of the source's type.

    Halfway between two samples, the one with the larger index counts. More than half a voxel
    beyond the outermost samples, the value is 0.
    """
    stored = source.reshape(grid_map.source_shape)
    target = np.zeros(grid_map.shape, source.dtype)
    axes = grid_map.source_axes
    if axes is not None:
        along = grid_map.inside_along
        samples_along = []
        for of_axis, inside in zip(grid_map.nearest_along, along, strict=True):
            samples_along.append(of_axis[inside])
        target[np.ix_(*along)] = stored.transpose(axes)[np.ix_(*samples_along)]
        return target

    last = np.array(grid_map.source_shape) - 1
    for plane in range(grid_map.shape[0]):
        y, x = np.nonzero(grid_map.inside(plane))
        z = np.full_like(y, plane)
        voxels = np.stack([z, y, x], axis=1)
        positions = voxels @ grid_map.matrix.T + grid_map.offset
        samples = tuple(_nearest_sample(positions, last).T)
        target[plane, y, x] = stored[samples]
    return target


def count_outside(grid_map: GridMap, values: NDArray[Number]) -> int:
    """Return how many voxels of the grid, ([z,] y, x), that are not 0 lie outside the source."""
    planes = values.reshape(grid_map.shape)
    if grid_map.source_axes is not None:
        inside = np.ix_(*grid_map.inside_along)
        return int(np.count_nonzero(planes) - np.count_nonzero(planes[inside]))
    outside = (plane[~grid_map.inside(z)] for z, plane in enumerate(planes))
    return sum(int(np.count_nonzero(part)) for part in outside)


def resample_logits(
    grid_map: GridMap,
    source: Float32,
    target: Float32,
    *,
    are_regions: bool = False,
    is_cubic: bool = False,
    threads: int = 1,
) -> Bool:
    """Interpolate logits, (L, [z,] y, x), or log-odds of regions; return where nothing was seen.

    The padding of the source becomes 0. The result, ([z,] y, x), is True outside of the source, and
    where nothing but its padding contributes; all labels are equal only there. The scores fade out
    over one voxel of padding.
    """
    padding = find_padding(source, are_regions=are_regions)
    if padding is not None:
        for channel in source:
            channel[padding] = 0.0
    run_all(interpolation_jobs(grid_map, source, target, is_cubic=is_cubic), threads)

    unseen: Bool = ~grid_map.all_inside().reshape(target.shape[1:])
    tied = None if are_regions else find_ties(target)
    if padding is not None:
        has_scores = np.where(padding, np.float32(0), np.float32(1))
        share_of_scores = np.empty(target.shape[1:], np.float32)
        run_all(interpolation_jobs(grid_map, has_scores, share_of_scores), threads)
        unseen = share_of_scores == 0
        if is_cubic:  # Cubic values reach one voxel further into padding than linear ones.
            for channel in target:
                channel[unseen] = 0.0
    if tied is not None:
        # Chance ties of 8- or 16-bit scores, in a few voxels of a million, are no padding.
        tied &= ~unseen
        background = target[0]
        scores = background[tied]
        magnitudes = np.maximum(np.abs(scores), np.float32(1))
        background[tied] = scores + _TIE_STEP * magnitudes
    return unseen


# Least share of the samples behind a voxel of an image that are numbers, for it to be one: weights
# below `POSITION_TOLERANCE` do not count.
_MIN_SHARE = 1.0 - 10 * POSITION_TOLERANCE


def resample_image(
    grid_map: GridMap, source: Float32, target: Float32, *, threads: int = 1
) -> None:
    """Interpolate images linearly, (channels, [z,] y, x), which may have voxels that are NaN.

    The target is NaN outside of the source, and where a sample that counts is NaN. NaN becomes 0 in
    the source.
    """
    for channel, filled in zip(source, target, strict=True):
        is_nan = np.isnan(channel)
        has_nan = bool(is_nan.any())
        if has_nan:
            channel[is_nan] = 0.0
        run_all(interpolation_jobs(grid_map, channel[None], filled[None]), threads)
        if has_nan:
            share = np.empty_like(filled)
            is_number = np.where(is_nan, np.float32(0), np.float32(1))
            run_all(interpolation_jobs(grid_map, is_number, share), threads)
            is_known = share >= _MIN_SHARE
            np.divide(filled, share, out=filled, where=is_known)
            filled[~is_known] = np.nan
    if grid_map.num_inside < grid_map.num_voxels:
        target[:, ~grid_map.all_inside().reshape(target.shape[1:])] = np.nan


def _fill_oblique(
    grid_map: GridMap, order: int, source: Float32, target: Float32, planes: slice
) -> None:
    """Write some planes of a channel, (z, y, x), with splines of an order; 0 outside the source."""
    from scipy.ndimage import affine_transform

    filled = target[planes]
    matrix = grid_map.matrix
    offset = grid_map.offset + matrix[:, 0] * planes.start
    affine_transform(
        source, matrix, offset, filled.shape, output=filled, order=order, mode="nearest"
    )
    for z in range(planes.start, planes.stop):
        target[z][~grid_map.inside(z)] = 0.0
