"""The voxels that a stroke draws: in a plane, or in a ball around its path."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from crfrefine.base.array_types import Array
from crfrefine.errors import InputError
from crfrefine.runs.pictures.planes import PLANES
from crfrefine.runs.tune.case import TuneCase

_MAX_RADIUS = 100.0  # mm
_ROUNDING = 1e-6  # mm by which the page and this module may differ in a distance

Integers = NDArray[np.int64]


def voxels_of_stroke(
    case: TuneCase,
    plane: int,
    place: Sequence[int],
    voxels: Sequence[int],
    radius: float,
    within: Mapping[str, Any],
) -> Integers:
    """Return the sorted places in the flattened arrays that a stroke draws.

    Args:
        case: the case.
        plane: the plane that was drawn in.
        place: a voxel of the upright grid in that plane.
        voxels: place across + width * place up of each voxel.
        radius: mm; the balls around the voxels are drawn. 0 means the voxels alone.
        within: `low` and `high`, the intensities that are drawn on, and `modality`; empty: all.
    """
    shape: tuple[int, ...] = (0, 0)
    if case.has_plane(plane, place):
        shape = case.plane(case.network_labels, plane, place).shape
    if not voxels or not all(0 <= voxel < math.prod(shape) for voxel in voxels):
        raise InputError("no such voxels")
    if not 0 <= radius <= _MAX_RADIUS:
        raise InputError(f"radius: expected 0 to {_MAX_RADIUS} mm")
    across, up = np.unravel_index(np.unique(np.array(voxels)), shape, order="F")
    _, axis_across, axis_up, _ = PLANES[plane]
    upright: list[Array] = [np.full_like(across, at) for at in place]
    upright[axis_across] = across
    upright[axis_up] = up
    if radius > 0:
        upright = _balls_around(case, upright, radius)
    drawn = case.stored_places(upright)
    if within:
        drawn = drawn[_are_within(case, drawn, within)]
    return drawn


def _balls_around(case: TuneCase, upright: Sequence[Array], radius: float) -> list[Array]:
    """Return the voxels of the upright grid that are at most a radius in mm from others."""
    box = case.widened(_box_around(upright), radius)
    corner = [part.start for part in box]
    is_far = np.ones([part.stop - part.start for part in box], bool)
    is_far[tuple(at - start for at, start in zip(upright, corner, strict=True))] = False
    distance = distance_transform_edt(is_far, sampling=case.upright_spacing)
    near = np.nonzero(distance <= radius + _ROUNDING)
    return [at + start for at, start in zip(near, corner, strict=True)]


def _box_around(upright: Sequence[Array]) -> tuple[slice, ...]:
    """Return the box around voxels."""
    return tuple(slice(int(at.min()), int(at.max()) + 1) for at in upright)


def _are_within(case: TuneCase, places: Integers, within: Mapping[str, Any]) -> Array:
    """Return for each voxel whether its intensity is in a range."""
    try:
        modality = case.image[within["modality"]]
        low = float(within["low"])
        high = float(within["high"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError("within: expected modality, low and high") from error
    values = modality[np.unravel_index(places, modality.shape)]
    return (values >= low) & (values <= high)
