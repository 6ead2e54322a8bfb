"""The methods that are compared: their names, and the values of each on a case."""

from __future__ import annotations

from crfrefine.metrics.registry import MASK_METRICS, RegionValues


def with_largest(method: str) -> str:
    """Return the name of a method after which the largest component is kept."""
    return f"{method} + largest component"


NETWORK = "network"
SCALING = "vector scaling"
GUIDED = "guided filter"
DEFAULT = "default preset"
RIVALS = (SCALING, GUIDED, DEFAULT)
"""Simpler methods than a trained CRF. They are tuned on the same cases, except for the preset, which needs no cases."""

LARGEST = "largest component"
TRAINED = "trained CRF"
TRAINED_LARGEST = with_largest(TRAINED)
METHODS = (NETWORK, *RIVALS, LARGEST, TRAINED, TRAINED_LARGEST)
"""The methods that are shown, in this order."""

MEASURED = (*METHODS, *map(with_largest, RIVALS))
"""The methods that are measured: those that are shown, and the rivals of the CRF with the largest component."""

PROBABILITIES = {NETWORK: "probabilities of the network", TRAINED: "probabilities of the trained CRF"}
"""The probabilities of two methods, which are measured by themselves."""

METRICS = tuple(name for name, metric in MASK_METRICS.items() if metric.in_training)

MethodValues = dict[str, RegionValues]
"""Of one case, by method."""
