"""The voxels of a result that no mean field decides, and that are certain.

They are background where the network saw nothing, and have their label where a stroke was drawn
outside the mask, also there.
"""

from __future__ import annotations

import numpy as np

from crfrefine.arrays.label_maps import ABSENT_LOGIT
from crfrefine.arrays.region_scheme import MAX_LOG_ODDS
from crfrefine.base.array_types import Float32
from crfrefine.refinement.given import CaseToRefine, Prepared

# The scores of a label that is certain, and of all others: finite logits whose softmax is 1 and 0.
CERTAIN = {"logits": (0.0, ABSENT_LOGIT), "probabilities": (1.0, 0.0)}


class CertainVoxels:
    """The certain voxels of a case, in storage order."""

    def __init__(self, prepared: Prepared, case: CaseToRefine) -> None:
        """Find the voxels that were drawn outside the mask, and those where nothing was seen."""
        self._unseen = prepared.unseen
        self._has_regions = case.regions is not None
        self._drawn = None
        if case.strokes is None or prepared.mask is None:
            return
        is_outside = ~prepared.mask[tuple(case.strokes.positions)]
        if is_outside.any():
            from crfrefine.refinement.following import channels_of_labels

            drawn = case.strokes.chosen(is_outside)
            self._drawn = drawn.positions
            # (channels, N), which channels their labels are or belong to
            self._members = channels_of_labels(case, drawn.labels)

    @property
    def are_any(self) -> bool:
        """Whether any voxel is certain."""
        return self._unseen is not None or self._drawn is not None

    def write(self, values: Float32, label: int, planes: slice, kind: str) -> None:
        """Write the scores of a label, or region, into planes of its channel, in place.

        The kind is "logits" or "probabilities".
        """
        certain, absent = CERTAIN[kind]
        if self._has_regions and kind == "logits":
            certain = MAX_LOG_ODDS
        if self._unseen is not None:
            is_background = label == 0 and not self._has_regions
            values[self._unseen[planes]] = certain if is_background else absent
        if self._drawn is not None:
            along = self._drawn[0]
            is_here = (along >= planes.start) & (along < planes.stop)
            first, *others = self._drawn[:, is_here]
            is_member = self._members[label, is_here]
            values[(first - planes.start, *others)] = np.where(is_member, certain, absent)
