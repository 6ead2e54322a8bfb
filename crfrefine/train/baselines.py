"""The baselines that a trained CRF must beat, tuned on the same cases: vector scaling, smoothing, the largest component."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from crfrefine.arrays.components import postprocess
from crfrefine.parameters.sections import PostprocessParameters
from crfrefine.runs.execution.threads import Workers
from crfrefine.train.crops import Crop
from crfrefine.train.folds import Split
from crfrefine.train.losses import Loss
from crfrefine.train.material import Material
from crfrefine.train.model import dice_of, mean_defined, mean_dice
from crfrefine.train.starts import BATCH_SIZE, voxel_length
from crfrefine.train.voxels import Voxels

if TYPE_CHECKING:
    from numpy.typing import NDArray

Choice = TypeVar("Choice")

SIGMAS_VOXELS = (0.0, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""Widths of the Gaussian that are tried, in typical voxels; 0 is the network itself."""

LARGEST_KINDS = ("foreground", "each")
"""Which largest component is kept: that of all labels together, or that of each label."""

SCALING_STEPS = 60
SCALING_STEP_LENGTH = 0.1
"""Length of the first optimizer steps of vector scaling; it falls to zero at the end."""


@dataclass(frozen=True)
class VectorScaling:
    """The network recalibrated: logits / temperature + bias.

    Attributes:
        temperature: positive.
        bias: one per label, or one per region.
    """

    temperature: float
    bias: tuple[float, ...]

    def apply(self, logits: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        """Return recalibrated (L, *grid) logits."""
        shift = np.asarray(self.bias, dtype=logits.dtype).reshape(-1, *(1,) * (logits.ndim - 1))
        result: NDArray[np.floating[Any]] = logits / logits.dtype.type(self.temperature) + shift
        return result


def fit_vector_scaling(material: Material, split: Split, workers: Workers) -> VectorScaling:
    """Fit temperature and biases with the same loss and the same cases as the CRF."""
    return fit_scaling(material, split.seen, workers)


def fit_scaling(
    material: Material,
    cases: Sequence[int],
    workers: Workers,
    *,
    learned: Sequence[str] = ("temperature", "bias"),
    fixed: VectorScaling | None = None,
    loss: Loss | None = None,
) -> VectorScaling:
    """Fit temperature and biases on some cases.

    Args:
        material: of the run.
        cases: their numbers.
        workers: to compute with.
        learned: "temperature", "bias" or both.
        fixed: with what is not learned: its temperature, or its biases times its temperature; None: all is learned.
        loss: None: that of the run.
    """
    loss = loss or material.loss
    num_channels = material.sizes[0]
    given = fixed or VectorScaling(1.0, (0.0,) * num_channels)
    learns_temperature, learns_bias = "temperature" in learned, "bias" in learned
    log_temperature = torch.tensor(0.0 if learns_temperature else math.log(given.temperature), requires_grad=learns_temperature)
    bias = torch.zeros(num_channels, requires_grad=learns_bias)
    # Biases that are not learned are those of the logits, before any temperature divides them.
    shift = 0.0 if learns_bias else torch.tensor(given.bias)[:, None] * given.temperature
    values = [value for value in (log_temperature, bias) if value.requires_grad]
    optimizer = torch.optim.Adam(values, lr=SCALING_STEP_LENGTH)

    def gradient(voxels: Voxels, threads: int) -> tuple[torch.Tensor, ...]:
        logits, labels = voxels.logits, voxels.labels
        own = logits if isinstance(shift, float) else logits + shift.to(logits.device)
        value = loss(own / log_temperature.exp().to(logits.device) + bias.to(logits.device)[:, None], labels)
        return torch.autograd.grad(value, values)

    for optimizer_step in range(SCALING_STEPS):
        batch = [material.voxels[case] for case in material.batch_cases(optimizer_step, cases, BATCH_SIZE)]
        parts = workers.run_on_device(gradient, batch)
        for parameter, own in zip(values, zip(*parts, strict=True), strict=True):
            parameter.grad = sum(own[1:], own[0]) / len(batch)
        optimizer.param_groups[0]["lr"] = SCALING_STEP_LENGTH * 0.5 * (1.0 + math.cos(math.pi * optimizer_step / SCALING_STEPS))
        optimizer.step()
    temperature = float(log_temperature.detach().exp()) if learns_temperature else given.temperature
    if not learns_bias:
        return VectorScaling(temperature, tuple(value * given.temperature / temperature for value in given.bias))
    # A constant in all biases changes no softmax; log-odds of regions have none to spare.
    shared = bias.mean() if material.crops[0].regions is None else 0.0
    return VectorScaling(temperature, tuple((bias - shared).detach().tolist()))


def smoothed(logits: NDArray[np.floating[Any]], sigma_mm: float, spacing: Sequence[float]) -> NDArray[np.floating[Any]]:
    """Return (L, *grid) logits after a Gaussian filter."""
    from scipy.ndimage import gaussian_filter

    if sigma_mm == 0:
        return logits
    # Wider filters see nothing but the edges anyway; their weights would fill the memory.
    widths = [min(sigma_mm / distance, 4.0 * extent) for distance, extent in zip(spacing, logits.shape[1:], strict=True)]
    return np.stack([gaussian_filter(label, widths, mode="nearest") for label in logits])


@dataclass(frozen=True)
class RivalScores:
    """Dice of the rivals that need no training: every choice on every case.

    Attributes:
        sigmas_mm: widths of the smoothing Gaussian.
        smoothing: (cases, sigmas) mean Dice with each width.
        largest: (cases, LARGEST_KINDS) mean Dice with the largest component of each kind kept.
    """

    sigmas_mm: tuple[float, ...]
    smoothing: NDArray[np.float64]
    largest: NDArray[np.float64]

    def best_sigma_mm(self, cases: Sequence[int]) -> float:
        """Return the best width of the smoothing Gaussian on some cases."""
        return choose_best(self.smoothing, self.sigmas_mm, cases)

    def best_kind(self, cases: Sequence[int]) -> str:
        """Return the kind of largest component that is best on some cases."""
        return choose_best(self.largest, LARGEST_KINDS, cases)


def score_rivals(material: Material, spacing: Sequence[float], workers: Workers) -> RivalScores:
    """Measure every width and every kind of component on every case; `spacing` is the spacing of a typical case."""
    sigmas_mm = tuple(sigma * voxel_length(spacing) for sigma in SIGMAS_VOXELS)
    smoothing = smoothing_scores(material.crops, material.regions, sigmas_mm, workers)
    return RivalScores(sigmas_mm, smoothing, largest_scores(material.crops, material.regions, workers))


def smoothing_scores(
    crops: Sequence[Crop], regions: Sequence[tuple[int, ...]], sigmas_mm: Sequence[float], workers: Workers
) -> NDArray[np.float64]:
    """Return the mean Dice (cases, sigmas) of each case with each width."""

    def scores(crop: Crop, threads: int) -> list[float]:
        return [_smoothed_dice(crop, sigma, regions) for sigma in sigmas_mm]

    return np.array(workers.run(scores, crops))


def choose_best(scores: NDArray[np.float64], choices: Sequence[Choice], cases: Sequence[int]) -> Choice:
    """Return the choice (a column of the scores) with the best mean Dice on the cases (rows)."""
    means = np.nan_to_num([mean_defined(column) for column in scores[list(cases)].T], nan=0.0)
    return choices[int(means.argmax())]


def largest_scores(crops: Sequence[Crop], regions: Sequence[tuple[int, ...]], workers: Workers) -> NDArray[np.float64]:
    """Return the mean Dice (cases, kinds) of each case with the largest component of each kind kept."""

    def scores(crop: Crop, threads: int) -> list[float]:
        network = network_labels(crop)
        values = []
        for kind in LARGEST_KINDS:
            found = postprocess(network, PostprocessParameters(keep_largest=kind), 1.0)
            values.append(mean_dice(label_confusion(crop, found), regions))
        return values

    return np.array(workers.run(scores, crops))


def network_labels(crop: Crop) -> NDArray[np.unsignedinteger[Any]]:
    """Return the network's labels (*box) of a crop, background outside its mask: far from any possible foreground."""
    return np.where(crop.mask, crop.decode(crop.logits.astype(np.float32)), 0).astype(np.min_scalar_type(crop.num_labels - 1))


def label_confusion(crop: Crop, found: NDArray[Any]) -> NDArray[np.int64]:
    """Return (L, L) counts of the voxels of the whole case, by reference and found label (*box); outside the mask, the network's count."""
    return crop.count(found) + crop.outside


def network_dice(crops: Sequence[Crop], regions: Sequence[tuple[int, ...]]) -> NDArray[np.float64]:
    """Return the Dice (cases, regions) of the network's labels."""
    return np.array([dice_of(_confusion(crop, crop.logits), regions) for crop in crops])


def _smoothed_dice(crop: Crop, sigma_mm: float, regions: Sequence[tuple[int, ...]]) -> float:
    logits = crop.logits.astype(np.float32)
    if crop.regions is None and sigma_mm > 0.0:
        # Smoothing is linear, so up to rounding the labels are those of the differences from background: one channel fewer to smooth.
        channels = np.zeros_like(logits)
        channels[1:] = smoothed(logits[1:] - logits[0], sigma_mm, crop.spacing)
    else:
        channels = smoothed(logits, sigma_mm, crop.spacing)
    return mean_dice(_confusion(crop, channels), regions)


def _confusion(crop: Crop, logits: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    return label_confusion(crop, crop.decode(logits))
