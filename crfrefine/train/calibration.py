"""The network recalibrated, a special case of the CRF: another start of the training, and a candidate that a CRF must beat."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crfrefine.layer.forms import TEMPERATURE_RANGE
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import MAX_BIAS
from crfrefine.train.baselines import CALIBRATION, VectorScaling, fit_scaling
from crfrefine.train.candidates import FitResult
from crfrefine.train.material import Material
from crfrefine.train.model import Model, network_score
from crfrefine.train.starts import Start, rounded, without_crf
from crfrefine.train.threads import Workers

# Cases that a training must have to start on the recalibrated network, too: on fewer, temperature and biases follow single cases.
MIN_CALIBRATED = 8


def calibrate(material: Material, cases: Sequence[int], base: CrfParameters, workers: Workers) -> CrfParameters | None:
    """Return the network recalibrated as a CRF without weights, fitted with the loss of the training; None if that is not learned.

    Temperature and biases are the model's own unless they are learned.
    """
    learned = tuple(group for group in CALIBRATION if group in material.learn)
    if not learned:
        return None
    settings = base.mean_field
    biases = settings.bias if isinstance(settings.bias, tuple) else (settings.bias,) * material.sizes[0]
    fixed = VectorScaling(settings.temperature, tuple(bias / settings.temperature for bias in biases))
    scaling = fit_scaling(material, cases, workers, learned=learned, fixed=fixed)
    # logits / temperature + bias is (logits + bias) / temperature, in the ranges that these may have.
    low, high = TEMPERATURE_RANGE
    temperature = min(max(scaling.temperature, low), high)
    bias = tuple(min(max(value * temperature, -MAX_BIAS), MAX_BIAS) for value in scaling.bias)
    parameters = without_crf(base)
    return rounded(replace(parameters, mean_field=replace(parameters.mean_field, temperature=temperature, bias=bias)))


def with_calibrated(start: Start, calibrated: CrfParameters) -> Start:
    """Return a start on the recalibrated network."""
    settings = calibrated.mean_field
    mean_field = replace(start.parameters.mean_field, temperature=settings.temperature, bias=settings.bias)
    return Start(f"{start.name}, recalibrated", replace(start.parameters, mean_field=mean_field))


# The output temperature, which makes the marginals of a fitted CRF likeliest.

# Of the temperature: cases without a single wrong voxel would ask for 0, which no new case should be judged by.
RANGE = (0.25, 20.0)
MAX_CASES = 48
MAX_VALUES = 400_000  # cases, and refined logits of each, that the temperature is fitted to: a single number needs no more
_PRECISION = 1e-4  # Of its logarithm.

# Refined logits (L, N) and labels (N,) of voxels, or log-odds (R, N) of regions and (R, N) 1 inside and -1 outside.
Refined = tuple[NDArray[np.float32], NDArray[Any]]


def calibrate_output(fit: FitResult, cases: Sequence[int], material: Material, workers: Workers) -> FitResult:
    """Return the result of a training with the output temperature that makes its marginals likeliest on the cases it was fitted to.

    Without a CRF, the network's probabilities stay as they are.
    """
    temperature = 1.0
    if not fit.is_network:
        model = None if fit.is_calibration else Model(fit.parameters, (), material.sizes, material.device)
        stride = max(1, math.ceil(len(cases) / MAX_CASES))
        refined = workers.run_on_device(lambda case, threads: _refine_some(fit, model, material, case, threads), list(cases)[::stride])
        temperature = fit_output_temperature([voxels for voxels in refined if voxels is not None])
    return replace(fit, parameters=rounded(fit.parameters.replace(**{"mean_field.output_temperature": temperature})))


def fit_output_temperature(cases: Sequence[Refined]) -> float:
    """Return the temperature in RANGE with the largest mean log likelihood over cases; 1 if there are none, or if none is better.

    The likelihood is concave in the reciprocal of the temperature, so there is one maximum.
    """
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        return float(np.mean([negative_log_likelihood(*voxels, math.exp(log_temperature)) for voxels in cases]))

    if not cases:
        return 1.0
    low, high = RANGE
    best = minimize_scalar(loss, bounds=(math.log(low), math.log(high)), method="bounded", options={"xatol": _PRECISION})
    return math.exp(best.x) if best.fun < loss(0.0) else 1.0


def negative_log_likelihood(logits: NDArray[np.float32], truth: NDArray[Any], temperature: float) -> float:
    """Return the mean over voxels of -log of the probability of the truth; of regions, their mean."""
    scaled = logits * np.float32(1.0 / temperature)
    if truth.ndim > 1:
        return float(np.logaddexp(0.0, -truth * scaled).mean(dtype=np.float64))
    scaled -= scaled.max(axis=0)
    own = np.take_along_axis(scaled, truth[None], axis=0)[0]
    return float((np.log(np.exp(scaled).sum(axis=0)) - own).mean(dtype=np.float64))


def _refine_some(fit: FitResult, model: Model | None, material: Material, case: int, threads: int) -> Refined | None:
    """Return refined voxels of a crop that have a reference, at most MAX_VALUES logits; None without any."""
    crop = material.crops[case]
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(refined: Tensor, labels: Tensor) -> Tensor:
        """Replace the loss, which sees all voxels that count."""
        kept.append((refined, labels))
        return refined.new_zeros(())

    if model is None:
        network_score(crop, keep, material.device, fit.parameters)
    else:
        model.score(crop, keep, threads)
    refined, labels = kept[0]
    max_voxels = max(1, MAX_VALUES // len(refined))
    if labels.numel() > max_voxels:
        chosen = np.sort(np.random.default_rng([material.seed, case]).choice(labels.numel(), max_voxels, replace=False))
        index = torch.from_numpy(chosen).to(labels.device)
        refined, labels = refined.index_select(1, index), labels.index_select(0, index)
    if not labels.numel():
        return None
    logits, truth = refined.float().cpu().numpy(), labels.cpu().numpy()
    if crop.regions is not None:
        inside = np.stack([np.isin(truth, members) for members in crop.regions.labels])
        truth = np.where(inside, np.float32(1.0), np.float32(-1.0))
    return logits, truth
