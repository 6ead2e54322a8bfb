"""Measure all methods on the whole volume of a case that none was fitted to, with the code that `infer` runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.components import clean
from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.arrays.padding import leave_out
from crfrefine.metrics.calibration import measure_calibration
from crfrefine.metrics.overlap import measure_case
from crfrefine.metrics.regions import ALL_LABELS
from crfrefine.metrics.registry import CALIBRATION_METRICS, RegionValues
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import PostprocessParameters
from crfrefine.refinement.case import refine
from crfrefine.train import methods
from crfrefine.train.comparison import Tuned
from crfrefine.train.crops import probabilities_of
from crfrefine.train.guided_filter import guided_labels
from crfrefine.train.methods import NETWORK, PROBABILITIES, TRAINED, MethodValues, with_largest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.cases.case import Case


def measure_methods(case: Case, regions: Mapping[str, Sequence[int]], tuned: Tuned, device: str, threads: int) -> MethodValues:
    """Return METRICS of every method on one case, and CALIBRATION_METRICS of PROBABILITIES.

    Args:
        case: read with its labels, where L marks voxels without a reference.
        regions: labels of each region, by name.
        tuned: on other cases.
        device: of the CRF.
        threads: for the CRF.
    """
    assert case.labels is not None
    options: dict[str, Any] = {"spacing": case.spacing, "mask": case.mask, "regions": case.regions, "device": device, "threads": threads}
    crf = partial(refine, case.logits, case.image, input_type="logits", **options)
    fit, network, logits, inside = tuned.fit, case.decode(case.logits), case.logits, case.mask
    padding = case.find_padding()
    if padding is not None:
        inside, _ = leave_out(padding, inside, f"the logits of case {case.case_id!r}")
        logits = np.where(padding, np.float32(0.0), logits)  # any constant means the same, and a large one would dominate its neighbors

    def within_mask(labels: NDArray[Any]) -> NDArray[Any]:
        """As for the CRF, the network's labels stay outside the mask and in padding."""
        return labels if inside is None else np.where(inside, labels, network)

    refined = crf(parameters=replace(fit.parameters, postprocess=PostprocessParameters()))
    maps = {NETWORK: network, TRAINED: refined.label_map, methods.SCALING: within_mask(case.decode(tuned.scaling.apply(logits)))}
    of_network = measure_probabilities(case, probabilities_of(case.logits, case.regions))
    of_trained = of_network if fit.is_network else measure_probabilities(case, refined.marginals)
    del refined
    maps[methods.GUIDED] = network
    if tuned.guidance.radius_mm > 0:
        image = normalize_intensity(case.image, fit.parameters.intensity, case.mask, threads=threads)
        maps[methods.GUIDED] = within_mask(guided_labels(logits, image, tuned.guidance, case.spacing, case.regions))
    maps[methods.DEFAULT] = crf(parameters=CrfParameters()).label_map
    keep, voxel_ml = PostprocessParameters(keep_largest=tuned.keep_largest), float(np.prod(case.spacing)) / 1000.0
    for name, labels in list(maps.items()):
        maps[methods.LARGEST if name == NETWORK else with_largest(name)] = clean(labels, keep, voxel_ml).label_map
    known: dict[bytes, RegionValues] = {}
    values: MethodValues = {PROBABILITIES[NETWORK]: of_network, PROBABILITIES[TRAINED]: of_trained}
    for name in methods.MEASURED:
        # Methods often agree, and distances take most of the time.
        key = maps[name].tobytes()
        if key not in known:
            known[key] = measure_case(maps[name], case.labels, regions, case.spacing, metrics=methods.METRICS, ignore_label=case.num_labels)
        values[name] = known[key]
    return values


def measure_probabilities(case: Case, probabilities: NDArray[np.floating[Any]]) -> RegionValues:
    """Return CALIBRATION_METRICS over all labels, as the region ALL_LABELS; of overlapping regions, their means over the regions."""
    assert case.labels is not None
    if case.regions is None:
        return measure_calibration(probabilities, case.labels, {}, ignore_label=case.num_labels)
    regions = {str(number): labels for number, labels in enumerate(case.regions.labels)}
    channels = case.regions.labels
    values = measure_calibration(probabilities, case.labels, regions, channels=channels, ignore_label=case.num_labels)
    return {ALL_LABELS: {name: float(np.mean([values[region][name] for region in regions])) for name in CALIBRATION_METRICS}}
