"""The baselines that a trained CRF must beat: vector scaling, a rule for components, guided filter.

Vector scaling is also a start and a candidate. The temperature of the output
probabilities is fitted here, too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crfrefine.arrays.components import clean
from crfrefine.arrays.region_scheme import probabilities_of
from crfrefine.arrays.softmax import log_sum_exp
from crfrefine.base.array_types import Array, Float32, Labels
from crfrefine.layer.forms import TEMPERATURE_RANGE
from crfrefine.metrics.lesion_scores import measure_lesions
from crfrefine.metrics.overlap import mean_dice
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import MAX_BIAS, PostprocessParameters
from crfrefine.train.choice import (
    LESION_F1,
    Candidate,
    Choice,
    Scores,
    rounded,
    without_crf,
)
from crfrefine.train.crops import Crop
from crfrefine.train.fit import spread_out
from crfrefine.train.guided import EPSILONS, RADII_VOXELS, UNGUIDED, Guidance, Guide, as_channels
from crfrefine.train.material import Material
from crfrefine.train.model import mean_tensor, refiner_of
from crfrefine.train.starts import BATCH_SIZE, spread, voxel_length

# The rules that keep the largest component: that of all labels together, or that of each label.
LARGEST_RULES = tuple(PostprocessParameters(keep_largest=kind) for kind in ("foreground", "each"))
# The rules for lesions, the network as it is first: the smallest volume of a component, in ml.
SMALLEST_VOLUMES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
SMALLEST_RULES = tuple(PostprocessParameters(min_component_ml=ml) for ml in SMALLEST_VOLUMES)
SCALED = ("temperature", "bias")  # the groups that vector scaling fits
SCALING_STEPS = 60
# About so many voxels of a case supply its gradient in a step of vector scaling. They are evenly
# spread, and shift from step to step, so that all voxels take part in the fit.
SCALING_VOXELS = 16_384
# Length of the first optimizer steps of vector scaling; it falls to zero at the end.
SCALING_STEP_LENGTH = 0.1
# Fewest cases of a training that also starts on the recalibrated network: with fewer, temperature
# and biases follow single cases.
MIN_CALIBRATED = 8
# Range of the output temperature, which makes the marginals of a fitted CRF likeliest: cases
# without a single wrong voxel would ask for 0.
RANGE = (0.25, 20.0)
# Most refined logits of a case that the temperature is fitted to: a single number needs no more.
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
        return logits / temperature + as_channels(bias, logits.ndim)


def fit_scaling(
    material: Material,
    cases: Sequence[int],
    learned: Sequence[str] = SCALED,
    fixed: VectorScaling | None = None,
) -> VectorScaling:
    """Fit temperature, biases or both on some cases with the loss of the CRF.

    `fixed` has the values that are not learned. Biases of labels, which a softmax follows, have the
    mean 0.
    """
    if fixed is None:
        fixed = VectorScaling(1.0, (0.0,) * material.plan.cases.sizes[0])
    has_temperature = "temperature" in learned
    has_bias = "bias" in learned
    initial = 0.0 if has_temperature else math.log(fixed.temperature)
    log_temperature = torch.tensor(initial, requires_grad=has_temperature)
    bias = torch.zeros(len(fixed.bias), requires_grad=has_bias)
    # Biases that are not learned are those of the logits, before any temperature divides them.
    shift = torch.zeros(1, 1)
    if not has_bias:
        shift = torch.tensor(fixed.bias)[:, None] * fixed.temperature
    values = [value for value in (log_temperature, bias) if value.requires_grad]
    optimizer = torch.optim.Adam(values, lr=SCALING_STEP_LENGTH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1.0 + math.cos(math.pi * step / SCALING_STEPS))
    )

    def gradient(voxels: tuple[Tensor, Tensor], threads: int) -> tuple[Tensor, ...]:
        logits, labels = voxels
        device = logits.device
        temperature = log_temperature.exp().to(device)
        scaled = (logits + shift.to(device)) / temperature + bias.to(device)[:, None]
        return torch.autograd.grad(material.loss(scaled, labels), values)

    for step in range(SCALING_STEPS):
        _, drawn = material.draw(step, cases, BATCH_SIZE)
        shares = []
        for case in drawn:
            logits, labels = material.voxels[case]
            stride = math.ceil(labels.numel() / SCALING_VOXELS)
            some = slice(step % stride, None, stride)
            shares.append((logits[:, some], labels[some]))
        gradients = material.workers.run_on_device(gradient, shares)
        for value, parts in zip(values, zip(*gradients, strict=True), strict=True):
            value.grad = mean_tensor(parts)
        optimizer.step()
        schedule.step()

    found = fixed.temperature
    if has_temperature:
        found = float(log_temperature.detach().exp())
    if not has_bias:
        return VectorScaling(found, tuple(one * fixed.temperature / found for one in fixed.bias))
    biases = bias.detach()
    if material.crops[0].regions is None:
        # A constant in all biases changes no softmax; in log-odds of regions it does matter.
        biases = biases - biases.mean()
    return VectorScaling(found, tuple(biases.tolist()))


def score_choices(
    choices: Sequence[Choice],
    material: Material,
    label_maps: Callable[[Crop], Iterable[Array]],
    lesions: str | None = None,
) -> Scores[Choice]:
    """Return how good each choice is; `label_maps` yields the labels (*box) of a crop for each.

    It is mean Dice, or with the name of a challenge's rules for lesions the mean of lesion F1.
    """
    regions = material.plan.regions

    def scores(crop: Crop, threads: int) -> list[float]:
        found = []
        for labels in label_maps(crop):
            if lesions is None:
                found.append(mean_dice(crop.confusion(labels), regions.values()))
                continue
            results = measure_lesions(
                labels, crop.labels, regions, crop.spacing, lesions, crop.num_labels
            )
            f1 = [result.values[LESION_F1] for result in results.values()]
            found.append(float(np.mean(f1)))
        return found

    values = np.array(material.workers.run(scores, material.crops))
    return dict(zip(choices, values.T, strict=True))


def network_labels(crop: Crop) -> Labels:
    """Return the network's labels (*box) of a crop.

    They are background outside its mask: far from any possible foreground.
    """
    return np.where(crop.mask, crop.network, 0).astype(np.min_scalar_type(crop.num_labels - 1))


def score_rules(material: Material) -> Scores[PostprocessParameters]:
    """Return how good each rule for components is, after the network: those for lesions, if asked.

    Without them, one of the rules that keep the largest component is taken in any case.
    """
    lesions = material.plan.options.lesions
    rules = LARGEST_RULES if lesions is None else SMALLEST_RULES

    def label_maps(crop: Crop) -> Iterator[Array]:
        labels = network_labels(crop)
        for rule in rules:
            yield clean(labels, rule, crop.spacing).label_map

    return score_choices(rules, material, label_maps, lesions)


def score_guided(material: Material, spacing: Sequence[float]) -> Scores[Guidance]:
    """Measure every setting on every case, first the network without a filter.

    `spacing` is that of a typical case.
    """
    radii = [radius * voxel_length(spacing) for radius in RADII_VOXELS]
    choices = [UNGUIDED]
    for radius, epsilon in itertools.product(radii, EPSILONS):
        choices.append(Guidance(radius, epsilon))

    def label_maps(crop: Crop) -> Iterator[Array]:
        network = network_labels(crop)
        volumes_of = network if crop.network_spacing else None
        probabilities = probabilities_of(crop.logits.astype(np.float32), crop.regions)
        yield network
        for radius in radii:
            guide = Guide(crop.image, radius, crop.spacing)
            yield from guide.labels(probabilities, EPSILONS, crop.regions, volumes_of)

    return score_choices(choices, material, label_maps)


def calibrate(
    material: Material,
    cases: Sequence[int],
    base: CrfParameters,
    scaling: VectorScaling | None = None,
) -> CrfParameters | None:
    """Return the recalibrated network: a CRF without weights, fitted with the loss of training.

    `scaling` is vector scaling fitted to the same cases; it is fitted here where it is not given.
    None means that neither temperature nor biases are learned.
    """
    learned = [group for group in SCALED if group in material.plan.learn]
    if not learned:
        return None
    if scaling is None or len(learned) < len(SCALED):
        initial = base.mean_field.temperature
        fixed_bias = spread(base.mean_field.bias, material.plan.cases.sizes[0])
        fixed = VectorScaling(initial, tuple(bias / initial for bias in fixed_bias))
        scaling = fit_scaling(material, cases, learned=learned, fixed=fixed)

    # logits / temperature + bias is (logits + bias * temperature) / temperature, with both in the
    # ranges that these may have.
    temperature = float(np.clip(scaling.temperature, *TEMPERATURE_RANGE))
    biases = np.clip(np.multiply(scaling.bias, temperature), -MAX_BIAS, MAX_BIAS)
    changes = {"mean_field.temperature": temperature, "mean_field.bias": tuple(biases.tolist())}
    return rounded(without_crf(base).replace(**changes))


def with_calibrated(start: Candidate, calibrated: CrfParameters) -> Candidate:
    """Return a start on the recalibrated network."""
    changes = {
        "mean_field.temperature": calibrated.mean_field.temperature,
        "mean_field.bias": calibrated.mean_field.bias,
    }
    parameters = start.parameters.replace(**changes)
    return replace(start, name=f"{start.name}, recalibrated", parameters=parameters)


# Refined logits (L, N) and labels (N,) of voxels; for regions, log-odds (R, N), and a truth (R, N)
# that is 1 inside and -1 outside.
Refined = tuple[Float32, Array]


def calibrate_output(fitted: Candidate, cases: Sequence[int], material: Material) -> Candidate:
    """Return the choice of a training with its best output temperature.

    This temperature makes the marginals likeliest on the cases that the model was fitted to: in
    their voxels that have a reference, in at most MAX_VALUES logits of each.
    """
    temperature = 1.0
    if not fitted.is_network:  # Without a CRF, the network's probabilities stay as they are.
        refine = refiner_of(fitted, material)

        def refine_some(case: int, threads: int) -> Refined:
            crop = material.crops[case]
            with torch.no_grad():
                refined, labels = refine(crop, threads)
            max_voxels = max(1, MAX_VALUES // len(refined))
            if labels.numel() > max_voxels:
                random = np.random.default_rng([material.plan.options.seed, case])
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

        refined = material.workers.run_on_device(refine_some, spread_out(cases))
        temperature = fit_output_temperature([voxels for voxels in refined if voxels[1].size])
    changes = {"mean_field.output_temperature": temperature}
    return replace(fitted, parameters=rounded(fitted.parameters.replace(**changes)))


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


def negative_log_likelihood(logits: Float32, truth: Array, temperature: float) -> float:
    """Return the mean over voxels of -log of the probability of the truth.

    For regions, it is the mean over them, too.
    """
    scaled = logits * np.float32(1.0 / temperature)
    if truth.ndim > 1:
        return float(np.logaddexp(0.0, -truth * scaled).mean(dtype=np.float64))
    scaled -= scaled.max(axis=0)
    of_truth = np.take_along_axis(scaled, truth[None], axis=0)[0]
    return float((log_sum_exp(scaled) - of_truth).mean(dtype=np.float64))
