"""The models that training starts from, the candidates that it ends with, and the choice of one.

The best bandwidths differ tenfold between data sets, so several are tried. Lengths are in voxels,
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
DIGITS = 6  # digits of a trained number; the folds differ in the second or third

# Kinds of results and candidates. The first three are also the names of their starts.
NO_CRF = "no CRF"  # the network's labels as they are
CALIBRATION = "recalibration alone"  # a temperature and biases, but no weights
UNTRAINED = "preset default, untrained"  # the preset as it is
CRF = "CRF"  # the best trained model, with the volume term of its start
# Beginning of the kinds with one weight for all labels and no biases. Their volume term does per
# case what weights per label and biases do on average.
ONE_WEIGHT = f"{CRF} with one weight"

# Volume terms that are tried once the rest is trained. The first one protects at little cost, so a
# model with it counts as gentler.
VOLUMES = (VolumeParameters(0.5), VolumeParameters(0.75))
HARM = 2.0  # losses weigh twice as much as gains
# Share of the best candidate's gain, losses counted HARM-fold, that a gentler one must keep to be
# taken instead.
KEPT_GAIN = 0.95
# With fewer deciding cases, which say little of cases unlike them, the trained model is never
# preferred to a gentler one.
MIN_DECIDING = 8
# Fewer cases cannot tell many candidates apart: only the recalibrated network and the trained model
# are candidates.
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
    """Return the models to start from.

    These are the built-in models, or the user's model `base` and its variants with built-in
    bandwidths.
    """
    starts = []
    if base is None:
        sharpened = CrfParameters().replace(**{"mean_field.temperature": TEMPERATURE})
        model = prepare(sharpened, learn, num_labels, num_modalities)
    else:
        model = prepare(base, learn, num_labels, num_modalities)
        starts.append(Start("given", model))
        if "theta" not in learn:
            return starts

    first = model.bilateral[0]
    lengths, unit = _lengths_to_try(model, spacing)
    weights = WEIGHTS if "weights" in learn else WEIGHTS[:1]
    for length, beta, weight in itertools.product(lengths, THETA_BETAS, weights):
        alphas = _full_like(first.theta_alpha, length)
        kernel = replace(first, theta_alpha=alphas, theta_beta=_full_like(first.theta_beta, beta))
        name = f"theta_alpha {length:.3g} {unit}, theta_beta {beta:g}"
        if "weights" in learn:
            kernel = replace(kernel, weight=_full_like(first.weight, weight))
            name += f", weight {weight:g}"
        starts.append(Start(name, replace(model, bilateral=(kernel, *model.bilateral[1:]))))
    return starts


def _lengths_to_try(model: CrfParameters, spacing: Sequence[float]) -> tuple[list[float], str]:
    """Return the bandwidths of position to try, and their unit."""
    if model.counts_network_voxels:
        return [float(np.max(model.bilateral[0].theta_alpha))], "voxels of the network"
    if model.mean_field.positions == "voxels":
        return list(THETA_ALPHA_VOXELS), "voxels"
    voxel = voxel_length(spacing)
    return [alpha * voxel for alpha in THETA_ALPHA_VOXELS], "mm"


def voxel_length(spacing: Sequence[float]) -> float:
    """Return the side in mm of a cube as large as a voxel."""
    return math.prod(spacing) ** (1.0 / len(spacing))


def _full_like(value: float | tuple[float, ...], number: float) -> float | tuple[float, ...]:
    """Return the number as often as `value` has entries."""
    if isinstance(value, tuple):
        return (number,) * len(value)
    return number


def _spread(value: float | tuple[float, ...], count: int) -> tuple[float, ...]:
    """Return an entry for each of some labels or modalities."""
    if isinstance(value, tuple):
        return value
    return (value,) * count


def prepare(
    parameters: CrfParameters, learn: Sequence[str], num_labels: int, num_modalities: int
) -> CrfParameters:
    """Return the model with as many parameters as are to be learned.

    These are a weight per label, a bandwidth of intensity per modality, or a full matrix.
    """
    kernels = []
    for kernel in parameters.bilateral:
        if "weights" in learn and not parameters.counts_network_voxels:
            kernel = replace(kernel, weight=_spread(kernel.weight, num_labels))
        if "theta" in learn:
            kernel = replace(kernel, theta_beta=_spread(kernel.theta_beta, num_modalities))
        kernels.append(kernel)

    compatibility = parameters.compatibility
    if "compatibility" in learn and "weights" not in learn and compatibility.matrix is None:
        potts = 1.0 - np.eye(num_labels)
        matrix = tuple(tuple(row) for row in potts.tolist())
        compatibility = CompatibilityParameters(kind="matrix", matrix=matrix)

    mean_field = replace(parameters.mean_field, num_iterations=NUM_ITERATIONS, tolerance=0.0)
    return replace(
        parameters, bilateral=tuple(kernels), compatibility=compatibility, mean_field=mean_field
    )


def without_crf(parameters: CrfParameters) -> CrfParameters:
    """Return the model that leaves the network's labels as they are.

    All of its weights are 0, and it has no postprocessing.
    """
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
    trained = {
        name: table[name] for name in ("bilateral", "spatial", "compatibility", "mean_field")
    }
    table.update(json.loads(json.dumps(trained), parse_float=_rounded_number))
    return CrfParameters.from_dict(table)


def _rounded_number(text: str) -> float:
    return float(f"{float(text):.{DIGITS}g}")


class Rivals(NamedTuple):
    """Candidates beside the recalibrated network and the trained model."""

    # If the first one has a weight, a model with it comes before the model without.
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

    @property
    def is_useful(self) -> bool:
        """True if its gain exceeds chance, and is above 0 with losses counted HARM-fold."""
        return is_gain(self.gains) and bool(self.values.mean() > 0.0)

    def is_about_as_good_as(self, best: Candidate) -> bool:
        """Return whether it keeps KEPT_GAIN of the best gain, and chance explains the rest."""
        keeps_gain = self.values.mean() >= KEPT_GAIN * float(best.values.mean())
        return bool(keeps_gain) and not is_gain(best.values - self.values)

    def is_surely_better_than(self, gentler: Candidate) -> bool:
        """Return whether it is better by more than chance, on MIN_DECIDING cases or more."""
        return len(self.gains) >= MIN_DECIDING and is_gain(self.values - gentler.values)


def variants(trained: CrfParameters, rivals: Rivals) -> list[tuple[str, CrfParameters]]:
    """Return kind and parameters of a trained model and of its rivals, gentler ones first."""
    volumes = [volume for volume in rivals.volumes if volume != trained.volume]
    num_gentler = 1 if volumes and volumes[0].weight > 0.0 else 0
    gentlest = []
    kind = CRF
    model = trained
    if rivals.untrained is not None:
        gentlest.append((UNTRAINED, rivals.untrained))
        kind = ONE_WEIGHT
        model = _with_one_weight(trained)
        if num_gentler == 0:
            volumes = []

    with_volumes = []
    for volume in volumes:
        term = "no volume term"
        if volume.weight > 0.0:
            term = f"volume {volume.weight:g}"
        with_volumes.append((f"{kind}, {term}", model.replace(volume=volume)))
    return [*gentlest, *with_volumes[:num_gentler], (CRF, trained), *with_volumes[num_gentler:]]


def _with_one_weight(trained: CrfParameters) -> CrfParameters:
    """Return a model with one kernel, the mean of its weights for all labels, and no biases."""
    first = trained.bilateral[0]
    kernel = replace(first, weight=float(np.mean(first.weight)))
    mean_field = replace(trained.mean_field, bias=0.0)
    return rounded(replace(trained, bilateral=(kernel,), mean_field=mean_field))


def pooled(trainings: Sequence[Sequence[Candidate]]) -> list[Candidate]:
    """Return the candidates that all trainings have in common.

    Each has the gains of all trainings; its other values are those of its best training.
    """
    by_kind: dict[str, list[Candidate]] = {}
    for candidate in itertools.chain.from_iterable(trainings):
        by_kind.setdefault(candidate.kind, []).append(candidate)
    common = []
    for same in by_kind.values():
        if len(same) == len(trainings):
            best = max(same, key=lambda candidate: float(np.sum(candidate.gains)))
            gains = itertools.chain.from_iterable(candidate.gains for candidate in same)
            common.append(replace(best, gains=tuple(gains)))
    return common


def choose(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the candidate to take; None means the network as it is.

    Only useful candidates are compared, gentler ones first. The first one that is about as good as
    the best one is taken. Where there are models with one weight, the trained model, with its many
    weights and biases, is left out of this comparison. It is taken if no other candidate is useful,
    or if it is surely better than the one that the comparison takes.
    """
    useful = [candidate for candidate in candidates if candidate.is_useful]
    if not any(candidate.kind.startswith(ONE_WEIGHT) for candidate in candidates):
        return _gentlest_of_best(useful)

    trained = None
    gentler_ones = []
    for candidate in useful:
        if candidate.kind == CRF:
            trained = candidate
        else:
            gentler_ones.append(candidate)
    gentler = _gentlest_of_best(gentler_ones)
    if trained is None:
        return gentler
    if gentler is None or trained.is_surely_better_than(gentler):
        return trained
    return gentler


def _gentlest_of_best(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the first candidate that is about as good as the best one; None without candidates."""
    if not candidates:
        return None
    best = max(candidates, key=lambda candidate: float(candidate.values.mean()))
    return next(candidate for candidate in candidates if candidate.is_about_as_good_as(best))


def is_gain(gains: Sequence[float] | NDArray[np.float64]) -> bool:
    """Return whether gains of cases exceed chance.

    They do if their mean is more than its standard error above 0.
    """
    values = np.asarray(gains, dtype=float)
    if values.size == 0:
        return False
    error = 0.0
    if values.size > 1:
        error = float(values.std(ddof=1)) / math.sqrt(values.size)
    return float(values.mean()) > error


@dataclass(frozen=True)
class FitResult:
    """Result of a training."""

    start: str  # name of the start that won; NO_CRF or CALIBRATION if no CRF was better
    parameters: CrfParameters  # all weights are 0 if no CRF was better
    score: float  # mean Dice of the deciding cases with these parameters
    network_score: float  # mean Dice of the deciding cases without a CRF
    # Dice minus the network's of each deciding case, for the candidate that won, or else for the
    # best CRF; empty if it is not known.
    gains: tuple[float, ...]
    best_optimizer_step: int = field(metadata={"key": "best_iteration"})  # of the start that won
    # Loss, Dice and bandwidths of each start over its steps.
    histories: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    kind: str = NO_CRF  # of the candidate that was chosen
    # The best trained model, chosen or not; None means that nothing was trained.
    trained: CrfParameters | None = None
    candidates: tuple[Candidate, ...] = ()  # simpler models first

    @property
    def is_network(self) -> bool:
        """True if no CRF was better than the network."""
        return self.start == NO_CRF

    def describe(self) -> str:
        """Return a one-line description."""
        volume = ""
        if self.parameters.volume.weight > 0.0:
            volume = f", volume.weight {self.parameters.volume.weight:g}"
        dice = f"Dice {self.network_score:.4f} -> {self.score:.4f} on the cases that decide"
        return f"{self.start}{volume}: {dice}, at iteration {self.best_optimizer_step}"


def no_crf(
    parameters: CrfParameters, network_score: float, gains: Sequence[float] = ()
) -> FitResult:
    """Return the result of a training in which no CRF was better than the network."""
    network = without_crf(parameters)
    return FitResult(NO_CRF, network, network_score, network_score, tuple(gains), 0)


def taken(chosen: Candidate, network_score: float) -> FitResult:
    """Return the result of a training in which a candidate was chosen."""
    return FitResult(
        chosen.start,
        chosen.parameters,
        network_score + float(np.mean(chosen.gains)),
        network_score,
        chosen.gains,
        chosen.optimizer_step,
        kind=chosen.kind,
    )
