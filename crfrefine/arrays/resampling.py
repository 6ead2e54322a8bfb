"""Where the voxels of a grid lie on another grid of the same world, and its values there: linear, cubic or of the nearest neighbor.

Along parallel axes, interpolating one axis after the other takes a tenth of the time of scipy's
general transformation, which does oblique grids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import permutations
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from crfrefine.arrays.probabilities import find_padding, find_ties
from crfrefine.base.limits import run_all

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.arrays.label_maps import Box
    from crfrefine.base.array_types import Array, Bool, Float32, Float64

    Number = TypeVar("Number", bound=np.generic)
    # (taps, n) ascending samples of n voxels, and their weights
    Taps = tuple[NDArray[np.intp], Float32]


# In voxels, as headers keep float32: a position this close below a tie or beyond an edge is on it.
POSITION_TOLERANCE = 1e-4
# In voxels: axes that drift apart by no more than this over the whole volume count as parallel.
TILT_TOLERANCE = 1e-4
# Weights of the samples at -1, 0, 1 and 2, a row each, as polynomials of the position from 0 to 1.
CATMULL_ROM = np.array([[0, -1, 2, -1], [2, 0, -5, 3], [0, 1, 4, -3], [0, 0, -1, 1]]) / 2


@dataclass(frozen=True)
class AxisMap:
    """Where the indices of one axis lie on the parallel axis of the other grid."""

    positions: Float64  # (n,) float64 index on the other grid, not limited to its samples
    size: int  # samples of the other grid along the axis

    @cached_property
    def inside(self) -> Bool:
        """(n,) True within half a voxel of the samples."""
        return _is_inside(self.positions, self.size)

    def nearest(self) -> NDArray[np.intp]:
        """Return the index of the nearest sample, (n,).

        Halfway between two, the one with the larger index.
        """
        return np.clip(
            np.floor(self.positions + (0.5 + POSITION_TOLERANCE)), 0, self.size - 1
        ).astype(np.intp)

    def taps(self, *, is_cubic: bool = False) -> Taps:
        """Return the samples that a value is interpolated from.

        The outermost samples go on beyond them.
        """
        clipped = np.clip(self.positions, 0, self.size - 1)
        below = np.minimum(np.floor(clipped), max(self.size - 2, 0)).astype(np.intp)
        upper = (clipped - below).astype(np.float32)
        if not is_cubic:
            return np.stack([below, np.minimum(below + 1, self.size - 1)]), np.stack(
                [np.float32(1) - upper, upper]
            )
        samples = np.clip(below + np.arange(-1, 3)[:, None], 0, self.size - 1)
        t = clipped - below
        powers = np.stack([np.ones_like(t), t, t**2, t**3])
        return samples, (CATMULL_ROM @ powers).astype(np.float32)


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
        """For each axis, the number of the parallel axis of the source.

        None if axes are oblique.
        """
        # A direct sum over six orders; the largest entries could name one axis twice.
        order = max(
            permutations(range(3)),
            key=lambda axes: sum(
                abs(self.matrix[source, axis]) for axis, source in enumerate(axes)
            ),
        )
        drift = np.abs(self.matrix) * (np.array(self.shape) - 1)
        for axis, source in enumerate(order):
            drift[source, axis] = 0.0
        if drift.sum(axis=1).max() <= TILT_TOLERANCE:
            return order
        return None

    def axis_maps(self, axes: Sequence[int]) -> tuple[AxisMap, ...]:
        """Return the map of each axis of a grid whose `source_axes` are `axes`."""
        return tuple(
            AxisMap(
                self.matrix[source, axis] * np.arange(self.shape[axis]) + self.offset[source],
                self.source_shape[source],
            )
            for axis, source in enumerate(axes)
        )

    def inside(self, plane: int) -> Bool:
        """Return where a plane of the grid lies on the source, within half a voxel of its samples: (y, x), True there."""
        y, x = np.ogrid[: self.shape[1], : self.shape[2]]
        inside: Bool = np.ones(self.shape[1:], np.bool_)
        for (along_z, along_y, along_x), start, size in zip(
            self.matrix, self.offset, self.source_shape, strict=True
        ):
            inside &= _is_inside(along_y * y + along_x * x + (along_z * plane + start), size)
        return inside

    @cached_property
    def num_inside(self) -> int:
        """Number of voxels that lie on the source."""
        axes = self.source_axes
        if axes is None:
            return sum(int(np.count_nonzero(self.inside(plane))) for plane in range(self.shape[0]))
        return int(np.prod([np.count_nonzero(axis.inside) for axis in self.axis_maps(axes)]))

    def source_spacing(self, spacing: Sequence[float]) -> tuple[float, ...]:
        """Return mm between samples of the source along each axis of the grid, at least those of the grid; both in the order x, y, z."""
        lengths = np.linalg.norm(self.matrix, axis=0)[::-1]
        return tuple(
            float(step / min(1.0, length)) for step, length in zip(spacing, lengths, strict=False)
        )

    @property
    def num_voxels(self) -> int:
        """Number of voxels of the grid."""
        return math.prod(self.shape)


class Interpolation:
    """Interpolation between grids with parallel axes, one axis after the other.

    Cubic is Catmull and Rom's: a value comes from four samples along each axis. The B-spline of
    order 3, which nnU-Net's export takes, depends on all samples of a line, and so does not go by
    tile. Both pass through the samples and are exact for quadratic functions.
    """

    def __init__(
        self, grid_map: GridMap, nearest: int | None = None, *, is_cubic: bool = False
    ) -> None:
        """Prepare to interpolate boxes along the axes of a grid map.

        Linearly or with cubic splines.
        """
        axes = grid_map.source_axes
        assert axes is not None
        self.grid_map = grid_map
        self.nearest = nearest
        self.axes = axes  # the axis of the source that is parallel to each axis of the grid to fill
        self.maps: tuple[AxisMap, ...] = grid_map.axis_maps(axes)
        # samples on either side of a voxel that its value comes from
        if is_cubic:
            self.reach = 2
        else:
            self.reach = 1
        self.taps = [axis.taps(is_cubic=is_cubic) for axis in self.maps]
        if nearest is not None:
            number = axes.index(nearest)
            slices = self.maps[number].nearest()[None]
            self.taps[number] = slices, np.ones(slices.shape, np.float32)

    def fill(self, source: Float32, target: Float32, planes: slice = slice(None)) -> None:
        """Write planes of a channel on the grid to fill, (z, y, x).

        Voxels outside of the source become 0.
        """
        inside = [
            np.flatnonzero(axis.inside[part])
            for axis, part in zip(self.maps, (planes, slice(None), slice(None)), strict=True)
        ]
        target[planes] = 0.0
        if all(part.size for part in inside):
            first = planes.start or 0
            depth, *plane = (slice(int(part[0]), int(part[-1]) + 1) for part in inside)
            box = (slice(depth.start + first, depth.stop + first), *plane)
            target[box] = self.of_box(lambda source_box: source[source_box], box)

    def of_box(self, read: Callable[[Box], Float32], box: Box) -> Float32:
        """Return the values of a box of the grid to fill.

        `read` returns those of a box of the source, in the source's order of axes.
        """
        source_box = [slice(0, 0)] * len(box)
        for axis, part, (samples, _) in zip(self.axes, box, self.taps, strict=True):
            source_box[axis] = slice(int(samples[0, part].min()), int(samples[-1, part].max()) + 1)
        values = read(tuple(source_box)).transpose(self.axes)
        for number in (2, 1, 0):
            samples, weights = self.taps[number]
            part = box[number]
            first = source_box[self.axes[number]].start
            total = None
            for sample, weight in zip(samples[:, part] - first, weights[:, part], strict=True):
                if (
                    weight.any()
                ):  # Weighted values and no differences, which may overflow for two finite values.
                    term = values.take(sample, axis=number)
                    if (weight != 1).any():
                        term *= weight.reshape(-1, *(1,) * (2 - number))
                    total = term if total is None else np.add(total, term, out=total)
            assert total is not None
            values = total
        return values


def map_grid(
    shape: Sequence[int], affine: Float64, source_shape: Sequence[int], source_affine: Float64
) -> GridMap:
    """Return where the voxels of a grid lie on another one.

    Shapes are voxels along x, y(, z), affines lead from voxels to world mm.
    """
    to_source = np.linalg.solve(
        _in_space(source_shape, source_affine), _in_space(shape, affine)
    ).astype(np.float64, copy=False)
    return GridMap(
        _stored(shape),
        _stored(source_shape),
        to_source[2::-1, 2::-1].copy(),
        to_source[2::-1, 3].copy(),
    )


def _is_inside(positions: Float64, size: int) -> Bool:
    inside: Bool = (positions >= -0.5 - POSITION_TOLERANCE) & (
        positions <= size - 0.5 + POSITION_TOLERANCE
    )
    return inside


def _in_space(shape: Sequence[int], affine: Array) -> Float64:
    """Return the affine.

    That of a plane with a slice 1 mm thick at right angles, whatever the file says about an axis it
    lacks.
    """
    full = np.array(affine, np.float64)
    if len(shape) < 3:
        normal = np.cross(full[:3, 0], full[:3, 1])
        full[:3, 2] = normal / np.linalg.norm(normal)
    return full


def _stored(shape: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = [*shape, 1][:3]
    return int(z), int(y), int(x)


JOB_VOXELS = 1 << 22  # voxels of one job: several threads may share a single channel
# Of a score: a few roundings in float32, far below anything that counts.
_TIE_STEP = np.float32(1e-6)


def interpolation_jobs(
    grid_map: GridMap, source: Float32, target: Float32, *, is_cubic: bool = False
) -> list[Callable[[], None]]:
    """Return the jobs that interpolate channels.

    They may run at the same time, in any order, with the same result.
    """
    # The target, (channels, [z,] y, x), gets the value at the edge up to half a voxel beyond it,
    # then 0.
    sources = source.reshape(-1, *grid_map.source_shape)
    targets = target.reshape(-1, *grid_map.shape)
    step = max(1, JOB_VOXELS // (grid_map.shape[1] * grid_map.shape[2]))
    parts = [
        slice(start, min(start + step, grid_map.shape[0]))
        for start in range(0, grid_map.shape[0], step)
    ]
    if grid_map.source_axes is None:
        # Cubic is the B-spline here.
        fill: Callable[..., None] = partial(_fill_oblique, grid_map, 3 if is_cubic else 1)
    else:
        fill = Interpolation(grid_map, is_cubic=is_cubic).fill
    return [
        partial(fill, *pair, part) for pair in zip(sources, targets, strict=True) for part in parts
    ]


def nearest(grid_map: GridMap, source: NDArray[Number]) -> NDArray[Number]:
    """Return the value of the nearest sample at each voxel, ([z,] y, x) of the source's type.

    0 outside the source.
    """
    # Halfway between two samples, the larger index counts; outside is half a voxel beyond the
    # outermost.
    stored = source.reshape(grid_map.source_shape)
    target = np.zeros(grid_map.shape, source.dtype)
    axes = grid_map.source_axes
    if axes is not None:
        maps = grid_map.axis_maps(axes)
        inside = [np.flatnonzero(axis.inside) for axis in maps]
        found = [axis.nearest()[indices] for axis, indices in zip(maps, inside, strict=True)]
        target[np.ix_(*inside)] = stored.transpose(axes)[np.ix_(*found)]
        return target
    last = np.array(grid_map.source_shape) - 1
    for plane in range(grid_map.shape[0]):
        y, x = np.nonzero(grid_map.inside(plane))
        at = np.stack([np.full_like(y, plane), y, x], axis=1) @ grid_map.matrix.T + grid_map.offset
        z_found, y_found, x_found = (
            np.clip(np.floor(at + (0.5 + POSITION_TOLERANCE)), 0, last).astype(np.intp).T
        )
        target[plane, y, x] = stored[z_found, y_found, x_found]
    return target


def resample_logits(
    grid_map: GridMap, source: Float32, target: Float32, *, is_cubic: bool = False, threads: int = 1
) -> None:
    """Interpolate logits, so that all labels are equal only outside the source and where only its padding contributes."""
    # Padding, whatever its constant, becomes 0 in the source: the scores fade out over one voxel of
    # it.
    padding = find_padding(source)
    for channel in source if padding is not None else ():
        channel[padding] = 0.0
    run_all(interpolation_jobs(grid_map, source, target, is_cubic=is_cubic), threads)
    tied = find_ties(target)
    may_overshoot = is_cubic and padding is not None
    if tied is None and not may_overshoot:
        return
    if padding is None:
        has_scores = np.ones((1, *source.shape[1:]), np.float32)
    else:
        has_scores = (~padding)[np.newaxis].astype(np.float32)
    share_of_scores = np.empty((1, *target.shape[1:]), np.float32)
    run_all(interpolation_jobs(grid_map, has_scores, share_of_scores), threads)
    if may_overshoot:  # Cubic values reach one voxel further into padding than linear ones.
        for channel in target:
            channel[share_of_scores[0] == 0] = 0.0
    if tied is None:
        return
    # Scores of 8 or 16 bits meet by chance in a few of a million voxels, which are not padding.
    tied &= share_of_scores[0] > 0
    equal = target[0][tied]
    target[0][tied] = equal + _TIE_STEP * np.maximum(np.abs(equal), np.float32(1))


def _fill_oblique(
    grid_map: GridMap, order: int, source: Float32, target: Float32, part: slice
) -> None:
    """Fill some planes."""
    from scipy.ndimage import affine_transform

    filled = target[part]
    offset = grid_map.offset + grid_map.matrix[:, 0] * part.start
    affine_transform(
        source, grid_map.matrix, offset, filled.shape, output=filled, order=order, mode="nearest"
    )
    for z in range(part.start, part.stop):
        target[z][~grid_map.inside(z)] = 0.0
