"""Values of one grid at the voxels of another: linear for scores and images, nearest neighbor for labels. Which voxels: `grid_map`.

Axes are parallel as a rule; there, interpolating one axis after the other takes an eighth to a twelfth of the time of scipy's general
transformation, which does oblique grids.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from crfrefine.arrays.grid_map import POSITION_TOLERANCE, AxisMap, GridMap
from crfrefine.arrays.padding import find_padding
from crfrefine.base.parallel import run_all

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.base.array_types import Float32

    Number = TypeVar("Number", bound=np.generic)

JOB_VOXELS = 1 << 22
"""Voxels of one job: enough that starting it costs nothing, few enough that several threads share a single channel."""

_TIE_STEP = np.float32(1e-6)
"""Of a score: a few roundings in float32, far below anything that counts."""


def linear_jobs(grid_map: GridMap, source: Float32, target: Float32) -> list[Callable[[], None]]:
    """Return the jobs that interpolate channels linearly; they may run at the same time, in any order, with the same result.

    The target, (channels, [z,] y, x) C-contiguous, is written to. Voxels up to half a voxel beyond the outermost samples get the value
    at the edge, those farther out 0.
    """
    sources = source.reshape(-1, *grid_map.source_shape)
    targets = target.reshape(-1, *grid_map.shape)
    step = max(1, JOB_VOXELS // (grid_map.shape[1] * grid_map.shape[2]))
    parts = [slice(start, min(start + step, grid_map.shape[0])) for start in range(0, grid_map.shape[0], step)]
    axes = grid_map.source_axes
    if axes is None:
        return [partial(_linear_oblique, grid_map, *pair, part) for pair in zip(sources, targets, strict=True) for part in parts]
    maps = grid_map.axis_maps(axes)
    return [
        partial(_linear_aligned, maps, channel.transpose(axes), filled, part)
        for channel, filled in zip(sources, targets, strict=True)
        for part in parts
    ]


def nearest(grid_map: GridMap, source: NDArray[Number]) -> NDArray[Number]:
    """Return the value of the nearest sample at each voxel, ([z,] y, x) of the source's type; 0 outside the source.

    Halfway between two samples, the one with the larger index counts. A point is outside if it is more than half a voxel beyond the
    outermost samples.
    """
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
        z_found, y_found, x_found = np.clip(np.floor(at + (0.5 + POSITION_TOLERANCE)), 0, last).astype(np.intp).T
        target[plane, y, x] = stored[z_found, y_found, x_found]
    return target


def resample_logits(grid_map: GridMap, source: Float32, target: Float32, *, threads: int = 1) -> None:
    """Interpolate logits linearly, so that all labels are equal only outside the source and where only its padding contributes.

    Padding next to scores counts as 0 for all labels, whatever its constant was, and is set to 0 in the source: the scores fade out over
    one voxel of it. If any labels are equal, a further channel is needed for a moment.
    """
    padding = find_padding(source)
    for channel in source if padding is not None else ():
        channel[padding] = 0.0
    run_all(linear_jobs(grid_map, source, target), threads)
    tied = find_padding(target)
    if tied is None:
        return
    has_scores = np.ones((1, *source.shape[1:]), np.float32) if padding is None else (~padding)[np.newaxis].astype(np.float32)
    share_of_scores = np.empty((1, *target.shape[1:]), np.float32)
    run_all(linear_jobs(grid_map, has_scores, share_of_scores), threads)
    # Scores of 8 or 16 bits meet by chance in a few of a million voxels, which are not padding.
    tied &= share_of_scores[0] > 0
    equal = target[0][tied]
    target[0][tied] = equal + _TIE_STEP * np.maximum(np.abs(equal), np.float32(1))


def _linear_aligned(maps: tuple[AxisMap, ...], source: Float32, target: Float32, part: slice) -> None:
    """Fill some planes. A plane of the source is interpolated along x and y once, and used by all planes that it is a neighbor of."""
    (below, above, weights), along_y, along_x = (axis.neighbors() for axis in maps)
    inside = [axis.inside for axis in maps]
    planes: dict[int, Float32] = {}
    for z in range(part.start, part.stop):
        if not inside[0][z]:
            target[z] = 0.0
            continue
        wanted = (int(below[z]), int(above[z]))
        planes = {plane: planes[plane] if plane in planes else _plane(source[plane], along_y, along_x) for plane in wanted}
        _mix(planes[wanted[0]], planes[wanted[1]], weights[z], target[z])
        target[z, ~inside[1]] = 0.0
        target[z][:, ~inside[2]] = 0.0


_Neighbors = tuple["NDArray[np.intp]", "NDArray[np.intp]", "Float32"]


def _plane(plane: Float32, along_y: _Neighbors, along_x: _Neighbors) -> Float32:
    """Return a plane of the source, (y, x), interpolated along both axes."""
    below, above, weights = along_x
    rows = _mix(plane[:, below], plane[:, above], weights)
    below, above, weights = along_y
    return _mix(rows[below], rows[above], weights[:, np.newaxis])


def _mix(below: Float32, above: Float32, weight: Any, out: Float32 | None = None) -> Float32:
    # Not below + weight * (above - below): the difference of two finite values may overflow.
    mixed: Float32 = np.multiply(below, np.float32(1) - weight, out=out)
    mixed += above * weight
    return mixed


def _linear_oblique(grid_map: GridMap, source: Float32, target: Float32, part: slice) -> None:
    """Fill some planes."""
    from scipy.ndimage import affine_transform

    filled = target[part]
    offset = grid_map.offset + grid_map.matrix[:, 0] * part.start
    affine_transform(source, grid_map.matrix, offset, filled.shape, output=filled, order=1, mode="nearest", prefilter=False)
    for z in range(part.start, part.stop):
        target[z][~grid_map.inside(z)] = 0.0
