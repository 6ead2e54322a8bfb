"""Measure all methods on the whole volume of a case that none was fitted to, with the code that `infer` runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.components import postprocess
from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.arrays.padding import leave_out
from crfrefine.metrics.calibration import measure_calibration
from crfrefine.metrics.overlap import measure_case
from crfrefine.metrics.regions import ALL_LABELS
from crfrefine.metrics.registry import CALIBRATION_METRICS, RegionValues
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import PostprocessParameters
from crfrefine.refinement.case import refine
from crfrefine.train.comparison import Tuned
from crfrefine.train.crops import probabilities_of
from crfrefine.train.guided_filter import guided_labels
from crfrefine.train.methods import (
    DEFAULT,
    GUIDED,
    LARGEST,
    METRICS,
    NETWORK,
    PROBABILITIES,
    SCALING,
    TRAINED,
    TRAINED_LARGEST,
    MethodValues,
    with_largest,
)

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
    if case.labels is None:
        raise ValueError("the case was read without labels")

    keep = PostprocessParameters(keep_largest=tuned.keep_largest)

    options: dict[str, Any] = {"spacing": case.spacing, "mask": case.mask, "regions": case.regions, "device": device, "threads": threads}
    crf = partial(refine, case.logits, case.image, input_type="logits", **options)

    def cleaned(labels: NDArray[Any], parameters: PostprocessParameters = keep) -> NDArray[Any]:
        return postprocess(labels, parameters, float(np.prod(case.spacing)) / 1000.0)

    network = case.decode(case.logits)
    logits, inside = case.logits, case.mask
    padding = case.find_padding()
    if padding is not None:
        inside, _ = leave_out(padding, inside, f"the logits of case {case.case_id!r}")
        logits = np.where(padding, np.float32(0.0), logits)  # any constant means the same, and a large one would dominate its neighbors

    def within_mask(found: NDArray[Any]) -> NDArray[Any]:
        """As for the CRF, the network's labels stay outside the mask and in padding."""
        return found if inside is None else np.where(inside, found, network)

    refined = crf(parameters=replace(tuned.fit.parameters, postprocess=PostprocessParameters()))
    trained, of_network = refined.label_map, measure_probabilities(case, probabilities_of(case.logits, case.regions))
    of_trained = of_network if tuned.fit.is_network else measure_probabilities(case, refined.marginals)
    del refined
    scaled = within_mask(case.decode(tuned.scaling.apply(logits)))
    guided = network
    if tuned.guidance.radius_mm > 0:
        image = normalize_intensity(case.image, tuned.fit.parameters.intensity, case.mask, threads=threads)
        guided = within_mask(guided_labels(logits, image, tuned.guidance, case.spacing, case.regions))
    rivals = {SCALING: scaled, GUIDED: guided, DEFAULT: crf(parameters=CrfParameters()).label_map}
    maps = {
        NETWORK: network,
        LARGEST: cleaned(network),
        TRAINED: trained,
        TRAINED_LARGEST: cleaned(trained),
        **rivals,
        **{with_largest(name): cleaned(labels) for name, labels in rivals.items()},
    }
    known: dict[bytes, RegionValues] = {}
    values: MethodValues = {PROBABILITIES[NETWORK]: of_network, PROBABILITIES[TRAINED]: of_trained}
    for name, labels in maps.items():
        # Methods often agree, and distances take most of the time.
        key = labels.tobytes()
        if key not in known:
            known[key] = measure_case(labels, case.labels, regions, case.spacing, metrics=METRICS, ignore_label=case.num_labels)
        values[name] = known[key]
    return values


# How good the probabilities of network and CRF are on a case that neither was fitted to.


def measure_probabilities(case: Case, probabilities: NDArray[np.floating[Any]]) -> RegionValues:
    """Return CALIBRATION_METRICS over all labels, as the region ALL_LABELS; of overlapping regions, their means over the regions."""
    if case.labels is None:
        raise ValueError("the case was read without labels")
    if case.regions is None:
        return measure_calibration(probabilities, case.labels, {}, ignore_label=case.num_labels)
    regions = {str(number): labels for number, labels in enumerate(case.regions.labels)}
    channels = case.regions.labels
    found = measure_calibration(probabilities, case.labels, regions, channels=channels, ignore_label=case.num_labels)
    return {ALL_LABELS: {name: float(np.mean([found[region][name] for region in regions])) for name in CALIBRATION_METRICS}}
