"""Which voxels make a lesion, and when one is found: the rules of challenges, a table by name.

Their sources are in `docs/reference/metrics.md`. A further set of rules is a line here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from crfrefine.errors import ConfigError

# How many axes a step between neighbors takes at most, by the number of neighbors in 3-D.
AXES_OF_STEP = {6: 1, 18: 2, 26: 3}
MATCHES = ("overlap", "iou")
MAX_DILATION = 20


@dataclass(frozen=True)
class LesionRules:
    """Which voxels make a lesion, and when a lesion is found.

    Raises ConfigError for values outside their range.
    """

    # Neighbors of a voxel in 3-D: 6 over faces, 18 over edges too, 26 over corners too. In 2-D,
    # these are 4, 8 and 8.
    connectivity: int = 26
    # Reference lesions of at most this volume are neither found nor missed; 0 means that all count.
    min_volume_mm3: float = 0.0
    # "overlap": one common voxel is enough. "iou": the intersection is more than half of the union.
    match: str = "overlap"
    # Voxels by which the reference is dilated: components that meet then are one lesion, and a
    # prediction that touches it overlaps it.
    dilation: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        if self.connectivity not in AXES_OF_STEP:
            raise ConfigError(
                f"connectivity of lesions: expected 6, 18 or 26, got {self.connectivity}"
            )
        if self.match not in MATCHES:
            raise ConfigError(
                f"match of lesions: expected {' or '.join(MATCHES)}, got {self.match!r}"
            )
        if not 0.0 <= self.min_volume_mm3 < math.inf:
            raise ConfigError(
                f"smallest volume of lesions: expected mm³, at least 0, got {self.min_volume_mm3}"
            )
        if not 0 <= self.dilation <= MAX_DILATION:
            raise ConfigError(
                f"dilation of lesions: expected 0 to {MAX_DILATION} voxels, got {self.dilation}"
            )


# The rules of challenges, by the name of the set; a bare --lesions has the first.
LESION_RULES = {
    "isles": LesionRules(),
    "brats": LesionRules(min_volume_mm3=50.0, dilation=3),
    "brats-met": LesionRules(min_volume_mm3=2.0, dilation=1),
    "autopet": LesionRules(connectivity=18),
}
