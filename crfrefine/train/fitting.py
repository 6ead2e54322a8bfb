"""One training: several starts, of which fewer and fewer continue, and the network and its recalibration, which they must beat.

The state after each optimizer step goes to a hook, so that a stopped run can continue exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from crfrefine.parameters.model import CrfParameters
from crfrefine.runs.execution.threads import Workers
from crfrefine.train import starts as setup
from crfrefine.train.candidates import CALIBRATION, CRF, NO_RIVALS, UNTRAINED, Candidate, FitResult, Rivals, choose, no_crf, taken, variants
from crfrefine.train.folds import Split
from crfrefine.train.material import Material
from crfrefine.train.model import CaseScore, Model, calibrated_score, mean_defined, mean_dice, network_score
from crfrefine.train.observer import Step
from crfrefine.train.session import Session
from crfrefine.train.starts import Schedule, Start
from crfrefine.train.trajectory import Trajectory

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.train.crops import Crop
    from crfrefine.train.material import Sample

MAX_DECIDING = 48
"""More deciding cases take longer without improving the decision."""


@dataclass(frozen=True)
class Hooks:
    """Callbacks of a training while it runs: `stepped` gets the trajectory, the loss, and the Dice if it was just measured.

    `saved` gets the state after each optimizer step; `is_over` says whether the time is up.
    """

    stepped: Callable[[Trajectory, float, float | None], None]
    saved: Callable[[dict[str, Any]], None]
    is_over: Callable[[], bool]


@dataclass(frozen=True)
class Task:
    """A training to be done.

    Attributes:
        name: of the part of the run.
        split: the cases that are trained on and those that decide.
        starts: at least one.
        schedule: how long it goes on.
        num_left: trainings that are still to be done in the run, this one included.
        calibrated: the network recalibrated on the cases that are trained on, without weights; None: that is not learned.
        rivals: what else is tried.
        kind: of the one candidate, where it is chosen already; None: the cases that decide choose.
    """

    name: str
    split: Split
    starts: Sequence[Start]
    schedule: Schedule
    num_left: int = 1
    calibrated: CrfParameters | None = None
    rivals: Rivals = NO_RIVALS
    kind: str | None = None


class Fit:
    """A training on some cases; `state` is that of an earlier object with the same arguments, to continue from."""

    def __init__(self, material: Material, task: Task, workers: Workers, state: dict[str, Any] | None = None) -> None:
        self._material = material
        self._task = task
        self._workers = workers
        self._targets = task.schedule.targets
        prior = setup.PRIOR / len(task.split.training)
        self._trajectories = [
            Trajectory(start, material.learn, material.sizes, task.schedule, prior=prior, device=material.device) for start in task.starts
        ]
        self._active = list(range(len(task.starts)))
        self._rung = 0
        self._position = 0
        self._is_stopped = False
        deciding = task.split.deciding
        self._deciding = deciding[:: max(1, math.ceil(len(deciding) / MAX_DECIDING))]
        if state is not None:
            self._restore(state)

    @property
    def num_optimizer_steps(self) -> int:
        """Number of steps so far, of all starts together."""
        return sum(trajectory.optimizer_step for trajectory in self._trajectories)

    def state(self) -> dict[str, Any]:
        """Return everything needed to continue, as JSON values."""
        trajectories = [trajectory.state() for trajectory in self._trajectories]
        return {
            "rung": self._rung,
            "position": self._position,
            "active": list(self._active),
            "trajectories": trajectories,
            "is_stopped": self._is_stopped,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self._rung, self._position, self._active = state["rung"], state["position"], list(state["active"])
        self._is_stopped = state["is_stopped"]
        for trajectory, own in zip(self._trajectories, state["trajectories"], strict=True):
            trajectory.restore(own)

    def run(self, hooks: Hooks) -> FitResult:
        """Train, and return the result."""
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
            # The best start was found useful when the starts were tried, however little it was trained.
            self._trajectories[0].scored(*self._evaluate(self._trajectories[0]))
        return self._result(network)

    def _must_stop(self, hooks: Hooks) -> bool:
        """Return whether the time is up, and record that work was left to do."""
        self._is_stopped = self._is_stopped or hooks.is_over()
        return self._is_stopped

    def _train(self, trajectory: Trajectory, target: int, is_last: bool, hooks: Hooks) -> None:
        """Train a start up to an optimizer step, or until it stops improving."""
        if target == 0 and not trajectory.history:
            trajectory.scored(*self._evaluate(trajectory))
        while trajectory.optimizer_step < target:
            if (is_last and trajectory.evaluations_since_best() >= setup.PATIENCE) or self._must_stop(hooks):
                return
            loss = self._step(trajectory)
            score = None
            if trajectory.optimizer_step % setup.EVALUATE_EVERY == 0 or trajectory.optimizer_step == target:
                trajectory.scored(*self._evaluate(trajectory))
                score = None if math.isnan(trajectory.last_score) else trajectory.last_score
            hooks.saved(self.state())
            hooks.stepped(trajectory, loss, score)

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
        """Return the scores of the deciding cases: of their whole crops, or of what is given in their place."""
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
        found = self._candidates(best, of_network)
        trained = best.best_parameters() if math.isfinite(best.best_score) else None
        more = {"histories": histories, "stopped_by_time": self._is_stopped, "candidates": tuple(found), "trained": trained}
        chosen = choose(found)
        if chosen is None:
            gains = next((one.gains for one in found if one.kind == CRF), ())
            return no_crf(best.start.parameters, network_mean, gains, **more)
        return taken(chosen, network_mean, **more)

    def _candidates(self, best: Trajectory, of_network: NDArray[np.float64]) -> list[Candidate]:
        """Return what there is to choose from, simpler models first."""
        calibrated, chosen = self._task.calibrated, self._task.kind
        found = []
        if calibrated is not None and chosen in (None, CALIBRATION):
            crops, loss, device = self._material.crops, self._material.loss, self._material.device
            scores = self._workers.run_on_device(lambda case, _: calibrated_score(calibrated, crops[case], loss, device), self._deciding)
            gains = _defined(self._dice(scores) - of_network)
            found.append(Candidate(CALIBRATION, CALIBRATION, calibrated, 0, gains))
        if not math.isfinite(best.best_score):
            return found
        # Time that is up leaves none for anything but the trained model, unless something else is chosen already.
        rivals = self._task.rivals if chosen is not None or not self._is_stopped else NO_RIVALS
        for kind, parameters in variants(best.best_parameters(), rivals):
            if chosen in (None, kind):
                scores = self._scores(Model(parameters, (), self._material.sizes, self._material.device))
                gains = _defined(self._dice(scores) - of_network)
                start, step = (UNTRAINED, 0) if kind == UNTRAINED else (best.name, best.best_optimizer_step)
                found.append(Candidate(kind, start, parameters, step, gains))
        return found


def _defined(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(values[~np.isnan(values)].tolist())


def train(task: Task, material: Material, session: Session) -> FitResult:
    """Do a training as part of a run, and return what came of it; the caller notes it in the session."""

    def stepped(trajectory: Trajectory, loss: float, score: float | None) -> None:
        text = ", ".join(f"{name} {_numbers(value)}" for name, value in trajectory.thetas().items())
        steps = trajectory.optimizer_step, trajectory.num_optimizer_steps
        session.observer.stepped(Step(task.name, trajectory.name, *steps, loss, score, text))
        session.stepped()

    session.budget.start_part(task.num_left)
    fit = Fit(material, task, session.workers, session.done.training)
    session.training_begun(fit.num_optimizer_steps)
    result = fit.run(Hooks(stepped, session.note_training, session.budget.is_part_over))
    session.training_finished(task.schedule.num_planned(len(task.starts)))
    if result.stopped_by_time and result.is_network:
        session.observer.note(f"{task.name}: the time ran out before a CRF was better than the network alone")
    return result


def _numbers(value: Any) -> str:
    return "/".join(f"{number:.3g}" for number in (value if isinstance(value, list) else (value,)))
