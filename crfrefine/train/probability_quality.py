"""How good the probabilities of network and CRF are on a case that neither was fitted to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.metrics.calibration import measure_calibration, measure_channel_calibration
from crfrefine.metrics.regions import ALL_LABELS
from crfrefine.metrics.registry import CALIBRATION_METRICS, RegionValues

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.cases.case import Case


def measure_probabilities(case: Case, probabilities: NDArray[np.floating[Any]]) -> RegionValues:
    """Return CALIBRATION_METRICS over all labels, as the region ALL_LABELS; of overlapping regions, their means over the regions.

    Args:
        case: read with its labels, where L marks voxels without a reference.
        probabilities: (L, *grid); of regions: (R, *grid).
    """
    if case.labels is None:
        raise ValueError("the case was read without labels")
    if case.regions is None:
        return measure_calibration(probabilities, case.labels, {}, ignore_label=case.num_labels)
    regions = {str(number): labels for number, labels in enumerate(case.regions.labels)}
    found = measure_channel_calibration(probabilities, case.regions.labels, case.labels, regions, ignore_label=case.num_labels)
    return {ALL_LABELS: {name: float(np.mean([found[region][name] for region in regions])) for name in CALIBRATION_METRICS}}
