"""The methods on a case that they were not fitted to, by the code that `infer` runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.components import clean
from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.arrays.network import ArrayNetwork, LabelMapNetwork, Network
from crfrefine.arrays.padding import write_background
from crfrefine.arrays.region_scheme import decode, probabilities_of
from crfrefine.base.array_types import Array
from crfrefine.cases.case import Case
from crfrefine.engines import get_backend
from crfrefine.engines.base import RunContext
from crfrefine.metrics.calibration import measure_calibration
from crfrefine.metrics.lesion_scores import measure_lesions
from crfrefine.metrics.overlap import measure_case, one_voxel
from crfrefine.metrics.regions import ALL_LABELS
from crfrefine.metrics.registry import CALIBRATION_METRICS, RegionValues
from crfrefine.parameters.model import CrfParameters, as_parameters
from crfrefine.parameters.sections import PostprocessParameters
from crfrefine.refinement.refining import refine_network
from crfrefine.train.baselines import VectorScaling
from crfrefine.train.comparison import (
    DEFAULT,
    GUIDED,
    GUIDED_VOLUMES,
    LARGEST,
    METRICS,
    METRICS_OF_LESIONS,
    NETWORK,
    PROBABILITIES,
    SCALING,
    SHARP,
    SMALLEST,
    SOFTENED,
    TRAINED,
    MethodValues,
    Training,
    with_rule,
)
from crfrefine.train.crops import find_inside
from crfrefine.train.guided import Guidance, Guide


def measure_methods(
    case: Case,
    regions: Mapping[str, Sequence[int]],
    training: Training,
    device: str,
    threads: int,
    lesions: str | None = None,
) -> MethodValues:
    """Return the values of every method on a case with a reference (L: voxels without one).

    These are METRICS by region, with the name of rules for lesions METRICS_OF_LESIONS too, and
    CALIBRATION_METRICS of PROBABILITIES.
    """
    parameters = training.chosen.parameters
    maps = simple_maps(case, parameters, training.scaling, training.guidance)
    network: Network = case.network
    if isinstance(network, LabelMapNetwork) and case.coarse_labels is None:
        network = ArrayNetwork(case.logits)
    # Models run on the case as in `infer`.
    refine = partial(
        refine_network,
        network,
        case.image,
        backend=get_backend(device),
        context=RunContext(threads),
        spacing=case.spacing,
        mask=case.mask,
    )
    plain = replace(parameters, postprocess=PostprocessParameters())
    refined = refine(parameters=plain)

    probabilities = probabilities_of(case.logits, case.network.regions)
    unseen = case.find_padding()
    if unseen is not None:
        are_regions = case.network.regions is not None
        write_background(probabilities, unseen, are_regions=are_regions)
    network_calibration = measure_probabilities(case, probabilities)
    del probabilities
    trained_calibration = network_calibration
    if not training.chosen.is_network:
        marginals = refined.marginals
        if refined.regions is None and len(marginals) < refined.num_labels:
            # A label without a channel, which no voxel has, gets 0.
            shape = (refined.num_labels, *marginals.shape[1:])
            of_all_labels = np.zeros_like(marginals, shape=shape)
            of_all_labels[list(refined.channel_labels)] = marginals
            marginals = of_all_labels
        trained_calibration = measure_probabilities(case, marginals)
        del marginals

    maps[TRAINED] = refined.label_map
    del refined  # Its marginals need not be in memory while presets run.
    if plain.counts_network_voxels:
        sharp = as_parameters("sharp")
        softened = sharp.replace(**{"bilateral.weight": 0.0})
        maps[SOFTENED] = refine(parameters=softened).label_map
        maps[SHARP] = refine(parameters=sharp).label_map
    else:
        maps[DEFAULT] = refine(parameters=CrfParameters()).label_map

    values = _measure_maps(case, regions, maps, training.rule, lesions)
    values[PROBABILITIES[NETWORK]] = network_calibration
    values[PROBABILITIES[TRAINED]] = trained_calibration
    return values


def simple_maps(
    case: Case, parameters: CrfParameters, scaling: VectorScaling, guidance: Guidance
) -> dict[str, Array]:
    """Return the labels of the network, and of the rivals without a CRF of a model.

    Outside the mask and in padding, they are the network's.
    """
    network = case.network_labels
    logits = case.logits
    padding = case.find_padding()
    inside = find_inside(case, padding)
    if padding is not None:
        # Any constant gives the same labels, but a large one would dominate its neighbors.
        logits = np.where(padding, np.float32(0.0), logits)

    is_coarse = parameters.counts_network_voxels
    guided = network
    if guidance.radius_mm > 0:
        image = normalize_intensity(case.image, parameters.intensity, case.mask)
        guide = Guide(image, guidance.radius_mm, case.spacing)
        probabilities = probabilities_of(logits, case.network.regions)
        epsilons = [guidance.epsilon]
        volumes_of = network if is_coarse else None
        (guided,) = guide.labels(probabilities, epsilons, case.network.regions, volumes_of)
    maps = {NETWORK: network}
    if is_coarse:
        maps[GUIDED_VOLUMES] = guided
    else:
        maps[SCALING] = decode(scaling.apply(logits), case.network.regions)
        maps[GUIDED] = guided
    return {name: np.where(inside, labels, network) for name, labels in maps.items()}


def _measure_maps(
    case: Case,
    regions: Mapping[str, Sequence[int]],
    maps: Mapping[str, Array],
    rule: PostprocessParameters,
    lesions: str | None,
) -> MethodValues:
    """Return the metrics of label maps, and of these after a rule, by method and region."""
    assert case.labels is not None
    ignored = case.network.num_labels
    rule_name = LARGEST if lesions is None else SMALLEST
    measured = dict(maps)
    for name, labels in maps.items():
        method = rule_name if name == NETWORK else with_rule(name, rule_name)
        measured[method] = clean(labels, rule, case.spacing).label_map

    # Methods often agree, and distances take most of the time.
    values_of_map = {}
    values = {}
    for name, labels in measured.items():
        key = labels.tobytes()
        if key not in values_of_map:
            found = measure_case(
                labels,
                case.labels,
                regions,
                case.spacing,
                tolerance_mm=one_voxel(case.spacing),
                metrics=METRICS,
                ignore_label=ignored,
            )
            if lesions is not None:
                results = measure_lesions(
                    labels, case.labels, regions, case.spacing, lesions, ignored
                )
                for region, result in results.items():
                    for metric in METRICS_OF_LESIONS:
                        found[region][metric] = result.values[metric]
            values_of_map[key] = found
        values[name] = values_of_map[key]
    return values


def measure_probabilities(case: Case, probabilities: NDArray[np.floating[Any]]) -> RegionValues:
    """Return CALIBRATION_METRICS over all labels, as the region ALL_LABELS.

    For overlapping regions, they are means over the regions.
    """
    assert case.labels is not None
    if case.network.regions is None:
        return measure_calibration(
            probabilities, case.labels, {}, ignore_label=case.network.num_labels
        )
    channels = case.network.regions.labels
    values = measure_calibration(
        probabilities,
        case.labels,
        {str(number): labels for number, labels in enumerate(channels)},
        channels=channels,
        ignore_label=case.network.num_labels,
    )
    means = {}
    for metric in CALIBRATION_METRICS:
        of_regions = [values[str(number)][metric] for number in range(len(channels))]
        means[metric] = float(np.mean(of_regions))
    return {ALL_LABELS: means}
