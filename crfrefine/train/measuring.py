"""Measure all methods on the whole volume of a case that none was fitted to, with the code that `infer` runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.components import postprocess
from crfrefine.arrays.label_maps import argmax_labels
from crfrefine.arrays.padding import find_padding, leave_out
from crfrefine.axes import file_order
from crfrefine.metrics.overlap import measure_case
from crfrefine.metrics.registry import RegionValues
from crfrefine.parameters.model import CrfParameters, PostprocessParameters
from crfrefine.refinement import refine
from crfrefine.train.baselines import smoothed
from crfrefine.train.methods import (
    DEFAULT,
    LARGEST,
    METRICS,
    NETWORK,
    SCALING,
    SCALING_LARGEST,
    SMOOTHING,
    SMOOTHING_LARGEST,
    TRAINED,
    TRAINED_LARGEST,
    MethodValues,
)
from crfrefine.train.tuned import Tuned

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.cases.case import Case


def measure_methods(case: Case, regions: Mapping[str, Sequence[int]], tuned: Tuned, device: str, threads: int) -> MethodValues:
    """Return METRICS of every method on one case.

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

    def crf(parameters: CrfParameters) -> NDArray[Any]:
        found = refine(
            case.logits,
            case.image,
            spacing=case.spacing,
            parameters=parameters,
            mask=case.mask,
            input_type="logits",
            device=device,
            threads=threads,
        )
        return found.label_map

    def largest(labels: NDArray[Any]) -> NDArray[Any]:
        return postprocess(labels, keep, float(np.prod(case.spacing)) / 1000.0)

    network = argmax_labels(case.logits)
    logits, inside = case.logits, case.mask
    order = file_order(logits)
    stored_padding = find_padding(order.to_storage(logits))
    if stored_padding is not None:
        padding = order.to_user(stored_padding)
        inside, _ = leave_out(padding, inside, f"the logits of case {case.case_id!r}")
        logits = np.where(padding, np.float32(0.0), logits)  # any constant means the same, and a large one would dominate its neighbors

    def within_mask(logits: NDArray[Any]) -> NDArray[Any]:
        """As for the CRF, the network's labels stay outside the mask and in padding."""
        found = argmax_labels(logits)
        return found if inside is None else np.where(inside, found, network)

    trained = crf(tuned.fit.parameters.replace(**{"postprocess.keep_largest": "none", "postprocess.min_component_ml": 0.0}))
    scaled = within_mask(tuned.scaling.apply(logits))
    smooth = within_mask(smoothed(logits, tuned.sigma_mm, case.spacing))
    # The built-in CRF gets the same image as the trained one.
    default = replace(CrfParameters(), intensity=tuned.fit.parameters.intensity)
    maps = {
        NETWORK: network,
        SCALING: scaled,
        SMOOTHING: smooth,
        LARGEST: largest(network),
        DEFAULT: crf(default),
        TRAINED: trained,
        TRAINED_LARGEST: largest(trained),
        SCALING_LARGEST: largest(scaled),
        SMOOTHING_LARGEST: largest(smooth),
    }
    known: dict[bytes, RegionValues] = {}
    values: MethodValues = {}
    for name, labels in maps.items():
        # Methods often agree, and distances take most of the time.
        key = labels.tobytes()
        if key not in known:
            known[key] = measure_case(labels, case.labels, regions, case.spacing, metrics=METRICS, ignore_label=case.num_labels)
        values[name] = known[key]
    return values
