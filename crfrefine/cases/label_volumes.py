"""The volume of each label of a case, before and after its refinement."""

from __future__ import annotations

from collections.abc import Iterator

from crfrefine.base.geometry import voxel_ml
from crfrefine.cases.case import Case
from crfrefine.refinement.result import RefinementResult


def volumes_of_labels(case: Case, result: RefinementResult) -> Iterator[tuple[int, float, float]]:
    """Yield each label above 0 that a case has before or after, with its volume in ml in both."""
    size_ml = voxel_ml(case.spacing)
    pairs = zip(result.changes.voxels_before, result.changes.voxels_after, strict=True)
    for label, (before, after) in enumerate(pairs):
        if label and (before or after):
            yield label, before * size_ml, after * size_ml
