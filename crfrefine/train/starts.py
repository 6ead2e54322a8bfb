"""The models that training starts from.

The best bandwidths differ tenfold between data sets, so several are tried. Lengths are in voxels,
intensities as normalized.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import matrix_of
from crfrefine.train.choice import CRF, Candidate

THETA_ALPHA_VOXELS = (1.0, 3.0, 6.0, 12.0)
THETA_BETAS = (0.06, 0.15)
WEIGHTS = (2.5, 8.0)
# Below 1, since soft Dice comes near the Dice of labels where marginals are sharp.
TEMPERATURE = 0.7
# Mean-field steps of a trained model: it must run with as many as it was trained with.
NUM_ITERATIONS = 5
# Lengths of Adam's first steps (its learning rates), in the layer's own parameters: logarithms for
# theta and temperature.
STEP_LENGTHS = {
    "weights": 0.2,
    "compatibility": 0.05,
    "theta": 0.06,
    "temperature": 0.04,
    "bias": 0.05,
    "volume": 0.05,
}
# Gaussian prior around the start: the loss grows by `PRIOR / cases * Σ log²(value / start)`; for a
# bias, by its squared difference.
PRIOR = 0.15
NUM_TRAINED = 2  # number of starts that are trained to their ends; the others are only tried
NUM_OPTIMIZER_STEPS = 40
BATCH_SIZE = 8
EVALUATE_EVERY = 8
PATIENCE = 2  # evaluations after the best one after which training stops
# Training also stops when so many evaluations in a row differ by less than this: nothing moves.
NUM_EQUAL = 2
EQUAL_DICE = 5e-4


def make_starts(
    base: CrfParameters | None,
    learn: Sequence[str],
    num_labels: int,
    num_modalities: int,
    spacing: Sequence[float],
    num_optimizer_steps: int = NUM_OPTIMIZER_STEPS,
) -> list[Candidate]:
    """Return the models to start from.

    These are the built-in models, or the user's model `base` and its variants with built-in
    bandwidths. For a training of few steps they are evenly thinned out, so that the search among
    them does not take longer than the training.
    """
    sharpened = CrfParameters().replace(**{"mean_field.temperature": TEMPERATURE})
    model = with_values_to_learn(base or sharpened, learn, num_labels, num_modalities)
    starts = []
    if base is not None:
        starts.append(Candidate(CRF, "given", model))
        if "theta" not in learn:
            return starts

    first = model.bilateral[0]
    voxel = voxel_length(spacing)
    lengths = [alpha * voxel for alpha in THETA_ALPHA_VOXELS]
    unit = "mm"
    if model.counts_network_voxels:
        lengths = [float(np.max(first.theta_alpha))]
        unit = "voxels of the network"
    elif model.mean_field.positions == "voxels":
        lengths = list(THETA_ALPHA_VOXELS)
        unit = "voxels"
    weights = WEIGHTS if "weights" in learn else WEIGHTS[:1]
    for length, beta, weight in itertools.product(lengths, THETA_BETAS, weights):
        alphas = _full_like(first.theta_alpha, length)
        kernel = replace(first, theta_alpha=alphas, theta_beta=_full_like(first.theta_beta, beta))
        name = f"theta_alpha {length:.3g} {unit}, theta_beta {beta:g}"
        if "weights" in learn:
            kernel = replace(kernel, weight=_full_like(first.weight, weight))
            name += f", weight {weight:g}"
        kernels = (kernel, *model.bilateral[1:])
        starts.append(Candidate(CRF, name, replace(model, bilateral=kernels)))
    stride = min(math.ceil(NUM_OPTIMIZER_STEPS / num_optimizer_steps), len(starts) // NUM_TRAINED)
    return starts[:: max(1, stride)]


def voxel_length(spacing: Sequence[float]) -> float:
    """Return the side in mm of a cube as large as a voxel."""
    return math.prod(spacing) ** (1.0 / len(spacing))


def evenly_spread(count: int, most: int) -> list[int]:
    """Return the numbers of at most so many of some cases, the first and the last among them."""
    places = np.linspace(0, count - 1, min(count, most)).round()
    return np.unique(places.astype(int)).tolist()


def _full_like(value: float | tuple[float, ...], number: float) -> float | tuple[float, ...]:
    """Return the number as often as `value` has entries."""
    if isinstance(value, tuple):
        return (number,) * len(value)
    return number


def spread(value: float | tuple[float, ...], count: int) -> tuple[float, ...]:
    """Return an entry for each of some labels, channels or modalities."""
    if isinstance(value, tuple):
        return value
    return (value,) * count


def with_values_to_learn(
    parameters: CrfParameters, learn: Sequence[str], num_labels: int, num_modalities: int
) -> CrfParameters:
    """Return the model with as many parameters as are to be learned.

    These are a weight per label, a bandwidth of intensity per modality, or a full matrix.
    """
    kernels = []
    for kernel in parameters.bilateral:
        if "weights" in learn and not parameters.counts_network_voxels:
            kernel = replace(kernel, weight=spread(kernel.weight, num_labels))
        if "theta" in learn:
            kernel = replace(kernel, theta_beta=spread(kernel.theta_beta, num_modalities))
        kernels.append(kernel)

    compatibility = parameters.compatibility
    if "compatibility" in learn and "weights" not in learn and compatibility.kind == "potts":
        compatibility = matrix_of(compatibility.penalties(num_labels))

    mean_field = replace(parameters.mean_field, num_iterations=NUM_ITERATIONS, tolerance=0.0)
    return replace(
        parameters, bilateral=tuple(kernels), compatibility=compatibility, mean_field=mean_field
    )
