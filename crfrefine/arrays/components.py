"""Connected components: their number, and the cleaning of a label map (keep the largest component, remove small ones).

Components are connected over faces, edges and corners (26 neighbors in 3-D). This is not part of the model: it follows the CRF.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.label_maps import bounding_box
from crfrefine.parameters.model import PostprocessParameters

Label = TypeVar("Label", bound=np.integer[Any])


def postprocess(label_map: NDArray[Label], parameters: PostprocessParameters, voxel_volume_ml: float) -> NDArray[Label]:
    """Turn unwanted components into background (0).

    Components are those of all labels together, or of each label separately with `keep_largest = "each"`. The largest has the most
    voxels; among equal ones, the one whose first voxel comes first in C order wins.

    Args:
        label_map: (*grid) integers, 0 is background; any number of dimensions.
        parameters: what to remove.
        voxel_volume_ml: volume of a voxel in milliliters.

    Returns:
        A label map of the same type and memory order; the one passed in if there is nothing to remove.
    """
    min_voxels = parameters.min_component_ml / voxel_volume_ml
    if parameters.keep_largest == "none" and min_voxels <= 1.0:
        return label_map
    by_label = parameters.keep_largest == "each"
    result = label_map.copy(order="K")
    for label in np.unique(label_map[label_map != 0]) if by_label else (None,):
        group = label_map != 0 if label is None else label_map == label
        _remove(result, group, parameters.keep_largest != "none", min_voxels)
    return result


def count_components(mask: NDArray[np.bool_]) -> int:
    """Return the number of connected components of a mask of any number of dimensions."""
    return _label_components(mask)[1]


def _label_components(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], int]:
    """Return each voxel's component number, 0 outside all components, and the number of components."""
    from scipy import ndimage

    components, count = ndimage.label(mask, structure=np.ones((3,) * mask.ndim, dtype=bool))
    return components, int(count)


def _remove(result: NDArray[Label], group: NDArray[np.bool_], largest_only: bool, min_voxels: float) -> None:
    """Set the unwanted components of `group` to 0 in `result`, in place."""
    box = bounding_box(group)
    if box is None:
        return
    components, count = _label_components(group[box])
    sizes = np.bincount(components.ravel(), minlength=count + 1)
    sizes[0] = 0
    # A component of exactly the smallest size stays, whatever the rounding of the division by the voxel's volume.
    keep = sizes >= min_voxels * (1.0 - 1e-9)
    if largest_only:
        largest = sizes == sizes.max()
        first = components.ravel()[np.argmax(largest[components].ravel())]
        keep &= np.arange(count + 1) == first
    keep[0] = True
    if not keep.all():
        result[box][~keep[components]] = 0
