"""One training: several starts, of which fewer and fewer go on; and the network itself, which must be beaten.

The state after each step goes to a hook, so that a run that was stopped goes on as if nothing had happened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from crfrefine.execution.threads import Workers
from crfrefine.parameters.model import CrfParameters
from crfrefine.train import starts as setup
from crfrefine.train.crops import Crop
from crfrefine.train.device import CPU, TrainingDevice
from crfrefine.train.folds import Split
from crfrefine.train.losses import Loss
from crfrefine.train.model import CaseScore, Model, mean_defined, mean_dice, network_score
from crfrefine.train.starts import Start, without_crf
from crfrefine.train.trajectory import Trajectory

MOST_DECIDING = 48
"""More cases than this do not decide better, only later."""

NO_CRF = "no CRF"
"""Name of the start that leaves the network's labels as they are."""


@dataclass(frozen=True)
class Material:
    """What all trainings of a run have in common.

    Attributes:
        crops: of all cases.
        loss: of a case.
        regions: labels of each region whose mean Dice decides.
        learn: groups of parameters that move.
        sizes: labels, modalities, axes.
        seed: of the batches.
        device: where the models compute.
    """

    crops: Sequence[Crop]
    loss: Loss
    regions: Sequence[tuple[int, ...]]
    learn: tuple[str, ...]
    sizes: tuple[int, int, int]
    seed: int
    device: TrainingDevice = CPU


@dataclass(frozen=True)
class FitResult:
    """What a training came to.

    Attributes:
        start: name of the start that won; NO_CRF where no CRF was better.
        parameters: the trained ones; with weights of 0 where no CRF was better.
        score: mean Dice of the deciding cases with them.
        network_score: mean Dice of the deciding cases without a CRF.
        gains: Dice with the best CRF above that without, of each deciding case; empty where nothing could be measured.
        best_iteration: of the start that won.
        stopped_by_time: whether the time ran out before the training was finished.
        histories: loss, Dice and bandwidths of each start over its iterations.
    """

    start: str
    parameters: CrfParameters
    score: float
    network_score: float
    gains: tuple[float, ...]
    best_iteration: int
    histories: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    stopped_by_time: bool = False

    @property
    def is_network(self) -> bool:
        """Whether no CRF was better than the network alone."""
        return self.start == NO_CRF

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "parameters": self.parameters.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FitResult:
        """Return what `to_dict` was called on."""
        return cls(**{**values, "parameters": CrfParameters.from_dict(values["parameters"]), "gains": tuple(values["gains"])})


@dataclass(frozen=True)
class Hooks:
    """What a training asks and tells while it goes on.

    Attributes:
        stepped: called with the trajectory, the loss, and the Dice where it was just measured.
        saved: called with the state after each step.
        is_over: whether the time is up.
    """

    stepped: Callable[[Trajectory, float, float | None], None]
    saved: Callable[[dict[str, Any]], None]
    is_over: Callable[[], bool]


class Fit:
    """A training on some cases.

    Args:
        material: of the run.
        split: the cases that are trained on and those that decide.
        starts: at least one.
        workers: to compute with.
        num_iterations: for the start that is trained to its end.
        rungs: after so many iterations, so many starts go on.
        rate: factor on the learning rates.
    """

    def __init__(
        self,
        material: Material,
        split: Split,
        starts: Sequence[Start],
        workers: Workers,
        *,
        num_iterations: int,
        rungs: Sequence[tuple[int, int]] = setup.RUNGS,
        rate: float = 1.0,
    ) -> None:
        self._material = material
        self._split = split
        self._workers = workers
        self._targets = [(min(iterations, num_iterations), keep) for iterations, keep in rungs] + [(num_iterations, 1)]
        prior = setup.PRIOR / len(split.training)
        self._trajectories = [
            Trajectory(start, material.learn, material.sizes, num_iterations, rate, prior, material.device) for start in starts
        ]
        self._active = list(range(len(starts)))
        self._rung = 0
        self._position = 0
        self._is_stopped = False
        step = max(1, math.ceil(len(split.deciding) / MOST_DECIDING))
        self._deciding = split.deciding[::step]

    def state(self) -> dict[str, Any]:
        """Return all that is needed to go on, as JSON has it."""
        trajectories = [trajectory.state() for trajectory in self._trajectories]
        return {
            "rung": self._rung,
            "position": self._position,
            "active": list(self._active),
            "trajectories": trajectories,
            "is_stopped": self._is_stopped,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to where `state` was taken."""
        self._rung, self._position, self._active = state["rung"], state["position"], list(state["active"])
        self._is_stopped = state["is_stopped"]
        for trajectory, own in zip(self._trajectories, state["trajectories"], strict=True):
            trajectory.restore(own)

    def run(self, hooks: Hooks) -> FitResult:
        """Train, and return what came of it."""
        crops, loss, device = self._material.crops, self._material.loss, self._material.device
        network = self._workers.run_on_device(lambda case, threads: network_score(crops[case], loss, device), self._deciding)
        while self._rung < len(self._targets) and not self._must_stop(hooks):
            target, keep = self._targets[self._rung]
            is_last = self._rung == len(self._targets) - 1
            while self._position < len(self._active):
                self._train(self._trajectories[self._active[self._position]], target, is_last, hooks)
                self._position += 1
            ranked = sorted(self._active, key=lambda number: -self._trajectories[number].best_score)
            self._active, self._rung, self._position = ranked[:keep], self._rung + 1, 0
            hooks.saved(self.state())
        if self._is_stopped and not any(math.isfinite(trajectory.best_score) for trajectory in self._trajectories):
            # The best of the starts that were tried has been seen to be worth something, however little it was trained.
            self._trajectories[0].scored(*self._evaluate(self._trajectories[0]))
        return self._result(network)

    def _must_stop(self, hooks: Hooks) -> bool:
        """Return whether the time is up, and remember that it was while there was something left to do."""
        self._is_stopped = self._is_stopped or hooks.is_over()
        return self._is_stopped

    def _train(self, trajectory: Trajectory, target: int, is_last: bool, hooks: Hooks) -> None:
        """Bring a start to an iteration, or to where it gets no better."""
        if target == 0 and not trajectory.history:
            trajectory.scored(*self._evaluate(trajectory))
        while trajectory.iteration < target:
            if (is_last and trajectory.evaluations_since_best() >= setup.PATIENCE) or self._must_stop(hooks):
                return
            loss = self._step(trajectory)
            score = None
            if trajectory.iteration % setup.EVALUATE_EVERY == 0 or trajectory.iteration == target:
                trajectory.scored(*self._evaluate(trajectory))
                score = None if math.isnan(trajectory.last_score) else trajectory.last_score
            hooks.saved(self.state())
            hooks.stepped(trajectory, loss, score)

    def _step(self, trajectory: Trajectory) -> float:
        material = self._material
        # The same cases for every start at the same iteration, so that chance does not decide between them.
        random = np.random.default_rng([material.seed, trajectory.iteration])
        batch = draw(random, material.crops, self._split.training, setup.BATCH_SIZE)
        results = self._workers.run_on_device(lambda crop, threads: trajectory.model.gradient(crop, material.loss, threads), batch)
        gradients: list[Tensor] = [sum(parts[1:], parts[0]) / len(batch) for parts in zip(*(r.gradients for r in results), strict=True)]
        loss = sum(result.loss for result in results) / len(batch)
        trajectory.step(gradients, loss)
        return loss

    def _evaluate(self, trajectory: Trajectory) -> tuple[float, float]:
        """Return mean Dice and loss of the deciding cases."""
        scores = self._scores(trajectory.model)
        return self._mean(scores), float(np.mean([score.loss for score in scores]))

    def _scores(self, model: Model) -> list[CaseScore]:
        crops, loss = self._material.crops, self._material.loss
        return self._workers.run_on_device(lambda case, threads: model.score(crops[case], loss, threads), self._deciding)

    def _mean(self, scores: Sequence[CaseScore]) -> float:
        return mean_defined(self._dice(scores))

    def _dice(self, scores: Sequence[CaseScore]) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.array([mean_dice(score.confusion, self._material.regions) for score in scores])

    def _result(self, network: Sequence[CaseScore]) -> FitResult:
        best = max(self._trajectories, key=lambda trajectory: trajectory.best_score)
        histories = {trajectory.name: trajectory.history for trajectory in self._trajectories if trajectory.history}
        network_mean = self._mean(network)
        gains = np.empty(0)
        if math.isfinite(best.best_score):
            parameters = best.best_parameters()
            gains = self._dice(self._scores(Model(parameters, (), self._material.sizes, self._material.device))) - self._dice(network)
            gains = gains[~np.isnan(gains)]
            if is_gain(gains):
                score = network_mean + float(gains.mean())
                found = best.best_iteration, histories, self._is_stopped
                return FitResult(best.name, parameters, score, network_mean, tuple(gains.tolist()), *found)
        return no_crf(best.start.parameters, network_mean, tuple(gains.tolist()), histories, self._is_stopped)


def is_gain(gains: Sequence[float] | np.ndarray[Any, np.dtype[np.float64]]) -> bool:
    """Return whether gains of cases are more than chance may do: their mean is more than its standard error above 0.

    No CRF is the simpler model, and stays where there is no more to be had.
    """
    values = np.asarray(gains, dtype=float)
    error = float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else 0.0
    return bool(values.size) and float(values.mean()) > max(error, 0.0)


def no_crf(
    parameters: CrfParameters,
    network_score: float,
    gains: tuple[float, ...] = (),
    histories: dict[str, list[dict[str, Any]]] | None = None,
    stopped_by_time: bool = False,
) -> FitResult:
    """Return the outcome of a training in which no CRF was better than the network alone."""
    return FitResult(NO_CRF, without_crf(parameters), network_score, network_score, gains, 0, histories or {}, stopped_by_time)


def draw(random: np.random.Generator, crops: Sequence[Crop], cases: Sequence[int], count: int) -> list[Crop]:
    """Return one tile each of some cases, drawn at random without repetition."""
    chosen = random.permutation(np.asarray(cases))[:count]
    batch = []
    for case in sorted(int(number) for number in chosen):
        crop = crops[case]
        batch.append(crop.tile(int(random.choice(len(crop.tiles), p=crop.tile_weights))))
    return batch
