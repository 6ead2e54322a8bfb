"""The methods that are compared: their names, and the values of each on a case."""

from __future__ import annotations

from collections.abc import Collection

from crfrefine.metrics.registry import MASK_METRICS, RegionValues


def with_largest(method: str) -> str:
    """Return the name of a method after which the largest component is kept."""
    return f"{method} + largest component"


def with_rules(method: str) -> str:
    """Return the name of a method after which small-object rules are applied."""
    return f"{method} + small-object rules"


NETWORK = "network"
SCALING = "vector scaling"
SMOOTHING = "Gaussian smoothing"
GUIDED = "guided filter"
DICE = "Dice decision"
DEFAULT = "default preset"
RIVALS = (SCALING, SMOOTHING, GUIDED, DICE, DEFAULT)
"""Simpler methods than a trained CRF. They are tuned on the same cases, but for the preset, which needs no cases."""

LARGEST = "largest component"
TRAINED = "trained CRF"
TRAINED_LARGEST = with_largest(TRAINED)
METHODS = (NETWORK, *RIVALS, LARGEST, TRAINED, TRAINED_LARGEST)
"""The methods that are shown, in this order."""

RULES = "small-object rules"
TRAINED_RULES = with_rules(TRAINED)
"""Measured and shown where small-object rules are chosen."""

_IN_ORDER = (NETWORK, *RIVALS, LARGEST, RULES, TRAINED, TRAINED_LARGEST, TRAINED_RULES)

MEASURED = (*METHODS, *map(with_largest, RIVALS))
"""What is measured: those that are shown, and what the CRF with the largest component must beat."""

ALL_MEASURED = (*MEASURED, RULES, TRAINED_RULES, *map(with_rules, RIVALS))
"""The same, with those that are measured only in some runs."""

PROBABILITIES = {NETWORK: "probabilities of the network", TRAINED: "probabilities of the trained CRF"}
"""The probabilities of two methods, which are measured by themselves."""

METRICS = tuple(name for name, metric in MASK_METRICS.items() if metric.in_training)

MethodValues = dict[str, RegionValues]
"""Of one case, by method."""


def shown_methods(measured: Collection[str]) -> tuple[str, ...]:
    """Return the methods to show, in order, among those that were measured."""
    return tuple(method for method in _IN_ORDER if method in METHODS or method in measured)
