"""The origin of features: what engines take by themselves, and the check of one that is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.engines.base import FeatureOrigin
from crfrefine.errors import InputError

_LARGEST_INDEX = 2**31
"""No grid is longer, and sums of two such indices fit into 64 bits."""


def default_origin(image: NDArray[Any], mask: NDArray[np.bool_] | None) -> FeatureOrigin:
    """Return the origin that engines take by themselves: the first corner of the mask's bounding box, and the lowest intensities inside.

    Args:
        image: (M, *grid), normalized.
        mask: (*grid), True where the model applies; None: everywhere.

    Raises:
        InputError: the mask is empty.
    """
    if mask is None:
        return FeatureOrigin((0,) * (image.ndim - 1), tuple(float(modality.min()) for modality in image))
    if not mask.any():
        raise InputError("the mask is empty")
    corner = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        corner.append(int(np.argmax(mask.any(axis=others))))
    return FeatureOrigin(tuple(corner), tuple(float(modality.min(where=mask, initial=np.inf)) for modality in image))


def checked_origin(origin: FeatureOrigin | None, image_shape: Sequence[int]) -> FeatureOrigin | None:
    """Return the origin unless it does not belong to an image of that shape, (M, *grid).

    Raises:
        InputError: another number of axes or modalities, an index that no grid has, or an intensity that is not finite.
    """
    if origin is None:
        return None
    num_modalities, num_axes = image_shape[0], len(image_shape) - 1
    if (len(origin.position), len(origin.intensity)) != (num_axes, num_modalities):
        raise InputError(
            f"the feature origin has {len(origin.position)} axes and {len(origin.intensity)} modalities; "
            f"the image has {num_axes} axes and {num_modalities} modalities"
        )
    if any(abs(index) > _LARGEST_INDEX for index in origin.position) or not all(map(math.isfinite, origin.intensity)):
        raise InputError(f"the feature origin must be a voxel and finite intensities; got {origin.position} and {origin.intensity}")
    return origin
