"""What a volume with one value per voxel holds, an image or a label map, by its voxels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.limits import MAX_LABEL
from crfrefine.io.formats import LABELS_SUFFIXES
from crfrefine.io.paths import suffix_of
from crfrefine.io.reading import LABEL_TOLERANCE
from crfrefine.io.stored import pieces_of_values
from crfrefine.io.volume import VolumeHeader

# A volume of labels has few different values, or regions: of the neighbors along x that are not
# both 0, so many have the same value. Of CT and MR images, a third at most are alike; of label maps
# of hearts, brains and tumors, three quarters at least.
_FEW_VALUES = 32
_REGION_SHARE = 0.5
# Labels that were saved with a scaling are no whole numbers; there are at most so many then.
_MOST_SCALED_VALUES = 256


class _Look:
    """What was seen of the values so far."""

    def __init__(self) -> None:
        self.different: NDArray[Any] = np.zeros(0)
        self.num_alike = 0  # neighbors along x with the same value that is not 0
        self.num_changes = 0  # neighbors along x with different values

    def add(self, values: NDArray[Any]) -> None:
        """Look at further values, rows along x one after the other."""
        flat = values.reshape(-1)
        changes = flat[1:] != flat[:-1]
        self.num_changes += int(np.count_nonzero(changes))
        self.num_alike += int(np.count_nonzero(~changes & (flat[1:] != 0)))
        starts = np.concatenate([flat[:1], flat[1:][changes]])
        if starts.dtype.kind in "iu" and starts.min() >= 0 and starts.max() <= MAX_LABEL:
            # Counting is ten times as fast as sorting, which floats need.
            starts = np.flatnonzero(np.bincount(starts.astype(np.intp)))
        self.different = np.union1d(self.different, starts)

    @property
    def has_regions(self) -> bool:
        """Whether there are few different values, or most neighbors have the same one."""
        if len(self.different) <= _FEW_VALUES:
            return True
        num_pairs = self.num_alike + self.num_changes
        return self.num_alike >= _REGION_SHARE * num_pairs

    @property
    def may_be_labels(self) -> bool:
        """Whether the values are whole numbers from 0 to 65535, or a few that are near to them."""
        rounded = np.rint(self.different)
        is_in_range = bool((rounded >= 0).all() and (rounded <= MAX_LABEL).all())  # False for NaN
        if not is_in_range:
            return False
        off = np.abs(self.different - rounded)
        if not off.any():
            return True
        is_near = bool(off.max() <= LABEL_TOLERANCE and rounded.any())
        is_one_value_per_label = len(np.unique(rounded)) == len(rounded)
        return is_near and is_one_value_per_label and len(rounded) <= _MOST_SCALED_VALUES


def is_label_map(header: VolumeHeader) -> bool:
    """Return whether a file with one value per voxel is a label map; most images are soon known."""
    if header.segments or suffix_of(header.path) in LABELS_SUFFIXES:
        return True
    look = _Look()
    for values in pieces_of_values(header):
        look.add(values)
        if not look.may_be_labels:
            return False
    return look.has_regions
