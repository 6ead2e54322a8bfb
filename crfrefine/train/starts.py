"""The models that training starts from, the lengths and number of its steps, its candidates, and the choice among them.

The best bandwidths differ tenfold between data sets, so several are tried; lengths are in voxels,
intensities as normalized.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import (
    CompatibilityParameters,
    PostprocessParameters,
    VolumeParameters,
)

THETA_ALPHA_VOXELS = (1.0, 3.0, 6.0, 12.0)
THETA_BETAS = (0.06, 0.15)
WEIGHTS = (2.5, 8.0)
TEMPERATURE = 0.7  # below 1: soft Dice comes near the Dice of labels where marginals are sharp
# mean-field steps, in training and afterwards: a model that was trained with five must run with
# five
NUM_ITERATIONS = 5
# Of Adam's first steps (its learning rates), in the layer's own parameters: logarithms for theta
# and temperature.
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
PATIENCE = 3  # evaluations without a better Dice after which training stops
DIGITS = 6  # digits of a trained number; the folds differ in the second or third
NO_CRF = "no CRF"  # kind of a result that leaves the network's labels as they are; also the name of its start
CALIBRATION = "recalibration alone"  # kind of the candidate with a temperature and biases, but no weights; also the name of its start
UNTRAINED = "preset default, untrained"  # kind of the preset as it is; also the name of its start
CRF = "CRF"  # kind of the best trained model, with the volume term of its start
# Beginning of kinds with one weight for all labels, no biases, and a volume term, which does per
# case what these do on average.
ONE_WEIGHT = f"{CRF} with one weight"
# Volume terms that are tried once the rest is trained. The first protects at little cost: with it,
# a model is the gentler one.
VOLUMES = (VolumeParameters(0.5), VolumeParameters(0.75))
HARM = 2.0  # losses weigh twice as much as gains
# share of the best candidate's gain, losses counted HARM-fold, that a gentler one must keep to be
# taken instead
KEPT_GAIN = 0.95
# fewer deciding cases, which say little of cases unlike them, never prefer the trained model to a
# gentler one
MIN_DECIDING = 8
# fewer cases cannot tell many candidates apart: only the recalibrated network and the trained model
# are candidates
MIN_CASES = 3


class Start(NamedTuple):
    """A model to begin with, and its name for people."""

    name: str
    parameters: CrfParameters


def make_starts(
    base: CrfParameters | None,
    learn: Sequence[str],
    num_labels: int,
    num_modalities: int,
    spacing: Sequence[float],
) -> list[Start]:
    """Return the models to start from: the built-in models, or the user's model and its variants with built-in bandwidths."""
    if base is None:
        model = CrfParameters().replace(**{"mean_field.temperature": TEMPERATURE})
    else:
        model = base
    model = prepare(model, learn, num_labels, num_modalities)
    starts = [] if base is None else [Start("given", model)]
    if base is not None and "theta" not in learn:
        return starts
    first = model.bilateral[0]
    alphas = list(THETA_ALPHA_VOXELS)
    if model.counts_network_voxels:
        alphas = [1.0]
        voxel = float(np.max(first.theta_alpha))
        unit = "voxels of the network"
    else:
        voxel, unit = (
            (1.0, "voxels")
            if model.mean_field.positions == "voxels"
            else (voxel_length(spacing), "mm")
        )
    weights = WEIGHTS if "weights" in learn else WEIGHTS[:1]
    for alpha, beta, weight in itertools.product(alphas, THETA_BETAS, weights):
        kernel = replace(
            first,
            theta_alpha=_like(first.theta_alpha, alpha * voxel),
            theta_beta=_like(first.theta_beta, beta),
        )
        name = f"theta_alpha {alpha * voxel:.3g} {unit}, theta_beta {beta:g}"
        if "weights" in learn:
            kernel = replace(kernel, weight=_like(first.weight, weight))
            name = f"{name}, weight {weight:g}"
        starts.append(Start(name, replace(model, bilateral=(kernel, *model.bilateral[1:]))))
    return starts


def voxel_length(spacing: Sequence[float]) -> float:
    """Return the side in mm of a cube as large as a voxel."""
    return math.prod(spacing) ** (1.0 / len(spacing))


def _like(value: float | tuple[float, ...], number: float) -> float | tuple[float, ...]:
    if isinstance(value, tuple):
        return (number,) * len(value)
    return number


def prepare(
    parameters: CrfParameters, learn: Sequence[str], num_labels: int, num_modalities: int
) -> CrfParameters:
    """Return the model with as many parameters as are to be learned: a weight per label, a bandwidth per modality, a full matrix."""

    def spread(value: float | tuple[float, ...], count: int) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        return (value,) * count

    kernels = list(parameters.bilateral)
    if "weights" in learn and not parameters.counts_network_voxels:
        kernels = [replace(kernel, weight=spread(kernel.weight, num_labels)) for kernel in kernels]
    if "theta" in learn:
        kernels = [
            replace(kernel, theta_beta=spread(kernel.theta_beta, num_modalities))
            for kernel in kernels
        ]
    compatibility = parameters.compatibility
    if "compatibility" in learn and "weights" not in learn and compatibility.matrix is None:
        matrix = tuple(
            tuple(float(row != column) for column in range(num_labels)) for row in range(num_labels)
        )
        compatibility = CompatibilityParameters(kind="matrix", matrix=matrix)
    mean_field = replace(parameters.mean_field, num_iterations=NUM_ITERATIONS, tolerance=0.0)
    return replace(
        parameters, bilateral=tuple(kernels), compatibility=compatibility, mean_field=mean_field
    )


def without_crf(parameters: CrfParameters) -> CrfParameters:
    """Return the model that leaves the network's labels as they are: all weights 0, and no postprocessing."""
    first = replace(parameters.bilateral[0], weight=0.0)
    plain = replace(
        parameters,
        bilateral=(first,),
        compatibility=CompatibilityParameters(),
        postprocess=PostprocessParameters(),
    )
    return plain.replace(
        **{
            "spatial.weight": 0.0,
            "volume.weight": 0.0,
            "mean_field.temperature": 1.0,
            "mean_field.bias": 0.0,
        }
    )


def rounded(parameters: CrfParameters) -> CrfParameters:
    """Return the parameters with numbers of a few digits."""
    table = parameters.to_dict()
    numbers = json.dumps(
        {name: table[name] for name in ("bilateral", "spatial", "compatibility", "mean_field")}
    )
    return CrfParameters.from_dict(
        table | json.loads(numbers, parse_float=lambda text: float(f"{float(text):.{DIGITS}g}"))
    )


class Rivals(NamedTuple):
    """Candidates beside the recalibrated network and the trained model."""

    # a model with the first one goes before that without, if this has a weight
    volumes: tuple[VolumeParameters, ...] = ()
    untrained: CrfParameters | None = None  # the preset, where it is comparable


NO_RIVALS = Rivals()


@dataclass(frozen=True)
class Candidate:
    """A way to refine, and its gains on the cases that decide."""

    kind: str  # the same in all trainings of a run
    start: str
    parameters: CrfParameters
    optimizer_step: int = field(metadata={"key": "best_iteration"})
    gains: tuple[float, ...]  # Dice minus the network's, of each case that has a Dice

    @property
    def values(self) -> NDArray[np.float64]:
        """The gains, with each loss HARM-fold."""
        gains = np.asarray(self.gains, dtype=float)
        return np.where(gains < 0.0, HARM * gains, gains)


def variants(trained: CrfParameters, rivals: Rivals) -> list[tuple[str, CrfParameters]]:
    """Return kind and parameters of a trained model and of its rivals, gentler ones first."""
    volumes = [volume for volume in rivals.volumes if volume != trained.volume]
    num_gentle = 1 if volumes and volumes[0].weight > 0.0 else 0
    kind = CRF
    model = trained
    gentlest = []
    if rivals.untrained is not None:
        gentlest = [(UNTRAINED, rivals.untrained)]
        # One appearance kernel with the mean of its weights for all labels, and without biases.
        kernel = replace(trained.bilateral[0], weight=float(np.mean(trained.bilateral[0].weight)))
        model = rounded(
            replace(trained, bilateral=(kernel,), mean_field=replace(trained.mean_field, bias=0.0))
        )
        kind = ONE_WEIGHT
        volumes = volumes if num_gentle else []
    with_volumes = [
        (
            f"{kind}, volume {volume.weight:g}"
            if volume.weight > 0.0
            else f"{kind}, no volume term",
            model.replace(volume=volume),
        )
        for volume in volumes
    ]
    return [*gentlest, *with_volumes[:num_gentle], (CRF, trained), *with_volumes[num_gentle:]]


def pooled(trainings: Sequence[Sequence[Candidate]]) -> list[Candidate]:
    """Return the candidates that all trainings have in common, with all gains.

    The rest is the best one's.
    """
    common = []
    for kind in (candidate.kind for candidate in trainings[0]):
        same = [
            candidate for training in trainings for candidate in training if candidate.kind == kind
        ]
        if len(same) == len(trainings):
            best = max(same, key=lambda candidate: float(np.sum(candidate.gains)))
            common.append(
                replace(best, gains=tuple(gain for candidate in same for gain in candidate.gains))
            )
    return common


def choose(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the candidate to take, None for the network as it is.

    Losses count HARM-fold. Among those whose gain exceeds chance (`is_gain`), that with the best
    mean is taken, or the first one, since gentler ones come first, that keeps KEPT_GAIN of this
    mean and whose distance from it chance explains. Where there are models with one weight, these
    and the gentler ones are compared first; the trained model, with its many weights and biases,
    must then be better than what they choose by more than chance, on MIN_DECIDING cases or more.
    """
    useful = [
        candidate
        for candidate in candidates
        if is_gain(candidate.gains) and candidate.values.mean() > 0.0
    ]
    have_one_weight = any(candidate.kind.startswith(ONE_WEIGHT) for candidate in candidates)
    compared = [candidate for candidate in useful if not have_one_weight or candidate.kind != CRF]
    full = next(
        (candidate for candidate in useful if have_one_weight and candidate.kind == CRF), None
    )
    if not compared:
        return full
    best = max(
        (candidate.values for candidate in compared), key=lambda values: float(values.mean())
    )
    kept = [
        each
        for each in compared
        if each.values.mean() >= KEPT_GAIN * float(best.mean()) and not is_gain(best - each.values)
    ]
    is_better = (
        full is not None
        and len(full.gains) >= MIN_DECIDING
        and is_gain(full.values - kept[0].values)
    )
    if is_better:
        return full
    return kept[0]


def is_gain(gains: Sequence[float] | NDArray[np.float64]) -> bool:
    """Return whether gains of cases exceed chance: their mean is more than its standard error above 0."""
    values = np.asarray(gains, dtype=float)
    error = float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else 0.0
    return bool(values.size) and float(values.mean()) > error


@dataclass(frozen=True)
class FitResult:
    """Result of a training."""

    start: str  # name of the start that won; NO_CRF or CALIBRATION if no CRF was better
    parameters: CrfParameters  # all weights are 0 if no CRF was better
    score: float  # mean Dice of the deciding cases with them
    network_score: float  # mean Dice of the deciding cases without a CRF
    # Dice minus the network's, per deciding case, of what won or else of the best CRF; empty if
    # unknown
    gains: tuple[float, ...]
    best_optimizer_step: int = field(metadata={"key": "best_iteration"})  # of the start that won
    # loss, Dice and bandwidths of each start over its steps
    histories: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    kind: str = NO_CRF  # of the candidate that was chosen
    # the best trained model, chosen or not; None means that nothing was trained
    trained: CrfParameters | None = None
    candidates: tuple[Candidate, ...] = ()  # simpler models first

    @property
    def is_network(self) -> bool:
        """Whether no CRF was better than the network."""
        return self.start == NO_CRF

    def describe(self) -> str:
        """Return a one-line description."""
        if self.parameters.volume.weight > 0.0:
            volume = f", volume.weight {self.parameters.volume.weight:g}"
        else:
            volume = ""
        dice = f"Dice {self.network_score:.4f} -> {self.score:.4f} on the cases that decide"
        return f"{self.start}{volume}: {dice}, at iteration {self.best_optimizer_step}"


def no_crf(
    parameters: CrfParameters, network_score: float, gains: Sequence[float] = (), **more: Any
) -> FitResult:
    """Return the result of a training in which no CRF was better than the network.

    `more` are further attributes.
    """
    return FitResult(
        NO_CRF, without_crf(parameters), network_score, network_score, tuple(gains), 0, **more
    )


def taken(chosen: Candidate, network_score: float, **more: Any) -> FitResult:
    """Return the result of a training in which a candidate was chosen.

    `more` are further attributes.
    """
    score = network_score + float(np.mean(chosen.gains))
    step = chosen.optimizer_step
    return FitResult(
        chosen.start,
        chosen.parameters,
        score,
        network_score,
        chosen.gains,
        step,
        kind=chosen.kind,
        **more,
    )
