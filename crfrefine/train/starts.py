"""The models that training starts from, and the lengths and number of its steps: the only place to change them.

The best bandwidths differ by a factor of ten between data sets and theta is not convex, so several scales are tried, and the best are
trained. Lengths are in units of the data's voxels, intensities in those that the normalization gives.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import CompatibilityParameters, PostprocessParameters

THETA_ALPHA_VOXELS = (1.0, 3.0, 6.0, 12.0)
THETA_BETAS = (0.06, 0.15)
WEIGHTS = (2.5, 8.0)
TEMPERATURE = 0.7  # below 1: soft Dice comes near the Dice of labels where marginals are sharp
NUM_ITERATIONS = 5  # mean-field steps, in training and afterwards: a model that was trained with five must run with five
# Of Adam's first steps (its learning rates), in the layer's own parameters: logarithms for theta and temperature.
STEP_LENGTHS = {"weights": 0.2, "compatibility": 0.05, "theta": 0.06, "temperature": 0.04, "bias": 0.05, "volume": 0.05}
# Gaussian prior around the start: `PRIOR / cases * Σ log²(value / start)` is added to the loss; for a bias, its squared difference.
# With a hundred cases it is nothing; with three it keeps bandwidths from where a single case wants them.
PRIOR = 0.15
NUM_TRAINED = 2  # number of starts that are trained to their ends; the others are only tried
NUM_OPTIMIZER_STEPS = 40
BATCH_SIZE = 8
EVALUATE_EVERY = 8
PATIENCE = 3  # evaluations without a better Dice after which training stops


@dataclass(frozen=True)
class Start:
    """A model to begin with, and its name for people."""

    name: str
    parameters: CrfParameters


def make_starts(
    base: CrfParameters | None, learn: Sequence[str], num_labels: int, num_modalities: int, spacing: Sequence[float]
) -> list[Start]:
    """Return the models to start from: the built-in ones, or the user's, of which one start has its own bandwidths.

    Without theta to learn, a user's model leaves nothing to choose from. The spacing is that of a typical case.
    """
    model = CrfParameters().replace(**{"mean_field.temperature": TEMPERATURE}) if base is None else base
    model = prepare(model, learn, num_labels, num_modalities)
    starts = [] if base is None else [Start("given", model)]
    if base is not None and "theta" not in learn:
        return starts
    if model.counts_network_voxels:
        alphas: tuple[float, ...] = (1.0,)
        voxel, unit = float(np.max(model.bilateral[0].theta_alpha)), "voxels of the network"
    else:
        alphas = THETA_ALPHA_VOXELS
        voxel, unit = (1.0, "voxels") if model.mean_field.positions == "voxels" else (voxel_length(spacing), "mm")
    first = model.bilateral[0]
    weights = WEIGHTS if "weights" in learn else WEIGHTS[:1]
    for alpha, beta, weight in itertools.product(alphas, THETA_BETAS, weights):
        kernel = replace(first, theta_alpha=_like(first.theta_alpha, alpha * voxel), theta_beta=_like(first.theta_beta, beta))
        name = f"theta_alpha {alpha * voxel:.3g} {unit}, theta_beta {beta:g}"
        if "weights" in learn:
            kernel, name = replace(kernel, weight=_like(first.weight, weight)), f"{name}, weight {weight:g}"
        starts.append(Start(name, replace(model, bilateral=(kernel, *model.bilateral[1:]))))
    return starts


def voxel_length(spacing: Sequence[float]) -> float:
    """Return the side in mm of a cube as large as a voxel."""
    return math.prod(spacing) ** (1.0 / len(spacing))


def _like(value: float | tuple[float, ...], number: float) -> float | tuple[float, ...]:
    return (number,) * len(value) if isinstance(value, tuple) else number


def prepare(parameters: CrfParameters, learn: Sequence[str], num_labels: int, num_modalities: int) -> CrfParameters:
    """Return the model with as many parameters as are to be learned: a weight per label, a bandwidth per modality, a full matrix."""

    def spread(value: float | tuple[float, ...], count: int) -> tuple[float, ...]:
        return value if isinstance(value, tuple) else (value,) * count

    kernels = list(parameters.bilateral)
    if "weights" in learn and not parameters.counts_network_voxels:
        kernels = [replace(kernel, weight=spread(kernel.weight, num_labels)) for kernel in kernels]
    if "theta" in learn:
        kernels = [replace(kernel, theta_beta=spread(kernel.theta_beta, num_modalities)) for kernel in kernels]
    compatibility = parameters.compatibility
    if "compatibility" in learn and "weights" not in learn and compatibility.matrix is None:
        matrix = tuple(tuple(float(row != column) for column in range(num_labels)) for row in range(num_labels))
        compatibility = CompatibilityParameters(kind="matrix", matrix=matrix)
    mean_field = replace(parameters.mean_field, num_iterations=NUM_ITERATIONS, tolerance=0.0)
    return replace(parameters, bilateral=tuple(kernels), compatibility=compatibility, mean_field=mean_field)


def without_crf(parameters: CrfParameters) -> CrfParameters:
    """Return the model that leaves the network's labels as they are: all weights 0, and no postprocessing."""
    return replace(
        parameters,
        bilateral=(replace(parameters.bilateral[0], weight=0.0),),
        spatial=replace(parameters.spatial, weight=0.0),
        compatibility=CompatibilityParameters(),
        volume=replace(parameters.volume, weight=0.0),
        mean_field=replace(parameters.mean_field, temperature=1.0, bias=0.0),
        postprocess=PostprocessParameters(),
    )


DIGITS = 6  # digits of a trained number; the folds differ in the second or third
_SECTIONS = ("bilateral", "spatial", "compatibility", "mean_field")


def rounded(parameters: CrfParameters) -> CrfParameters:
    """Return the parameters with numbers of a few digits."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.{DIGITS}g}")
        if isinstance(value, Mapping):
            return {key: short(entry) for key, entry in value.items()}
        return [short(entry) for entry in value] if isinstance(value, list | tuple) else value

    table = parameters.to_dict()
    return CrfParameters.from_dict({name: short(value) if name in _SECTIONS else value for name, value in table.items()})
