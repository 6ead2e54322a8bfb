"""The baselines that a trained CRF must beat: vector scaling, the guided filter, and components.

Vector scaling is also a start and a candidate of its own. The temperature of the output
probabilities is fitted here, too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter
from torch import Tensor

from crfrefine.arrays.components import clean
from crfrefine.arrays.label_maps import argmax_labels
from crfrefine.arrays.region_scheme import RegionScheme, probabilities_of
from crfrefine.arrays.softmax import log_sum_exp
from crfrefine.engines.volumes import volume_bias
from crfrefine.layer.forms import TEMPERATURE_RANGE
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import MAX_BIAS, PostprocessParameters
from crfrefine.train.adam import Adam
from crfrefine.train.choice import FitResult
from crfrefine.train.crops import Crop
from crfrefine.train.material import Material
from crfrefine.train.model import Refine, mean_defined, mean_dice, mean_tensor, refiner_of
from crfrefine.train.starts import BATCH_SIZE, Start, rounded, voxel_length, without_crf
from crfrefine.train.workers import Workers

# The rules for keeping the largest component: that of all labels together, or that of each label.
LARGEST_KINDS = ("foreground", "each")
SCALED = ("temperature", "bias")  # the groups that vector scaling fits
SCALING_STEPS = 60
# About so many voxels of a case supply its gradient in a step of vector scaling. They are evenly
# spread, and shift from step to step, so that all voxels take part in the fit.
SCALING_VOXELS = 16_384
# Length of the first optimizer steps of vector scaling; it falls to zero at the end.
SCALING_STEP_LENGTH = 0.1
RADII_VOXELS = (1.0, 2.0, 4.0, 8.0)  # half-widths of the windows that are tried, in typical voxels
# Variances of the normalized intensity that are tried: contrasts below their root are smoothed
# over.
EPSILONS = (0.001, 0.01, 0.1)
_MIN_FILTERED = 1e-6  # filtered probabilities may be below 0
# Fewest cases of a training that also starts on the recalibrated network: with fewer, temperature
# and biases follow single cases.
MIN_CALIBRATED = 8
# Range of the output temperature, which makes the marginals of a fitted CRF likeliest: cases
# without a single wrong voxel would ask for 0.
RANGE = (0.25, 20.0)
# Most cases, and most refined logits of each, that the temperature is fitted to: a single number
# needs no more.
MAX_CASES = 48
MAX_VALUES = 400_000


@dataclass(frozen=True)
class VectorScaling:
    """The network recalibrated: logits / temperature + bias, the bias one per label or region."""

    temperature: float
    bias: tuple[float, ...]

    def apply(self, logits: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        """Return recalibrated (L, *grid) logits."""
        bias = np.asarray(self.bias, dtype=logits.dtype)
        temperature = logits.dtype.type(self.temperature)
        return logits / temperature + _as_channels(bias, logits.ndim)


def _as_channels(values: NDArray[Any], num_axes: int) -> NDArray[Any]:
    """Return values (L,) as (L, 1, ...) with so many axes, to be added to (L, *grid)."""
    return values.reshape(-1, *(1,) * (num_axes - 1))


class _ScalingModel:
    """Vector scaling whose temperature, biases or both are learned; the other values are fixed."""

    def __init__(self, fixed: VectorScaling, learned: Sequence[str]) -> None:
        self._fixed = fixed
        self._learns_temperature = "temperature" in learned
        self._learns_bias = "bias" in learned
        log_temperature = 0.0 if self._learns_temperature else math.log(fixed.temperature)
        self._log_temperature = torch.tensor(
            log_temperature, requires_grad=self._learns_temperature
        )
        self._bias = torch.zeros(len(fixed.bias), requires_grad=self._learns_bias)
        # Biases that are not learned are those of the logits, before any temperature divides them.
        self._shift = torch.zeros(1, 1)
        if not self._learns_bias:
            self._shift = torch.tensor(fixed.bias)[:, None] * fixed.temperature

    @property
    def values(self) -> list[Tensor]:
        """The tensors that are learned."""
        return [value for value in (self._log_temperature, self._bias) if value.requires_grad]

    def apply(self, logits: Tensor) -> Tensor:
        """Return recalibrated (L, N) logits."""
        temperature = self._log_temperature.exp().to(logits.device)
        bias = self._bias.to(logits.device)[:, None]
        return (logits + self._shift.to(logits.device)) / temperature + bias

    def result(self, *, are_labels: bool) -> VectorScaling:
        """Return the present values; biases of labels, which a softmax follows, have the mean 0."""
        temperature = self._fixed.temperature
        if self._learns_temperature:
            temperature = float(self._log_temperature.detach().exp())
        if not self._learns_bias:
            fixed = self._fixed
            bias = tuple(value * fixed.temperature / temperature for value in fixed.bias)
            return VectorScaling(temperature, bias)
        learned = self._bias.detach()
        if are_labels:
            # A constant in all biases changes no softmax; in log-odds of regions it does matter.
            learned = learned - learned.mean()
        return VectorScaling(temperature, tuple(learned.tolist()))


def fit_scaling(
    material: Material,
    cases: Sequence[int],
    workers: Workers,
    learned: Sequence[str] = SCALED,
    fixed: VectorScaling | None = None,
) -> VectorScaling:
    """Fit temperature, biases or both on some cases with the loss of the CRF.

    `fixed` has the values that are not learned.
    """
    if fixed is None:
        fixed = VectorScaling(1.0, (0.0,) * material.sizes[0])
    model = _ScalingModel(fixed, learned)
    values = model.values
    optimizer = Adam([values])

    def gradient(voxels: tuple[Tensor, Tensor], threads: int) -> tuple[Tensor, ...]:
        logits, labels = voxels
        return torch.autograd.grad(material.loss(model.apply(logits), labels), values)

    for step in range(SCALING_STEPS):
        drawn = material.draw(step, cases, BATCH_SIZE)
        shares = [_share_of_voxels(*material.voxels[case], step) for case in drawn]
        gradients = workers.run_on_device(gradient, shares)
        for value, parts in zip(values, zip(*gradients, strict=True), strict=True):
            value.grad = mean_tensor(parts)
        half_cosine = 0.5 * (1.0 + math.cos(math.pi * step / SCALING_STEPS))
        optimizer.step([SCALING_STEP_LENGTH * half_cosine])
    return model.result(are_labels=material.crops[0].regions is None)


def _share_of_voxels(logits: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Return the logits (L, n) and labels (n,) of the voxels that a step takes, as views."""
    stride = math.ceil(labels.numel() / SCALING_VOXELS)
    some = slice(step % stride, None, stride)
    return logits[:, some], labels[some]


Choice = TypeVar("Choice")


class Scores(NamedTuple, Generic[Choice]):
    """The Dice of a rival that needs no training: of every choice on every case."""

    choices: Sequence[Choice]  # the first is the network itself, if it is among them
    dice: NDArray[np.float64]  # (cases, choices) mean Dice

    def means(self, rows: Sequence[int]) -> NDArray[np.float64]:
        """Return the mean Dice of each choice on some cases; 0 where none has a Dice."""
        return np.nan_to_num([mean_defined(column) for column in self.dice[list(rows)].T])

    def best(self, cases: Sequence[int]) -> Choice:
        """Return the choice with the best mean Dice on some cases, the first among equals."""
        return self.choices[int(self.means(cases).argmax())]


def score_choices(
    choices: Sequence[Choice],
    material: Material,
    workers: Workers,
    label_maps: Callable[[Crop], Iterable[NDArray[Any]]],
) -> Scores[Choice]:
    """Return how good each choice is; `label_maps` yields the labels (*box) of a crop for each."""

    def scores(crop: Crop, threads: int) -> list[float]:
        return [mean_dice(crop.confusion(labels), material.regions) for labels in label_maps(crop)]

    return Scores(choices, np.array(workers.run(scores, material.crops)))


def network_labels(crop: Crop) -> NDArray[np.unsignedinteger[Any]]:
    """Return the network's labels (*box) of a crop.

    They are background outside its mask: far from any possible foreground.
    """
    return np.where(crop.mask, crop.network, 0).astype(np.min_scalar_type(crop.num_labels - 1))


def largest_scores(material: Material, workers: Workers) -> Scores[str]:
    """Return how good it is to keep the largest component of each kind."""

    def label_maps(crop: Crop) -> Iterator[NDArray[Any]]:
        labels = network_labels(crop)
        for kind in LARGEST_KINDS:
            yield clean(labels, PostprocessParameters(keep_largest=kind), 1.0).label_map

    return score_choices(LARGEST_KINDS, material, workers, label_maps)


@dataclass(frozen=True)
class Guidance:
    """The setting of a guided filter."""

    radius_mm: float = 0.0  # half-width of its windows
    epsilon: float = 0.0  # variance of the intensity that counts as an edge


UNGUIDED = Guidance()  # no filter


class Guide:
    """The windows of a normalized image (M, *grid) float32, and the filter that they guide.

    Half-widths of windows are rounded to voxels.

    Source: He, Sun & Tang, Guided image filtering (TPAMI 35, 2013), equations 14 to 16; 5, 6 and 8
    for one modality.
    """

    def __init__(
        self, image: NDArray[np.float32], radius_mm: float, spacing: Sequence[float]
    ) -> None:
        self._image = image
        self._sizes = []
        for distance, extent in zip(spacing, image.shape[1:], strict=True):
            # Larger windows see nothing but the edges anyway, and would fill the memory.
            radius = min(round(radius_mm / distance), 16 * extent)
            self._sizes.append(2 * radius + 1)
        self._means = [self._box(modality) for modality in image]
        # The covariances of modalities, as the rows of a lower triangle.
        self._covariances = []
        for row in range(len(image)):
            covariances = []
            for column in range(row + 1):
                mean_product = self._box(image[row] * image[column])
                covariances.append(mean_product - self._means[row] * self._means[column])
            self._covariances.append(covariances)

    def _box(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the mean (*grid) of the window around each voxel."""
        return uniform_filter(values, self._sizes, mode="nearest")

    def filter(
        self, channel: NDArray[np.float32], epsilons: Sequence[float]
    ) -> list[NDArray[np.float32]]:
        """Return a channel (*grid), filtered with each epsilon.

        It is an average of linear functions of the image, one per window.
        """
        mean = self._box(channel)
        cross_covariances = []
        for modality, modality_mean in zip(self._image, self._means, strict=True):
            product_mean = self._box(modality * channel)
            cross_covariances.append(product_mean - modality_mean * mean)

        filtered = []
        for epsilon in epsilons:
            slopes = self._slopes(epsilon, cross_covariances)
            pairs = zip(slopes, self._means, strict=True)
            products = [slope * modality_mean for slope, modality_mean in pairs]
            result = self._box(mean - sum(products))
            for slope, modality in zip(slopes, self._image, strict=True):
                result += self._box(slope) * modality
            filtered.append(result)
        return filtered

    def _slopes(
        self, epsilon: float, cross_covariances: Sequence[NDArray[np.float32]]
    ) -> list[NDArray[np.float32]]:
        """Return the slopes x of (covariances + epsilon) x = cross-covariances in every voxel.

        The matrix is positive definite, so that elimination needs no exchange of rows.
        """
        rows: list[list[NDArray[Any]]] = []
        for covariances in self._covariances:
            rows.append([*covariances[:-1], covariances[-1] + np.float32(epsilon)])
        right: list[NDArray[Any]] = list(cross_covariances)
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

        A bias keeps the volumes of the label map `volumes_of`, if there is one.
        """
        if regions is None:
            # Filtered probabilities sum to 1 as the unfiltered do, so background needs no filter.
            probabilities = probabilities[1:]
        filtered = [self.filter(channel, epsilons) for channel in probabilities]
        label_maps = []
        for channels in zip(*filtered, strict=True):
            if regions is not None:
                label_maps.append(regions.decode(np.stack(channels) - np.float32(0.5)))
                continue
            scores = np.stack([np.float32(1.0) - sum(channels), *channels])
            if volumes_of is not None:
                np.log(np.maximum(scores, np.float32(_MIN_FILTERED)), out=scores)
                bias = volume_bias(scores, volumes_of).astype(np.float32)
                scores += _as_channels(bias, scores.ndim)
            label_maps.append(argmax_labels(scores))
        return label_maps


def score_guided(
    material: Material, spacing: Sequence[float], workers: Workers
) -> Scores[Guidance]:
    """Measure every setting on every case, first the network without a filter.

    `spacing` is that of a typical case.
    """
    radii = [radius * voxel_length(spacing) for radius in RADII_VOXELS]
    choices = [UNGUIDED]
    for radius, epsilon in itertools.product(radii, EPSILONS):
        choices.append(Guidance(radius, epsilon))

    def label_maps(crop: Crop) -> Iterator[NDArray[Any]]:
        network = network_labels(crop)
        volumes_of = network if crop.network_spacing else None
        probabilities = probabilities_of(crop.logits.astype(np.float32), crop.regions)
        yield network
        for radius in radii:
            guide = Guide(crop.image, radius, crop.spacing)
            yield from guide.labels(probabilities, EPSILONS, crop.regions, volumes_of)

    return score_choices(choices, material, workers, label_maps)


@dataclass(frozen=True)
class Tuned:
    """The trained CRF, and the rivals that it must beat, tuned on the same cases."""

    fit: FitResult
    scaling: VectorScaling
    keep_largest: str  # "foreground" or "each"
    guidance: Guidance = UNGUIDED  # UNGUIDED means the network itself


def calibrate(
    material: Material,
    cases: Sequence[int],
    base: CrfParameters,
    workers: Workers,
    scaling: VectorScaling | None = None,
) -> CrfParameters | None:
    """Return the recalibrated network: a CRF without weights, fitted with the loss of training.

    `scaling` is vector scaling fitted to the same cases; it is fitted here where it is not given.
    None means that neither temperature nor biases are learned.
    """
    learned = [group for group in SCALED if group in material.learn]
    if not learned:
        return None
    if scaling is None or len(learned) < len(SCALED):
        initial = base.mean_field.temperature
        biases = base.mean_field.bias
        if not isinstance(biases, tuple):
            biases = (biases,) * material.sizes[0]
        fixed = VectorScaling(initial, tuple(bias / initial for bias in biases))
        scaling = fit_scaling(material, cases, workers, learned=learned, fixed=fixed)

    # logits / temperature + bias is (logits + bias * temperature) / temperature, with both in the
    # ranges that these may have.
    temperature = _clamp(scaling.temperature, *TEMPERATURE_RANGE)
    bias = tuple(_clamp(value * temperature, -MAX_BIAS, MAX_BIAS) for value in scaling.bias)
    changes = {"mean_field.temperature": temperature, "mean_field.bias": bias}
    return rounded(without_crf(base).replace(**changes))


def _clamp(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def with_calibrated(start: Start, calibrated: CrfParameters) -> Start:
    """Return a start on the recalibrated network."""
    changes = {
        "mean_field.temperature": calibrated.mean_field.temperature,
        "mean_field.bias": calibrated.mean_field.bias,
    }
    return Start(f"{start.name}, recalibrated", start.parameters.replace(**changes))


# Refined logits (L, N) and labels (N,) of voxels; for regions, log-odds (R, N), and a truth (R, N)
# that is 1 inside and -1 outside.
Refined = tuple[NDArray[np.float32], NDArray[Any]]


def calibrate_output(
    fit: FitResult, cases: Sequence[int], material: Material, workers: Workers
) -> FitResult:
    """Return the result of a training with the output temperature that suits it.

    This temperature makes the marginals likeliest on the cases that the model was fitted to.
    """
    temperature = 1.0
    if not fit.is_network:  # Without a CRF, the network's probabilities stay as they are.
        refine = refiner_of(fit.kind, fit.parameters, material)

        def refine_some(case: int, threads: int) -> Refined:
            return _refine_some(refine, material, case, threads)

        step = max(1, math.ceil(len(cases) / MAX_CASES))
        refined = workers.run_on_device(refine_some, cases[::step])
        temperature = fit_output_temperature([voxels for voxels in refined if voxels[1].size])
    changes = {"mean_field.output_temperature": temperature}
    return replace(fit, parameters=rounded(fit.parameters.replace(**changes)))


def fit_output_temperature(cases: Sequence[Refined]) -> float:
    """Return the temperature in RANGE with the largest mean log likelihood over cases.

    It is 1 without cases, or if none is better than 1. The likelihood has one maximum.
    """
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        temperature = math.exp(log_temperature)
        return float(np.mean([negative_log_likelihood(*case, temperature) for case in cases]))

    if not cases:
        return 1.0
    bounds = (math.log(RANGE[0]), math.log(RANGE[1]))
    best = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-4})
    if best.fun < loss(0.0):
        return math.exp(best.x)
    return 1.0


def negative_log_likelihood(
    logits: NDArray[np.float32], truth: NDArray[Any], temperature: float
) -> float:
    """Return the mean over voxels of -log of the probability of the truth.

    For regions, it is the mean over them, too.
    """
    scaled = logits * np.float32(1.0 / temperature)
    if truth.ndim > 1:
        return float(np.logaddexp(0.0, -truth * scaled).mean(dtype=np.float64))
    scaled -= scaled.max(axis=0)
    of_truth = np.take_along_axis(scaled, truth[None], axis=0)[0]
    return float((log_sum_exp(scaled) - of_truth).mean(dtype=np.float64))


def _refine_some(refine: Refine, material: Material, case: int, threads: int) -> Refined:
    """Return refined voxels of a crop that have a reference, at most MAX_VALUES logits."""
    crop = material.crops[case]
    with torch.no_grad():
        refined, labels = refine(crop, threads)
    max_voxels = max(1, MAX_VALUES // len(refined))
    if labels.numel() > max_voxels:
        random = np.random.default_rng([material.seed, case])
        chosen = np.sort(random.choice(labels.numel(), max_voxels, replace=False))
        index = torch.from_numpy(chosen).to(labels.device)
        refined = refined.index_select(1, index)
        labels = labels.index_select(0, index)
    logits = refined.float().cpu().numpy()
    truth = labels.cpu().numpy()
    if crop.regions is not None:
        inside = [np.isin(truth, members) for members in crop.regions.labels]
        truth = np.where(inside, np.float32(1.0), np.float32(-1.0))
    return logits, truth
