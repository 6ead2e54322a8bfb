"""The lesions of a case: their place, and what became of the baseline's."""

from __future__ import annotations

from collections.abc import Iterable

from crfrefine.io.volume import Volume
from crfrefine.metrics.lesion_scores import Lesion

_CHANGES = {("found", "missed"): "lost", ("missed", "found"): "gained"}


def in_world(lesions: Iterable[Lesion], grid: Volume) -> list[Lesion]:
    """Return lesions of a grid with their centers in the RAS+ world."""
    steps = grid.affine[:3, : len(grid.spacing)] / grid.spacing
    moved = []
    for lesion in lesions:
        center = steps @ lesion.center_mm + grid.affine[:3, 3]
        moved.append(lesion._replace(center_mm=tuple(center.tolist())))
    return moved


def changes_of(
    lesions: Iterable[Lesion], of_baseline: Iterable[Lesion], apart: Iterable[Lesion]
) -> dict[Lesion, str]:
    """Return how a method's lesions differ from the baseline's.

    A lesion of the reference is "lost" if the baseline alone finds it, "gained" if the method alone
    does. A false one is "made" if the baseline has no voxel there, and one of the baseline is
    "removed" if the method has none.

    Args:
        lesions: those of the method.
        of_baseline: those of the baseline.
        apart: components of either label map without a voxel of their region in the other.
    """
    # A component is known by its volume and place, whatever it is matched with.
    places = {(part.region, part.volume_ml, part.center_mm) for part in apart}
    before = {}
    changes = {}
    for kind, those in (("removed", of_baseline), ("made", lesions)):
        for lesion in those:
            key = (lesion.region, lesion.number)
            if lesion.outcome == "false":
                if (lesion.region, lesion.volume_ml, lesion.center_mm) in places:
                    changes[lesion] = kind
            elif kind == "removed":
                before[key] = lesion.outcome
            elif (before[key], lesion.outcome) in _CHANGES:
                changes[lesion] = _CHANGES[before[key], lesion.outcome]
    return changes
