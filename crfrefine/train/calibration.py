"""The network recalibrated, a special case of the CRF: where training starts, too, and what a CRF must beat to be taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from crfrefine.layer.forms import TEMPERATURE_RANGE
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import LARGEST_BIAS, MeanFieldParameters
from crfrefine.runs.execution.threads import Workers
from crfrefine.train.baselines import VectorScaling, fit_scaling
from crfrefine.train.material import Material
from crfrefine.train.rounding import rounded
from crfrefine.train.starts import Start, without_crf

CALIBRATION_GROUPS = ("temperature", "bias")
"""What is learned of the calibration, if it is learned at all."""

FEWEST_CALIBRATED = 8
"""Cases that a training must have to start on the recalibrated network, too: on fewer, temperature and biases follow single cases."""


def starts_calibrated(learn: Sequence[str], num_cases: int) -> bool:
    """Return whether a training on so many cases starts on the recalibrated network, too."""
    return num_cases >= FEWEST_CALIBRATED and any(group in learn for group in CALIBRATION_GROUPS)


def calibrate(material: Material, cases: Sequence[int], base: CrfParameters, workers: Workers) -> CrfParameters | None:
    """Return the network recalibrated as a CRF without weights, fitted with the loss of the training; None if that is not learned.

    Args:
        material: of the run.
        cases: to fit it on.
        base: the model; temperature and biases are its own unless they are learned.
        workers: to compute with.
    """
    learned = tuple(group for group in CALIBRATION_GROUPS if group in material.learn)
    if not learned:
        return None
    settings = base.mean_field
    biases = settings.bias if isinstance(settings.bias, tuple) else (settings.bias,) * material.sizes[0]
    fixed = VectorScaling(settings.temperature, tuple(bias / settings.temperature for bias in biases))
    return rounded(_with(without_crf(base), fit_scaling(material, cases, workers, learned=learned, fixed=fixed)))


def with_calibrated(starts: Sequence[Start], calibrated: CrfParameters | None) -> list[Start]:
    """Return the starts, and the first of them once more on the recalibrated network."""
    if calibrated is None:
        return list(starts)
    first, settings = starts[0], calibrated.mean_field
    mean_field = replace(first.parameters.mean_field, temperature=settings.temperature, bias=settings.bias)
    return [*starts, Start(f"{first.name}, recalibrated", replace(first.parameters, mean_field=mean_field))]


def _with(parameters: CrfParameters, scaling: VectorScaling) -> CrfParameters:
    """Return the parameters with logits / temperature + bias as (logits + bias) / temperature, in the ranges that these may have."""
    low, high = TEMPERATURE_RANGE
    temperature = min(max(scaling.temperature, low), high)
    bias = tuple(min(max(value * temperature, -LARGEST_BIAS), LARGEST_BIAS) for value in scaling.bias)
    settings: MeanFieldParameters = replace(parameters.mean_field, temperature=temperature, bias=bias)
    return replace(parameters, mean_field=settings)
