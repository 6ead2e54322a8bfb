"""The voxels of a result that no mean field decides, and that are certain.

They are background where the network saw nothing, and have their label where a stroke was drawn
outside the mask, also there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from crfrefine.arrays.label_maps import ABSENT_LOGIT
from crfrefine.arrays.region_scheme import MAX_LOG_ODDS
from crfrefine.base.array_types import Bool, Float32, Integers

if TYPE_CHECKING:
    from crfrefine.refinement.given import CaseToRefine, Prepared

# The scores of a label that is certain, and of all others: finite logits whose softmax is 1 and 0.
CERTAIN = {"logits": (0.0, ABSENT_LOGIT), "probabilities": (1.0, 0.0)}


class CertainVoxels(NamedTuple):
    """The certain voxels of a case, in storage order."""

    unseen: Bool | None  # (*grid), True where the network saw nothing; None means nowhere
    drawn: Integers | None  # (axes, N), voxels drawn outside the mask; None means none
    members: Bool  # (channels, N), which channels their labels are or belong to
    has_regions: bool  # whether the channels are regions, without one for the background

    @classmethod
    def of_case(cls, prepared: Prepared, case: CaseToRefine) -> CertainVoxels | None:
        """Return the certain voxels of a case, None without any."""
        drawn = None
        if case.strokes is not None:
            drawn = case.strokes.outside(prepared.mask)
        has_regions = case.regions is not None
        if drawn is None:
            if prepared.unseen is None:
                return None
            return cls(prepared.unseen, None, np.zeros((0, 0), np.bool_), has_regions)
        from crfrefine.refinement.following import channels_of_labels

        members = channels_of_labels(case, drawn.labels)
        return cls(prepared.unseen, drawn.positions, members, has_regions)

    def write(self, values: Float32, label: int, planes: slice, kind: str) -> None:
        """Write the scores of a label, or region, into planes of its channel, in place.

        The kind is "logits" or "probabilities".
        """
        certain, absent = CERTAIN[kind]
        if self.has_regions and kind == "logits":
            certain = MAX_LOG_ODDS
        if self.unseen is not None:
            is_background = label == 0 and not self.has_regions
            values[self.unseen[planes]] = certain if is_background else absent
        if self.drawn is not None:
            along = self.drawn[0]
            is_here = (along >= planes.start) & (along < planes.stop)
            first, *others = self.drawn[:, is_here]
            is_member = self.members[label, is_here]
            values[(first - planes.start, *others)] = np.where(is_member, certain, absent)
