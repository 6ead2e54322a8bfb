"""The candidates that trainings begin and end with, and the choice of one kind of them.

The choice rests on the cases that the folds held out. Each case counts once, with a model that has
not seen it.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from crfrefine.base.array_types import Float64
from crfrefine.metrics.overlap import mean_defined
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import (
    KERNELS,
    CompatibilityParameters,
    PostprocessParameters,
    VolumeParameters,
)

LESION_F1 = "lesion_f1"  # the metric by which rules for lesions are chosen
# Kinds of results and candidates. The first three are also the names of their starts.
NO_CRF = "no CRF"  # the network's labels as they are
CALIBRATION = "recalibration alone"  # a temperature and biases, but no weights
UNTRAINED = "untrained preset"  # the preset as it is
CRF = "CRF"  # the best trained model, with the volume term of its start
# Beginning of the kinds with one weight for all labels and no biases. Their volume term does per
# case what weights per label and biases do on average.
ONE_WEIGHT = f"{CRF} with one weight"
# Beginning of the kinds with one weight for all labels and the trained biases.
WITH_BIASES = f"{ONE_WEIGHT} and biases"

# Volume terms that are tried once the rest is trained. The first one protects at little cost, so a
# model with it counts as gentler.
VOLUMES = (VolumeParameters(0.5), VolumeParameters(0.75))
HARM = 2.0  # losses weigh twice as much as gains
# Share of the best candidate's gain, losses counted HARM-fold, that a gentler one must keep to be
# taken instead.
KEPT_GAIN = 0.95
# Fewer cases say little of cases unlike them: the trained model with a weight and a bias per label
# is never preferred to a gentler one.
MIN_FOR_MANY_WEIGHTS = 8
# From so many cases on, their common error shows, and the kinds WITH_BIASES stand for the others of
# ONE_WEIGHT. With fewer, biases follow single cases.
MIN_FOR_BIASES = 16
# By so many standard errors the model with a weight and a bias per label must be better. With one,
# the seed decided which kind was taken from a network of 80 hippocampi, and with it a tenth of the
# gain.
CLEARLY = 2.0
# Fewer cases cannot tell many candidates apart: only the recalibrated network and the trained model
# are compared.
MIN_CASES = 3
DIGITS = 6  # digits of a trained number; the folds differ in the second or third


@dataclass(frozen=True)
class Candidate:
    """A way to refine: to begin with, or to end with, and then its gains on unseen cases."""

    kind: str  # the same in all trainings of a run
    name: str = field(metadata={"key": "start"})  # that of its start, for people
    parameters: CrfParameters
    optimizer_step: int = field(default=0, metadata={"key": "best_iteration"})
    # Dice minus the network's, of each case that has a Dice; the same cases for all candidates of
    # a training.
    gains: tuple[float, ...] = ()

    @property
    def is_network(self) -> bool:
        """True if it is the network without a CRF."""
        return self.name == NO_CRF

    @property
    def values(self) -> Float64:
        """The gains, with each loss HARM-fold."""
        gains = np.asarray(self.gains, dtype=float)
        return np.where(gains < 0.0, HARM * gains, gains)

    @property
    def is_useful(self) -> bool:
        """True if its gain exceeds chance, and is above 0 with losses counted HARM-fold."""
        return is_gain(self.gains) and bool(self.values.mean() > 0.0)


def variants(
    trained: Candidate,
    volumes: Sequence[VolumeParameters] = (),
    untrained: CrfParameters | None = None,
) -> list[Candidate]:
    """Return a trained model and its variants, gentler ones first.

    `volumes` are other volume terms; if the first one has a weight, a model with it comes before
    the model without. `untrained` is the preset, where it is comparable.
    """
    parameters = trained.parameters
    volumes = [volume for volume in volumes if volume != parameters.volume]
    num_gentler = 1 if volumes and volumes[0].weight > 0.0 else 0
    gentlest = []
    models = {CRF: parameters}
    if untrained is not None:
        gentlest.append(Candidate(UNTRAINED, UNTRAINED, untrained))
        first = parameters.bilateral[0]
        kernel = replace(first, weight=float(np.mean(first.weight)))
        with_biases = rounded(replace(parameters, bilateral=(kernel,)))
        models = {
            ONE_WEIGHT: with_biases.replace(**{"mean_field.bias": 0.0}),
            WITH_BIASES: with_biases,
        }
        if num_gentler == 0:
            volumes = []

    others = []
    for volume in volumes:
        term = "no volume term"
        if volume.weight > 0.0:
            term = f"volume {volume.weight:g}"
        for kind, model in models.items():
            with_volume = model.replace(volume=volume)
            others.append(replace(trained, kind=f"{kind}, {term}", parameters=with_volume))
    num_gentler *= len(models)
    return [*gentlest, *others[:num_gentler], trained, *others[num_gentler:]]


def choose_kind(
    trainings: Sequence[Sequence[Candidate]], without: int | None = None
) -> Candidate | None:
    """Return the candidate of the kind that the cases of all trainings choose; None for no CRF.

    `without` is the number of a training whose cases do not count: those that it held out must
    not choose its own kind.
    """
    # The same rule for each of these choices: that of the fewest cases which one of them has.
    sizes = []
    for candidates in trainings:
        sizes.append(max((len(candidate.gains) for candidate in candidates), default=0))
    return choose_candidate(pooled(trainings, without), sum(sizes) - max(sizes))


def pooled(trainings: Sequence[Sequence[Candidate]], without: int | None = None) -> list[Candidate]:
    """Return the candidates that all trainings have in common, with the gains of all cases.

    Their other values are those of their best training. `without` is the number of a training whose
    cases do not count.
    """
    by_kind: dict[str, list[Candidate]] = {}
    for candidate in itertools.chain.from_iterable(trainings):
        by_kind.setdefault(candidate.kind, []).append(candidate)
    common = []
    for same in by_kind.values():
        if len(same) == len(trainings):
            counted = [one for number, one in enumerate(same) if number != without]
            best = max(counted, key=lambda candidate: float(np.sum(candidate.gains)))
            gains = itertools.chain.from_iterable(candidate.gains for candidate in counted)
            common.append(replace(best, gains=tuple(gains)))
    return common


def choose_candidate(candidates: Sequence[Candidate], num_cases: int) -> Candidate | None:
    """Return the candidate to take; None means the network as it is.

    Only useful candidates are compared, gentler ones first. The first candidate about as good as
    the best one is taken. Where there are models with one weight, the trained model, with its many
    weights and biases, is left out of this comparison. It is taken if no other candidate is useful,
    or if it is clearly better than the one that the comparison takes. `num_cases` decides how many
    candidates can be told apart, and whether models with one weight have biases.
    """
    if num_cases < MIN_CASES:
        candidates = [each for each in candidates if each.kind in (CALIBRATION, CRF)]
    has_biases = any(candidate.kind.startswith(WITH_BIASES) for candidate in candidates)
    wants_biases = has_biases and num_cases >= MIN_FOR_BIASES
    compared = []
    for candidate in candidates:
        with_biases = candidate.kind.startswith(WITH_BIASES)
        if not candidate.kind.startswith(ONE_WEIGHT) or with_biases == wants_biases:
            compared.append(candidate)
    useful = [candidate for candidate in compared if candidate.is_useful]
    if not any(candidate.kind.startswith(ONE_WEIGHT) for candidate in compared):
        return _gentlest_of_best(useful)

    trained = None
    gentler_ones = []
    for candidate in useful:
        if candidate.kind == CRF:
            trained = candidate
        else:
            gentler_ones.append(candidate)
    gentler = _gentlest_of_best(gentler_ones)
    if trained is None or gentler is None:
        return gentler or trained
    if num_cases >= MIN_FOR_MANY_WEIGHTS and is_gain(trained.values - gentler.values, CLEARLY):
        return trained
    return gentler


def _gentlest_of_best(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the first candidate that is about as good as the best one; None without candidates."""
    if not candidates:
        return None
    means = [float(candidate.values.mean()) for candidate in candidates]
    lowest = KEPT_GAIN * max(means)
    pairs = zip(candidates, means, strict=True)
    return next(candidate for candidate, mean in pairs if mean >= lowest)


Choice = TypeVar("Choice")
# The mean Dice of each choice on every case, (cases).
Scores = dict[Choice, Float64]


def ranked(scores: Mapping[Choice, Float64], cases: Sequence[int]) -> list[Choice]:
    """Return the choices, best first by their mean Dice on some cases; 0 where none has a Dice.

    Equals keep their order.
    """
    means = {}
    for choice, dice in scores.items():
        means[choice] = np.nan_to_num(mean_defined(dice[list(cases)]))
    return sorted(means, key=means.__getitem__, reverse=True)


def is_gain(gains: Sequence[float] | Float64, num_errors: float = 1.0) -> bool:
    """Return whether gains of cases exceed chance.

    They do if their mean is more than so many of its standard errors above 0.
    """
    values = np.asarray(gains, dtype=float)
    if values.size == 0:
        return False
    error = 0.0
    if values.size > 1:
        error = float(values.std(ddof=1)) / math.sqrt(values.size)
    return float(values.mean()) > num_errors * error


def no_crf(parameters: CrfParameters, gains: tuple[float, ...] = ()) -> Candidate:
    """Return the network without a CRF; all weights of its parameters are 0."""
    return Candidate(NO_CRF, NO_CRF, without_crf(parameters), 0, gains)


def without_crf(parameters: CrfParameters) -> CrfParameters:
    """Return the model that leaves the network's labels as they are.

    All of its weights are 0, and it has no postprocessing.
    """
    plain = replace(
        parameters,
        bilateral=parameters.bilateral[:1],
        compatibility=CompatibilityParameters(),
        postprocess=PostprocessParameters(),
    )
    changes = {f"{kind}.weight": 0.0 for kind in KERNELS}
    changes |= {"volume.weight": 0.0, "mean_field.temperature": 1.0, "mean_field.bias": 0.0}
    return plain.replace(**changes)


def rounded(parameters: CrfParameters) -> CrfParameters:
    """Return the parameters with numbers of a few digits."""
    table = parameters.to_dict()
    trained = {name: table[name] for name in (*KERNELS, "compatibility", "mean_field")}

    def round_number(text: str) -> float:
        return float(f"{float(text):.{DIGITS}g}")

    table.update(json.loads(json.dumps(trained), parse_float=round_number))
    return CrfParameters.from_dict(table)
