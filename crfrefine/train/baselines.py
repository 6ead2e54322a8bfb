"""The baselines that a trained CRF must beat, tuned on the same cases: vector scaling and the largest component."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch

from crfrefine.arrays.components import clean
from crfrefine.parameters.sections import PostprocessParameters
from crfrefine.train.crops import Crop
from crfrefine.train.material import Material
from crfrefine.train.model import mean_defined, mean_dice
from crfrefine.train.starts import BATCH_SIZE
from crfrefine.train.threads import Workers

if TYPE_CHECKING:
    from numpy.typing import NDArray

Choice = TypeVar("Choice")

MAX_KINDS = ("foreground", "each")
"""Which largest component is kept: that of all labels together, or that of each label."""

SCALING_STEPS = 60
SCALING_STEP_LENGTH = 0.1
"""Length of the first optimizer steps of vector scaling; it falls to zero at the end."""


@dataclass(frozen=True)
class VectorScaling:
    """The network recalibrated: logits / temperature + bias, the bias one per label or region."""

    temperature: float
    bias: tuple[float, ...]

    def apply(self, logits: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        """Return recalibrated (L, *grid) logits."""
        shift = np.asarray(self.bias, dtype=logits.dtype).reshape(-1, *(1,) * (logits.ndim - 1))
        result: NDArray[np.floating[Any]] = logits / logits.dtype.type(self.temperature) + shift
        return result


def fit_scaling(
    material: Material,
    cases: Sequence[int],
    workers: Workers,
    *,
    learned: Sequence[str] = ("temperature", "bias"),
    fixed: VectorScaling | None = None,
) -> VectorScaling:
    """Fit temperature and biases on some cases with the loss of the CRF.

    `learned` is "temperature", "bias" or both; `fixed` has the values that are not learned, its biases divided by its temperature.
    """
    num_channels = material.sizes[0]
    fixed = fixed or VectorScaling(1.0, (0.0,) * num_channels)
    learns_temperature, learns_bias = "temperature" in learned, "bias" in learned
    log_temperature = torch.tensor(0.0 if learns_temperature else math.log(fixed.temperature), requires_grad=learns_temperature)
    bias = torch.zeros(num_channels, requires_grad=learns_bias)
    # Biases that are not learned are those of the logits, before any temperature divides them.
    shift = 0.0 if learns_bias else torch.tensor(fixed.bias)[:, None] * fixed.temperature
    values = [value for value in (log_temperature, bias) if value.requires_grad]
    optimizer = torch.optim.Adam(values, lr=SCALING_STEP_LENGTH)

    def gradient(voxels: tuple[torch.Tensor, torch.Tensor], threads: int) -> tuple[torch.Tensor, ...]:
        logits, labels = voxels
        shifted = logits if isinstance(shift, float) else logits + shift.to(logits.device)
        loss = material.loss(shifted / log_temperature.exp().to(logits.device) + bias.to(logits.device)[:, None], labels)
        return torch.autograd.grad(loss, values)

    for optimizer_step in range(SCALING_STEPS):
        batch = [material.voxels[case] for case in material.draw(optimizer_step, cases, BATCH_SIZE)[0]]
        gradients = workers.run_on_device(gradient, batch)
        for parameter, parts in zip(values, zip(*gradients, strict=True), strict=True):
            parameter.grad = sum(parts[1:], parts[0]) / len(batch)
        optimizer.param_groups[0]["lr"] = SCALING_STEP_LENGTH * 0.5 * (1.0 + math.cos(math.pi * optimizer_step / SCALING_STEPS))
        optimizer.step()
    temperature = float(log_temperature.detach().exp()) if learns_temperature else fixed.temperature
    if not learns_bias:
        return VectorScaling(temperature, tuple(value * fixed.temperature / temperature for value in fixed.bias))
    # A constant in all biases changes no softmax; log-odds of regions have none to spare.
    shared = bias.mean() if material.crops[0].regions is None else 0.0
    return VectorScaling(temperature, tuple((bias - shared).detach().tolist()))


@dataclass(frozen=True)
class Scores(Generic[Choice]):
    """How good a rival that needs no training is: every choice on every case."""

    choices: Sequence[Choice]  # the first is the network itself, if it is among them
    dice: NDArray[np.float64]  # (cases, choices) mean Dice

    def best(self, cases: Sequence[int]) -> Choice:
        """Return the choice with the best mean Dice on some cases, the first among equals."""
        means = np.nan_to_num([mean_defined(column) for column in self.dice[list(cases)].T], nan=0.0)
        return self.choices[int(means.argmax())]


def score_choices(
    choices: Sequence[Choice], material: Material, workers: Workers, label_maps: Callable[[Crop], Iterable[NDArray[Any]]]
) -> Scores[Choice]:
    """Return how good each choice is; `label_maps` yields the labels (*box) of a crop for each."""

    def scores(crop: Crop, threads: int) -> list[float]:
        return [mean_dice(crop.confusion(labels), material.regions) for labels in label_maps(crop)]

    return Scores(choices, np.array(workers.run(scores, material.crops)))


def largest_scores(material: Material, workers: Workers) -> Scores[str]:
    """Return how good it is to keep the largest component of each kind."""

    def label_maps(crop: Crop) -> Iterator[NDArray[Any]]:
        network = network_labels(crop)
        return (clean(network, PostprocessParameters(keep_largest=kind), 1.0).label_map for kind in MAX_KINDS)

    return score_choices(MAX_KINDS, material, workers, label_maps)


def network_labels(crop: Crop) -> NDArray[np.unsignedinteger[Any]]:
    """Return the network's labels (*box) of a crop, background outside its mask: far from any possible foreground."""
    return np.where(crop.mask, crop.decode(crop.logits.astype(np.float32)), 0).astype(np.min_scalar_type(crop.num_labels - 1))
