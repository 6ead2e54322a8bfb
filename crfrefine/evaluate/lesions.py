"""The lesions of a case: their place, and the changes against the baseline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from crfrefine.base.array_types import Labels
from crfrefine.base.lesion_rules import LesionRules
from crfrefine.io.volume import Volume
from crfrefine.metrics.lesion_scores import Lesion, LesionResults, measure_lesions
from crfrefine.metrics.registry import LESION_CHANGES, RegionValues

_CHANGES = {("found", "missed"): "lost", ("missed", "found"): "gained"}


def measure_in_world(
    label_map: Labels,
    reference: Volume,
    regions: Mapping[str, Iterable[int]],
    rules: LesionRules,
) -> dict[str, LesionResults]:
    """Return the lesions of each region as `measure_lesions`, with centers in the RAS+ world."""
    spacing = reference.spacing
    results = measure_lesions(label_map, reference.data, regions, spacing, rules)
    steps = reference.affine[:3, : len(spacing)] / spacing
    for result in results.values():
        for place, lesion in enumerate(result.lesions):
            center = steps @ lesion.center_mm + reference.affine[:3, 3]
            result.lesions[place] = lesion._replace(center_mm=tuple(center.tolist()))
    return results


def changes_of(
    lesions: Iterable[Lesion],
    of_baseline: Iterable[Lesion],
    compared: Mapping[str, LesionResults],
) -> tuple[dict[Lesion, str], RegionValues]:
    """Return how a method's lesions differ from the baseline's, and `LESION_CHANGES` by region.

    A lesion of the reference is "lost" if only the baseline finds it, "gained" if only the method
    does. A false one is "made" if the baseline has no voxel there, and one of the baseline is
    "removed" if the method has no voxel there.

    Args:
        lesions: those of the method.
        of_baseline: those of the baseline.
        compared: components of the method's label map against the baseline's, by region.
    """
    # A component is known by its volume and place, whatever it is matched with.
    apart = set()
    for region, result in compared.items():
        for part in result.lesions:
            if part.outcome != "found":
                apart.add((region, part.volume_ml, part.center_mm))

    before = {}
    changes: dict[Lesion, str] = {}
    for kind, those in (("removed", of_baseline), ("made", lesions)):
        for lesion in those:
            key = (lesion.region, lesion.number)
            if lesion.outcome == "false":
                if (lesion.region, lesion.volume_ml, lesion.center_mm) in apart:
                    changes[lesion] = kind
            elif kind == "removed":
                before[key] = lesion.outcome
            elif (before[key], lesion.outcome) in _CHANGES:
                changes[lesion] = _CHANGES[before[key], lesion.outcome]
    values = {region: dict.fromkeys(LESION_CHANGES, 0.0) for region in compared}
    for lesion, change in changes.items():
        values[lesion.region][f"lesions_{change}"] += 1
    return changes, values
