"""One training: each start is trained to its end, and the network and its recalibration are what it must beat."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from crfrefine.parameters.model import CrfParameters
from crfrefine.train import starts as setup
from crfrefine.train.candidates import CALIBRATION, CRF, NO_RIVALS, UNTRAINED, Candidate, FitResult, Rivals, choose, no_crf, taken, variants
from crfrefine.train.folds import Split
from crfrefine.train.material import Material
from crfrefine.train.model import CaseScore, Model, calibrated_score, mean_defined, mean_dice, network_score
from crfrefine.train.observer import Step
from crfrefine.train.starts import Start
from crfrefine.train.threads import Workers
from crfrefine.train.trajectory import Trajectory

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.train.crops import Crop
    from crfrefine.train.material import Sample

MAX_DECIDING = 48
"""More deciding cases take longer without improving the decision."""


@dataclass(frozen=True)
class Task:
    """A training to be done.

    Attributes:
        name: of the part of the run.
        split: the cases that are trained on and those that decide.
        starts: at least one.
        num_optimizer_steps: of each start.
        step_length: factor on the lengths of the steps.
        trains_best: whether the starts are only tried, and the best one is trained.
        calibrated: the network recalibrated on the cases that are trained on, without weights; None means that it is not a candidate.
        rivals: further candidates.
        kind: kind of the only candidate, where it is chosen already; None means that the deciding cases choose.
    """

    name: str
    split: Split
    starts: Sequence[Start]
    num_optimizer_steps: int
    step_length: float = 1.0
    trains_best: bool = False
    calibrated: CrfParameters | None = None
    rivals: Rivals = NO_RIVALS
    kind: str | None = None


class Fit:
    """A training on some cases; `stepped` is called after each step of the optimizer."""

    def __init__(self, material: Material, task: Task, workers: Workers, stepped: Callable[[Step], object] = lambda _: None) -> None:
        self._material, self._task, self._workers, self._stepped = material, task, workers, stepped
        prior = setup.PRIOR / len(task.split.training)
        self._trajectories = [
            Trajectory(
                start,
                material.learn,
                material.sizes,
                task.num_optimizer_steps,
                step_length=task.step_length,
                prior=prior,
                device=material.device,
            )
            for start in task.starts
        ]
        deciding = task.split.deciding
        self._deciding = deciding[:: max(1, math.ceil(len(deciding) / MAX_DECIDING))]

    def run(self) -> FitResult:
        """Train, and return the result."""
        crops, loss, device = self._material.crops, self._material.loss, self._material.device
        network = self._workers.run_on_device(lambda case, _: network_score(crops[case], loss, device), self._deciding)
        trained = self._trajectories
        if self._task.trains_best:
            for trajectory in trained:
                trajectory.scored(*self._evaluate(trajectory))
            trained = [max(trained, key=lambda trajectory: trajectory.best_score)]
        for trajectory in trained:
            self._train(trajectory)
        return self._result(network)

    def _train(self, trajectory: Trajectory) -> None:
        """Train a start to its end, or until it stops improving."""
        last = self._task.num_optimizer_steps
        while trajectory.optimizer_step < last and trajectory.evaluations_since_best() < setup.PATIENCE:
            loss, score = self._step(trajectory), None
            if trajectory.optimizer_step % setup.EVALUATE_EVERY == 0 or trajectory.optimizer_step == last:
                trajectory.scored(*self._evaluate(trajectory))
                score = None if math.isnan(trajectory.last_score) else trajectory.last_score
            thetas = ", ".join(f"{name} {_numbers(value)}" for name, value in trajectory.thetas().items())
            self._stepped(Step(self._task.name, trajectory.name, trajectory.optimizer_step, last, loss, score, thetas))

    def _step(self, trajectory: Trajectory) -> float:
        material = self._material
        batch = material.batch(trajectory.optimizer_step, self._task.split.training, setup.BATCH_SIZE)
        results = self._workers.run_on_device(lambda crop, threads: trajectory.model.gradient(crop, material.loss, threads), batch)
        gradients: list[Tensor] = [sum(parts[1:], parts[0]) / len(batch) for parts in zip(*(r.gradients for r in results), strict=True)]
        loss = sum(result.loss for result in results) / len(batch)
        trajectory.step(gradients, loss)
        return loss

    def _evaluate(self, trajectory: Trajectory) -> tuple[float, float]:
        """Return mean Dice and loss of the deciding cases, estimated from their samples."""
        scores = self._scores(trajectory.model, self._material.samples)
        return mean_defined(self._dice(scores)), float(np.mean([score.loss for score in scores]))

    def _scores(self, model: Model, cases: Sequence[Crop] | Sequence[Sample] | None = None) -> list[CaseScore]:
        """Return the scores of the deciding cases: of their whole crops, or of their samples."""
        crops, loss = self._material.crops if cases is None else cases, self._material.loss
        return self._workers.run_on_device(lambda case, threads: model.score(crops[case], loss, threads), self._deciding)

    def _dice(self, scores: Sequence[CaseScore]) -> NDArray[np.float64]:
        return np.array([mean_dice(score.confusion, self._material.regions) for score in scores])

    def _result(self, network: Sequence[CaseScore]) -> FitResult:
        """Return the candidate that the cases choose, among the recalibrated network, the best CRF and its rivals."""
        best = max(self._trajectories, key=lambda trajectory: trajectory.best_score)
        histories = {trajectory.name: trajectory.history for trajectory in self._trajectories if trajectory.history}
        of_network = self._dice(network)
        network_mean = mean_defined(of_network)
        candidates = self._candidates(best, of_network)
        trained = best.best_parameters() if math.isfinite(best.best_score) else None
        more = {"histories": histories, "candidates": tuple(candidates), "trained": trained}
        chosen = choose(candidates)
        if chosen is None:
            gains = next((candidate.gains for candidate in candidates if candidate.kind == CRF), ())
            return no_crf(best.start.parameters, network_mean, gains, **more)
        return taken(chosen, network_mean, **more)

    def _candidates(self, best: Trajectory, of_network: NDArray[np.float64]) -> list[Candidate]:
        """Return the candidates to choose from, simpler models first."""
        calibrated, chosen = self._task.calibrated, self._task.kind
        candidates = []
        if calibrated is not None and chosen in (None, CALIBRATION):
            crops, loss, device = self._material.crops, self._material.loss, self._material.device
            scores = self._workers.run_on_device(lambda case, _: calibrated_score(calibrated, crops[case], loss, device), self._deciding)
            candidates.append(Candidate(CALIBRATION, CALIBRATION, calibrated, 0, _defined(self._dice(scores) - of_network)))
        if not math.isfinite(best.best_score):
            return candidates
        for kind, parameters in variants(best.best_parameters(), self._task.rivals):
            if chosen in (None, kind):
                scores = self._scores(Model(parameters, (), self._material.sizes, self._material.device))
                gains = _defined(self._dice(scores) - of_network)
                start, step = (UNTRAINED, 0) if kind == UNTRAINED else (best.name, best.best_optimizer_step)
                candidates.append(Candidate(kind, start, parameters, step, gains))
        return candidates


def _defined(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(values[~np.isnan(values)].tolist())


def _numbers(value: float | list[float]) -> str:
    return "/".join(f"{number:.3g}" for number in (value if isinstance(value, list) else (value,)))
