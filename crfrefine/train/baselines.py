"""The baselines that a trained CRF must beat: vector scaling, which is a start and a candidate, too, and filters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter

from crfrefine.arrays.components import clean
from crfrefine.arrays.label_maps import argmax_labels
from crfrefine.arrays.region_scheme import RegionScheme, probabilities_of
from crfrefine.layer.forms import TEMPERATURE_RANGE
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import MAX_BIAS, PostprocessParameters
from crfrefine.refinement.volumes import volume_bias
from crfrefine.train.crops import Crop
from crfrefine.train.material import Material
from crfrefine.train.model import Refine, mean_defined, mean_dice, refiner_of
from crfrefine.train.observer import Workers
from crfrefine.train.starts import BATCH_SIZE, FitResult, Start, rounded, voxel_length, without_crf

# which largest component is kept: that of all labels together, or that of each label
MAX_KINDS = ("foreground", "each")
SCALED = ("temperature", "bias")
SCALING_STEPS = 60
# length of the first optimizer steps of vector scaling; it falls to zero at the end
SCALING_STEP_LENGTH = 0.1
RADII_VOXELS = (1.0, 2.0, 4.0, 8.0)  # half-widths of the windows that are tried, in typical voxels
# variances of the normalized intensity that are tried: contrasts below their root are smoothed over
EPSILONS = (0.001, 0.01, 0.1)
_MIN_FILTERED = 1e-6  # filtered probabilities may be below 0
# Cases that a training must have to start on the recalibrated network, too: on fewer, temperature
# and biases follow single cases.
MIN_CALIBRATED = 8
# Range of the output temperature, which makes the marginals of a fitted CRF likeliest: cases
# without a single wrong voxel would ask for 0.
RANGE = (0.25, 20.0)
MAX_CASES = 48
# cases, and refined logits of each, that the temperature is fitted to: a single number needs no
# more
MAX_VALUES = 400_000


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
    learned: Sequence[str] = SCALED,
    fixed: VectorScaling | None = None,
) -> VectorScaling:
    """Fit temperature, biases or both on some cases with the loss of the CRF.

    `fixed` has those that are not learned.
    """
    fixed = fixed or VectorScaling(1.0, (0.0,) * material.sizes[0])
    learns_temperature = "temperature" in learned
    learns_bias = "bias" in learned
    log_temperature = torch.tensor(
        0.0 if learns_temperature else math.log(fixed.temperature), requires_grad=learns_temperature
    )
    bias = torch.zeros(material.sizes[0], requires_grad=learns_bias)
    # Biases that are not learned are those of the logits, before any temperature divides them.
    if learns_bias:
        shift = torch.zeros(1, 1)
    else:
        shift = torch.tensor(fixed.bias)[:, None] * fixed.temperature
    values = [value for value in (log_temperature, bias) if value.requires_grad]
    optimizer = torch.optim.Adam(values, lr=SCALING_STEP_LENGTH)

    def gradient(
        voxels: tuple[torch.Tensor, torch.Tensor], threads: int
    ) -> tuple[torch.Tensor, ...]:
        logits, labels = voxels
        scale = log_temperature.exp().to(logits.device)
        offset = bias.to(logits.device)[:, None]
        loss = material.loss((logits + shift.to(logits.device)) / scale + offset, labels)
        return torch.autograd.grad(loss, values)

    for optimizer_step in range(SCALING_STEPS):
        batch = [material.voxels[case] for case in material.draw(optimizer_step, cases, BATCH_SIZE)]
        for value, parts in zip(
            values, zip(*workers.run_on_device(gradient, batch), strict=True), strict=True
        ):
            value.grad = sum(parts[1:], parts[0]) / len(batch)
        optimizer.param_groups[0]["lr"] = (
            SCALING_STEP_LENGTH * 0.5 * (1.0 + math.cos(math.pi * optimizer_step / SCALING_STEPS))
        )
        optimizer.step()
    temperature = float(log_temperature.detach().exp()) if learns_temperature else fixed.temperature
    if not learns_bias:
        return VectorScaling(
            temperature, tuple(value * fixed.temperature / temperature for value in fixed.bias)
        )
    # A constant in all biases changes no softmax; a constant in log-odds of regions does matter.
    shared = bias.mean() if material.crops[0].regions is None else 0.0
    return VectorScaling(temperature, tuple((bias - shared).detach().tolist()))


class Scores(NamedTuple):
    """How good a rival that needs no training is: every choice on every case."""

    choices: Sequence[Any]  # the first is the network itself, if it is among them
    dice: NDArray[np.float64]  # (cases, choices) mean Dice

    def means(self, rows: Sequence[int]) -> NDArray[np.float64]:
        """Return the mean Dice of each choice on some cases; 0 where none has a Dice."""
        return np.nan_to_num([mean_defined(column) for column in self.dice[list(rows)].T])

    def best(self, cases: Sequence[int]) -> Any:
        """Return the choice with the best mean Dice on some cases, the first among equals."""
        return self.choices[int(self.means(cases).argmax())]


def score_choices(
    choices: Sequence[Any],
    material: Material,
    workers: Workers,
    label_maps: Callable[[Crop], Iterable[NDArray[Any]]],
) -> Scores:
    """Return how good each choice is; `label_maps` yields the labels (*box) of a crop for each."""

    def scores(crop: Crop, threads: int) -> list[float]:
        return [mean_dice(crop.confusion(labels), material.regions) for labels in label_maps(crop)]

    return Scores(choices, np.array(workers.run(scores, material.crops)))


def network_labels(crop: Crop) -> NDArray[np.unsignedinteger[Any]]:
    """Return the network's labels (*box) of a crop, background outside its mask: far from any possible foreground."""
    return np.where(crop.mask, crop.network, 0).astype(np.min_scalar_type(crop.num_labels - 1))


def largest_scores(material: Material, workers: Workers) -> Scores:
    """Return how good it is to keep the largest component of each kind."""
    rules = [PostprocessParameters(keep_largest=kind) for kind in MAX_KINDS]
    return score_choices(
        MAX_KINDS,
        material,
        workers,
        lambda crop: (clean(network_labels(crop), rule, 1.0).label_map for rule in rules),
    )


@dataclass(frozen=True)
class Guidance:
    """The setting of a guided filter."""

    radius_mm: float = 0.0  # half-width of its windows
    epsilon: float = 0.0  # variance of the intensity that counts as an edge


UNGUIDED = Guidance()  # no filter


class Guide:
    """The windows of a normalized image (M, *grid) float32, of half-widths rounded to voxels, and the filter that they guide.

    Source: He, Sun & Tang, Guided image filtering (TPAMI 35, 2013), equations 14 to 16; 5, 6 and 8
    for one modality.
    """

    def __init__(
        self, image: NDArray[np.float32], radius_mm: float, spacing: Sequence[float]
    ) -> None:
        self._image = image
        # Larger windows see nothing but the edges anyway, and would fill the memory.
        radii = [
            min(round(radius_mm / distance), 16 * extent)
            for distance, extent in zip(spacing, image.shape[1:], strict=True)
        ]
        self._sizes = [2 * radius + 1 for radius in radii]
        self._means = [self._box(modality) for modality in image]
        self._covariances = [  # a lower triangle
            [
                self._box(image[row] * image[column]) - self._means[row] * self._means[column]
                for column in range(row + 1)
            ]
            for row in range(len(image))
        ]

    def filter(
        self, channel: NDArray[np.float32], epsilons: Sequence[float]
    ) -> list[NDArray[np.float32]]:
        """Return a channel (*grid) as an average of linear functions of the image, one per window: with each epsilon."""
        mean = self._box(channel)
        cross = [
            self._box(modality * channel) - own * mean
            for modality, own in zip(self._image, self._means, strict=True)
        ]
        filtered = []
        for epsilon in epsilons:
            slopes = self._slopes(epsilon, cross)
            result = self._box(
                mean - sum(slope * own for slope, own in zip(slopes, self._means, strict=True))
            )
            for slope, modality in zip(slopes, self._image, strict=True):
                result += self._box(slope) * modality
            filtered.append(result)
        return filtered

    def _box(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        result: NDArray[np.float32] = uniform_filter(values, self._sizes, mode="nearest")
        return result

    def _slopes(
        self, epsilon: float, cross: Sequence[NDArray[np.float32]]
    ) -> list[NDArray[np.float32]]:
        """Return the solution of (covariance + epsilon) x = cross in every voxel, by elimination: the matrix is positive definite."""
        rows = [[*own[:-1], own[-1] + np.float32(epsilon)] for own in self._covariances]
        right: list[NDArray[Any]] = list(cross)
        for pivot in range(len(rows)):
            for row in range(pivot + 1, len(rows)):
                factor = rows[row][pivot] / rows[pivot][pivot]
                # The matrix stays symmetric, so the pivot's row is the pivot's column.
                for column in range(pivot + 1, row + 1):
                    rows[row][column] = rows[row][column] - factor * rows[column][pivot]
                right[row] = right[row] - factor * right[pivot]
        solution: list[NDArray[Any]] = []
        for row in reversed(range(len(rows))):
            value = right[row]
            for number, later in enumerate(solution, start=row + 1):
                value = value - rows[number][row] * later
            solution.insert(0, value / rows[row][row])
        return solution

    def labels(
        self,
        probabilities: NDArray[np.float32],
        epsilons: Sequence[float],
        regions: RegionScheme | None,
        volumes_of: NDArray[np.unsignedinteger[Any]] | None = None,
    ) -> list[NDArray[np.unsignedinteger[Any]]]:
        """Return the labels of filtered probabilities (L, *grid) with each epsilon.

        A bias keeps the volumes of a label map.
        """
        if regions is not None:
            filtered = [self.filter(channel, epsilons) for channel in probabilities]
            return [
                regions.decode(np.stack(own) - np.float32(0.5))
                for own in zip(*filtered, strict=True)
            ]
        # Filtered probabilities sum to 1 as the unfiltered do, so background needs no filter.
        filtered = [self.filter(channel, epsilons) for channel in probabilities[1:]]
        maps = [np.stack([np.float32(1.0) - sum(own), *own]) for own in zip(*filtered, strict=True)]
        if volumes_of is not None:
            for own in maps:
                np.log(np.maximum(own, np.float32(_MIN_FILTERED)), out=own)
                own += (
                    volume_bias(own, volumes_of)
                    .astype(np.float32)
                    .reshape(-1, *(1,) * volumes_of.ndim)
                )
        return [argmax_labels(own) for own in maps]


def score_guided(material: Material, spacing: Sequence[float], workers: Workers) -> Scores:
    """Measure every setting on every case, first the network without a filter.

    `spacing` is that of a typical case.
    """
    radii = [radius * voxel_length(spacing) for radius in RADII_VOXELS]

    def label_maps(crop: Crop) -> Iterator[NDArray[Any]]:
        network = network_labels(crop)
        probabilities = probabilities_of(crop.logits.astype(np.float32), crop.regions)
        yield network
        for radius in radii:
            guide = Guide(crop.image, radius, crop.spacing)
            yield from guide.labels(
                probabilities, EPSILONS, crop.regions, network if crop.network_spacing else None
            )

    choices = (
        UNGUIDED,
        *(Guidance(radius, epsilon) for radius, epsilon in itertools.product(radii, EPSILONS)),
    )
    return score_choices(choices, material, workers, label_maps)


@dataclass(frozen=True)
class Tuned:
    """The trained CRF, and the rivals that it must beat, tuned on the same cases."""

    fit: FitResult
    scaling: VectorScaling
    keep_largest: str  # "foreground" or "each"
    guidance: Guidance = UNGUIDED  # UNGUIDED means the network itself


def calibrate(
    material: Material, cases: Sequence[int], base: CrfParameters, workers: Workers
) -> CrfParameters | None:
    """Return the network recalibrated as a CRF without weights, fitted with the training's loss.

    None if not learned.
    """
    learned = tuple(group for group in SCALED if group in material.learn)
    if not learned:
        return None
    settings = base.mean_field
    if isinstance(settings.bias, tuple):
        biases = settings.bias
    else:
        biases = (settings.bias,) * material.sizes[0]
    fixed = VectorScaling(
        settings.temperature, tuple(bias / settings.temperature for bias in biases)
    )
    scaling = fit_scaling(material, cases, workers, learned=learned, fixed=fixed)
    # logits / temperature + bias is (logits + bias) / temperature, in the ranges that these may
    # have.
    low, high = TEMPERATURE_RANGE
    temperature = min(max(scaling.temperature, low), high)
    bias = tuple(min(max(value * temperature, -MAX_BIAS), MAX_BIAS) for value in scaling.bias)
    return rounded(
        without_crf(base).replace(
            **{"mean_field.temperature": temperature, "mean_field.bias": bias}
        )
    )


def with_calibrated(start: Start, calibrated: CrfParameters) -> Start:
    """Return a start on the recalibrated network."""
    changes = {
        "mean_field.temperature": calibrated.mean_field.temperature,
        "mean_field.bias": calibrated.mean_field.bias,
    }
    return Start(f"{start.name}, recalibrated", start.parameters.replace(**changes))


# Refined logits (L, N) and labels (N,) of voxels, or log-odds (R, N) of regions and (R, N) 1 inside
# and -1 outside.
Refined = tuple[NDArray[np.float32], NDArray[Any]]


def calibrate_output(
    fit: FitResult, cases: Sequence[int], material: Material, workers: Workers
) -> FitResult:
    """Return the result of a training with the output temperature that makes its marginals likeliest on the cases it was fitted to."""
    temperature = 1.0
    parameters = fit.parameters
    if not fit.is_network:  # Without a CRF, the network's probabilities stay as they are.
        refine = refiner_of(fit.kind, parameters, material)
        chosen = list(cases)[:: max(1, math.ceil(len(cases) / MAX_CASES))]
        refined = workers.run_on_device(
            lambda case, threads: _refine_some(refine, material, case, threads), chosen
        )
        temperature = fit_output_temperature([voxels for voxels in refined if voxels[1].size])
    return replace(
        fit,
        parameters=rounded(parameters.replace(**{"mean_field.output_temperature": temperature})),
    )


def fit_output_temperature(cases: Sequence[Refined]) -> float:
    """Return the temperature in RANGE with the largest mean log likelihood over cases, which has one maximum; else 1."""
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        return float(
            np.mean(
                [negative_log_likelihood(*voxels, math.exp(log_temperature)) for voxels in cases]
            )
        )

    if not cases:
        return 1.0
    best = minimize_scalar(
        loss, bounds=tuple(map(math.log, RANGE)), method="bounded", options={"xatol": 1e-4}
    )
    if best.fun < loss(0.0):
        return math.exp(best.x)
    return 1.0


def negative_log_likelihood(
    logits: NDArray[np.float32], truth: NDArray[Any], temperature: float
) -> float:
    """Return the mean over voxels of -log of the probability of the truth.

    Of regions, their mean.
    """
    scaled = logits * np.float32(1.0 / temperature)
    if truth.ndim > 1:
        return float(np.logaddexp(0.0, -truth * scaled).mean(dtype=np.float64))
    scaled -= scaled.max(axis=0)
    own = np.take_along_axis(scaled, truth[None], axis=0)[0]
    return float((np.log(np.exp(scaled).sum(axis=0)) - own).mean(dtype=np.float64))


def _refine_some(refine: Refine, material: Material, case: int, threads: int) -> Refined:
    """Return refined voxels of a crop that have a reference, at most MAX_VALUES logits."""
    regions = material.crops[case].regions
    with torch.no_grad():
        refined, labels = refine(material.crops[case], threads)
    max_voxels = max(1, MAX_VALUES // len(refined))
    if labels.numel() > max_voxels:
        chosen = np.sort(
            np.random.default_rng([material.seed, case]).choice(
                labels.numel(), max_voxels, replace=False
            )
        )
        index = torch.from_numpy(chosen).to(labels.device)
        refined = refined.index_select(1, index)
        labels = labels.index_select(0, index)
    logits = refined.float().cpu().numpy()
    truth = labels.cpu().numpy()
    if regions is not None:
        truth = np.where(
            [np.isin(truth, members) for members in regions.labels],
            np.float32(1.0),
            np.float32(-1.0),
        )
    return logits, truth
