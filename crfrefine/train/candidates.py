"""The candidates of a training, measured on the cases that decide, and the choice among them: gain beyond chance, little harm.

A candidate has a kind, which is the same in all trainings of a run, so that their deciding cases can be put together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import VolumeParameters
from crfrefine.train.rounding import rounded

if TYPE_CHECKING:
    from numpy.typing import NDArray

CALIBRATION = "recalibration alone"
"""Kind of the candidate that has a temperature and biases, but no weights; also the name of its start."""

UNTRAINED = "preset default, untrained"
"""Kind of the preset as it is; also the name of its start."""

GENTLE = "CRF, half-way"
"""Kind of the model half-way from the preset to the best trained model, which is tried where few cases were trained on."""

FEW_TRAINED = 12
"""With fewer cases to train on, the half-way model is a candidate."""

CRF = "CRF"
"""Kind of the best trained model, with the volume term of its start."""

VOLUME_WEIGHTS = (0.5, 0.75)
VOLUME_KEEPS = ("argmax", "expected")
"""What is tried of the volume term, once the rest is trained. The first of both protects at little cost: it goes before no such term."""

HARM = 2.0
"""A loss of Dice counts as much as a gain of this size: a user gives up a case that got worse more than one that got better pays."""

NOISE = 0.5
"""Standard errors within which a candidate is as good as the best one."""


@dataclass(frozen=True)
class Rivals:
    """What is tried beside the recalibrated network and the trained model.

    Attributes:
        volumes: volume terms, with the trained model.
        untrained: a gentle model that fits most data a little; None: there is none that is comparable.
        prefers_first_volume: whether the model with the first of the volume terms goes before the one without.
    """

    volumes: tuple[VolumeParameters, ...] = ()
    untrained: CrfParameters | None = None
    prefers_first_volume: bool = False


NO_RIVALS = Rivals()


@dataclass(frozen=True)
class Candidate:
    """One way to refine, and what it does to the cases that decide.

    Attributes:
        kind: the same in all trainings of a run.
        start: name of the start that it was trained from.
        parameters: as a file holds them.
        optimizer_step: after which they were the best.
        gains: Dice minus the network's, per deciding case that has a Dice.
    """

    kind: str
    start: str
    parameters: CrfParameters
    optimizer_step: int
    gains: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "kind": self.kind,
            "start": self.start,
            "parameters": self.parameters.to_dict(),
            "best_iteration": self.optimizer_step,
            "gains": list(self.gains),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Candidate:
        """Return what `to_dict` was called on."""
        parameters = CrfParameters.from_dict(values["parameters"])
        return cls(values["kind"], values["start"], parameters, values["best_iteration"], tuple(values["gains"]))


def variants(trained: CrfParameters, rivals: Rivals, *, is_few: bool) -> list[tuple[str, CrfParameters]]:
    """Return kind and parameters of a trained model and of what is tried beside it, simpler and gentler ones first.

    Args:
        trained: the best trained model.
        rivals: what else is tried.
        is_few: whether it was trained on few cases.
    """
    found = []
    if rivals.untrained is not None:
        found.append((UNTRAINED, rivals.untrained))
        if is_few:
            found.append((GENTLE, half_way(rivals.untrained, trained)))
    others = [(_kind(volume), trained.replace(volume=volume)) for volume in rivals.volumes if volume != trained.volume]
    return [*found, *others[:1], (CRF, trained), *others[1:]] if rivals.prefers_first_volume else [*found, (CRF, trained), *others]


def _kind(volume: VolumeParameters) -> str:
    return f"{CRF}, volume {volume.weight:g} {volume.keep}" if volume.weight > 0.0 else f"{CRF}, no volume term"


def half_way(untrained: CrfParameters, trained: CrfParameters) -> CrfParameters:
    """Return a trained model half-way back to an untrained one: geometric means of bandwidths and temperature, means of weights and biases.

    Both have one appearance kernel, and no other kernel or penalty that is learned.
    """
    first, last = untrained.bilateral[0], trained.bilateral[0]
    kernel = replace(
        last,
        weight=_between(first.weight, last.weight, lambda one, other: (one + other) / 2),
        theta_alpha=_between(first.theta_alpha, last.theta_alpha, _geometric),
        theta_beta=_between(first.theta_beta, last.theta_beta, _geometric),
    )
    begin, end = untrained.mean_field, trained.mean_field
    mean_field = replace(
        end,
        temperature=_geometric(begin.temperature, end.temperature),
        bias=_between(begin.bias, end.bias, lambda one, other: (one + other) / 2),
    )
    return rounded(replace(trained, bilateral=(kernel,), mean_field=mean_field))


def _geometric(one: float, other: float) -> float:
    return math.sqrt(one * other)


def _between(
    first: float | tuple[float, ...], last: float | tuple[float, ...], mean: Callable[[float, float], float]
) -> float | tuple[float, ...]:
    """Return means of two values, either of which may be one for all entries."""
    count = max((len(value) for value in (first, last) if isinstance(value, tuple)), default=0)
    ones, others = (value if isinstance(value, tuple) else (value,) * max(count, 1) for value in (first, last))
    means = tuple(mean(one, other) for one, other in zip(ones, others, strict=True))
    return means if count else means[0]


def pooled(trainings: Sequence[Sequence[Candidate]]) -> list[Candidate]:
    """Return the candidates that several trainings have in common, with the gains of all their cases.

    Start, parameters and step are those of the training that they gained most in.
    """
    result = []
    for first in trainings[0] if trainings else ():
        same = [one for training in trainings for one in training if one.kind == first.kind]
        if len(same) == len(trainings):
            best = max(same, key=lambda one: float(np.sum(one.gains)))
            result.append(replace(best, gains=tuple(gain for one in same for gain in one.gains)))
    return result


def choose(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the candidate to take, None for the network as it is.

    Losses count HARM-fold. Among those whose gain exceeds chance (`is_gain`), that with the best mean is taken, or the first one whose
    distance from it is within NOISE standard errors: simpler ones come first.
    """
    useful = [one for one in candidates if is_gain(one.gains) and float(valued(one.gains).mean()) > 0.0]
    if not useful:
        return None
    best = max(useful, key=lambda one: float(valued(one.gains).mean()))
    return next(one for one in useful if one is best or not is_gain(valued(best.gains) - valued(one.gains), NOISE))


def valued(gains: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Return gains of cases with each loss HARM-fold."""
    values = np.asarray(gains, dtype=float)
    return np.where(values < 0.0, HARM * values, values)


def is_gain(gains: Sequence[float] | NDArray[np.float64], num_errors: float = 1.0) -> bool:
    """Return whether gains of cases exceed chance: their mean is more than so many of its standard errors above 0.

    No CRF is the simpler model, and is kept unless a CRF adds something.
    """
    values = np.asarray(gains, dtype=float)
    error = float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else 0.0
    return bool(values.size) and float(values.mean()) > num_errors * error
