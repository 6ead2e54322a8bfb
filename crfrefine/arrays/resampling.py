"""The values of one grid on another: the nearest neighbor, or linear or cubic interpolation.

Along parallel axes, interpolating one axis after the other takes a tenth of the time of scipy's
general transformation, which does oblique grids.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.grid_map import POSITION_TOLERANCE, GridMap, nearest_sample
from crfrefine.arrays.label_maps import Box
from crfrefine.arrays.padding import find_padding, find_ties
from crfrefine.base.array_types import Bool, Float32
from crfrefine.base.limits import run_all

Number = TypeVar("Number", bound=np.generic)


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
        along_z, along_y, along_x = self.grid_map.inside_along
        inside = [np.flatnonzero(part) for part in (along_z[planes], along_y, along_x)]
        if not all(part.size for part in inside):
            return

        inside[0] += planes.start or 0
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
            source_box[axis] = _span(samples[0, part].min(), samples[-1, part].max())
        values = read(tuple(source_box)).transpose(self.axes)

        for number in (2, 1, 0):
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
                    term *= weight.reshape(-1, *(1,) * (2 - number))
                if total is None:
                    total = term
                else:
                    total += term
            assert total is not None
            values = total
        return values


def _span(first: np.intp, last: np.intp) -> slice:
    return slice(int(first), int(last) + 1)


JOB_VOXELS = 1 << 22  # voxels of one job: several threads may share a single channel
# Relative step that breaks a tie: a few roundings in float32, far below anything that counts.
_TIE_STEP = np.float32(1e-6)


def interpolate(
    grid_map: GridMap, source: Float32, target: Float32, threads: int, *, is_cubic: bool = False
) -> None:
    """Interpolate channels, with the same result at any number of threads.

    The target, (channels, [z,] y, x), gets the value at the edge up to half a voxel beyond it, then
    0. Oblique grids take the B-spline of order 3 as the cubic interpolation.
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
    run_all(jobs, threads)


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
        pairs = zip(grid_map.nearest_along, along, strict=True)
        samples_along = [samples[inside] for samples, inside in pairs]
        target[np.ix_(*along)] = stored.transpose(axes)[np.ix_(*samples_along)]
        return target

    last = np.array(grid_map.source_shape) - 1
    for plane in range(grid_map.shape[0]):
        y, x = np.nonzero(grid_map.inside(plane))
        voxels = np.stack([np.full_like(y, plane), y, x], axis=1)
        positions = voxels @ grid_map.matrix.T + grid_map.offset
        samples = tuple(nearest_sample(positions, last).T)
        target[plane, y, x] = stored[samples]
    return target


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
    interpolate(grid_map, source, target, threads, is_cubic=is_cubic)

    tied = None if are_regions else find_ties(target)
    if padding is None:
        unseen: Bool = ~grid_map.all_inside().reshape(target.shape[1:])
    else:
        has_scores = np.where(padding, np.float32(0), np.float32(1))
        share_of_scores = np.empty(target.shape[1:], np.float32)
        interpolate(grid_map, has_scores, share_of_scores, threads)
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


def resample_image(grid_map: GridMap, source: Float32, target: Float32) -> None:
    """Interpolate images linearly, (channels, [z,] y, x), which may have voxels that are NaN.

    The target is NaN outside of the source, and where a sample that counts is NaN. NaN becomes 0 in
    the source.
    """
    for channel, filled in zip(source, target, strict=True):
        is_nan = np.isnan(channel)
        has_nan = bool(is_nan.any())
        if has_nan:
            channel[is_nan] = 0.0
        interpolate(grid_map, channel, filled, threads=1)
        if has_nan:
            share = np.empty_like(filled)
            is_number = np.where(is_nan, np.float32(0), np.float32(1))
            interpolate(grid_map, is_number, share, threads=1)
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
