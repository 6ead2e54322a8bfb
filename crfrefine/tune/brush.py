"""The voxels that a stroke draws: in a plane, in balls around its path, or inside an outline.

Limits leave out some of them: other intensities, and labels that are protected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.ndimage import binary_fill_holes, distance_transform_edt

from crfrefine.base.array_types import Array, Bool, Integers
from crfrefine.errors import InputError
from crfrefine.pictures.planes import PLANES
from crfrefine.tune.case import TuneCase
from crfrefine.tune.values import Json, Place

SHAPES = ("disk", "ball", "outline")
_MAX_RADIUS = 100.0  # mm
_MAX_LENGTH = 1_000_000  # voxels of a path
_ROUNDING = 1e-6  # mm


class Limits:
    """Where a stroke may draw: on a range of intensities, over some labels, or everywhere."""

    def __init__(self, case: TuneCase, within: Json, labels_at: Callable[[Any], Array]) -> None:
        """Take the page's message, and a function that returns the labels of now at an index.

        `within` has `modality`, a number, with `low` and `high`, or `over`, labels, or both, or is
        empty. Raises InputError for others.
        """
        self._shape = case.network_labels.shape
        self._labels_at = labels_at
        self._over: list[int] | None = None  # None means that any label is drawn over
        self._image: Array | None = None  # None means that any intensity is drawn on
        try:
            if "over" in within:
                self._over = [int(label) for label in within["over"]]
            if within.keys() - {"over"}:
                self._image = case.image[int(within["modality"])]
                self._low = float(within["low"])
                self._high = float(within["high"])
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise InputError(
                "limits: expected a lowest and a highest intensity, or labels"
            ) from error

    def allow(self, index: Any) -> Bool:
        """Return where an index of the arrays may be drawn."""
        labels = self._labels_at(index)
        allowed: Bool = np.ones(labels.shape, np.bool_)
        if self._over is not None:
            allowed &= np.isin(labels, self._over)
        if self._image is not None:
            values = self._image[index]
            allowed &= (values >= self._low) & (values <= self._high)
        return allowed

    def cut(self, places: Integers) -> Integers:
        """Return those places in the flattened arrays that may be drawn.

        Raises InputError without any of them.
        """
        allowed = places[self.allow(np.unravel_index(places, self._shape))]
        if len(places) and not len(allowed):
            raise InputError(
                "nothing is drawn: no intensity there is in the range, or all labels there are "
                "protected"
            )
        return allowed


def voxels_of_stroke(
    case: TuneCase,
    plane: int,
    place: Place,
    path: Sequence[int],
    shape: str,
    radius: float,
) -> Integers:
    """Return the sorted places in the flattened arrays that a stroke draws.

    Args:
        case: the case.
        plane: the plane that was drawn in.
        place: a voxel of the upright grid in that plane.
        path: voxels across and up, one after the other, which lines connect. They may lie outside
            of the grid, where nothing is drawn.
        shape: of `SHAPES`: disks around the path in the plane, balls around it, or the path, closed
            and filled.
        radius: of disks and balls, in mm.
    """
    if not case.has_plane(plane, place):
        raise InputError("no such plane")
    if shape not in SHAPES:
        raise InputError(f"shape: expected {', '.join(SHAPES)}")
    if not 0 <= radius <= _MAX_RADIUS:
        raise InputError(f"radius: expected 0 to {_MAX_RADIUS} mm")
    _, across, up, _ = PLANES[plane]
    grid = np.array(case.upright_grid)
    points = _connected(path, is_closed=shape == "outline")
    voxels = np.tile(place, (len(points), 1))
    voxels[:, [across, up]] = points
    reach = np.floor(radius / np.array(case.upright_spacing) + _ROUNDING).astype(np.int64)
    if shape == "outline":
        reach[:] = 0
        voxels = voxels.clip(-1, grid)
    elif shape == "disk":
        reach[[axis for axis in range(len(grid)) if axis not in (across, up)]] = 0
    is_near = ((voxels >= -reach - 1) & (voxels <= grid + reach)).all(axis=1)
    voxels = voxels[is_near]
    if not len(voxels):
        return np.empty(0, np.int64)
    corner = voxels.min(axis=0) - reach
    is_far = np.ones(voxels.max(axis=0) + reach + 1 - corner, np.bool_)
    is_far[tuple((voxels - corner).T)] = False
    if shape == "outline":
        # The box has a single voxel through the plane.
        in_plane = is_far.reshape(is_far.shape[across], is_far.shape[up])
        is_drawn = binary_fill_holes(~in_plane).reshape(is_far.shape)
    else:
        distance = distance_transform_edt(is_far, sampling=case.upright_spacing)
        is_drawn = distance <= radius + _ROUNDING

    upright = np.argwhere(is_drawn) + corner
    is_inside = ((upright >= 0) & (upright < grid)).all(axis=1)
    return case.stored_places(upright[is_inside].T)


def _connected(path: Sequence[int], *, is_closed: bool) -> Integers:
    """Return the voxels of the lines between the points of a path, (n, 2), both ends included."""
    if not path or len(path) % 2 or max(map(abs, path)) > _MAX_LENGTH:
        raise InputError("path: expected voxels across and up")
    points = np.array(path).reshape(-1, 2)
    following = np.roll(points, -1, axis=0) if is_closed else np.vstack([points[1:], points[-1:]])
    differences = following - points
    counts = np.abs(differences).max(axis=1).clip(1)
    if counts.sum() > _MAX_LENGTH:
        raise InputError("path: it is too long")
    lines = []
    for point, difference, count in zip(points, differences, counts, strict=True):
        steps = np.arange(count + 1)[:, None]
        lines.append(point + np.floor(steps * difference / count + 0.5).astype(np.int64))
    return np.concatenate(lines)
