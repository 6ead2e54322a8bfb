"""The methods that are compared: their names, and the values of each on a case."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from crfrefine.metrics.registry import MASK_METRICS, RegionValues

NETWORK = "network"
SCALING = "vector scaling"
SMOOTHING = "Gaussian smoothing"
GUIDED = "guided filter"
DICE = "Dice decision"
LARGEST = "largest component"
DEFAULT = "default CRF"
TRAINED = "trained CRF"
TRAINED_LARGEST = "trained CRF + largest component"
METHODS = (NETWORK, SCALING, SMOOTHING, GUIDED, DICE, LARGEST, DEFAULT, TRAINED, TRAINED_LARGEST)
"""The methods that are shown, in this order."""

NNUNET = "nnU-Net postprocessing"
"""Measured and shown where nnU-Net has chosen a postprocessing for the network."""

RULES = "small-object rules"
TRAINED_RULES = "trained CRF + small-object rules"
"""Measured and shown where small-object rules are chosen."""

_IN_ORDER = (NETWORK, SCALING, SMOOTHING, GUIDED, DICE, LARGEST, NNUNET, RULES, DEFAULT, TRAINED, TRAINED_LARGEST, TRAINED_RULES)

SCALING_LARGEST = "vector scaling + largest component"
SMOOTHING_LARGEST = "Gaussian smoothing + largest component"
GUIDED_LARGEST = "guided filter + largest component"
DICE_LARGEST = "Dice decision + largest component"
MEASURED = (*METHODS, SCALING_LARGEST, SMOOTHING_LARGEST, GUIDED_LARGEST, DICE_LARGEST)
"""What is measured: those that are shown, and what the CRF with the largest component must beat."""

SCALING_RULES = "vector scaling + small-object rules"
SMOOTHING_RULES = "Gaussian smoothing + small-object rules"
GUIDED_RULES = "guided filter + small-object rules"
DICE_RULES = "Dice decision + small-object rules"
ALL_MEASURED = (*MEASURED, NNUNET, RULES, TRAINED_RULES, SCALING_RULES, SMOOTHING_RULES, GUIDED_RULES, DICE_RULES)
"""The same, with those that are measured only in some runs."""

PROBABILITIES = {NETWORK: "probabilities of the network", TRAINED: "probabilities of the trained CRF"}
"""The probabilities of two methods, which are measured by themselves."""

METRICS = tuple(name for name, metric in MASK_METRICS.items() if metric.in_training)

MethodValues = dict[str, RegionValues]
"""Of one case, by method."""


def shown_methods(measured: Collection[str]) -> tuple[str, ...]:
    """Return the methods to show, in order, among those that were measured."""
    return tuple(method for method in _IN_ORDER if method in METHODS or method in measured)


def plain_values(values: Mapping[str, MethodValues]) -> dict[str, Any]:
    """Return the values of cases for JSON, with None for NaN."""
    return {
        case_id: {
            method: {region: {name: None if np.isnan(value) else value for name, value in row.items()} for region, row in rows.items()}
            for method, rows in own.items()
        }
        for case_id, own in values.items()
    }


def restored_values(plain: Mapping[str, Any]) -> dict[str, MethodValues]:
    """The inverse of `plain_values`."""
    return {
        case_id: {
            method: {
                region: {name: float("nan") if value is None else float(value) for name, value in row.items()}
                for region, row in rows.items()
            }
            for method, rows in own.items()
        }
        for case_id, own in plain.items()
    }
