"""A training: starts that move along the gradients of some cases, and the candidate that other cases choose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crfrefine.base.plain import to_plain
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import BANDWIDTHS
from crfrefine.train import starts as setup
from crfrefine.train.crops import Crop
from crfrefine.train.material import Material, Sample
from crfrefine.train.model import (
    Model,
    Refine,
    mean_defined,
    mean_dice,
    network_refiner,
    refiner_of,
    score,
)
from crfrefine.train.observer import Workers
from crfrefine.train.plan import Split
from crfrefine.train.starts import (
    Candidate,
    FitResult,
    Rivals,
    Start,
    choose,
    no_crf,
    rounded,
    taken,
    variants,
)

# Length of the last optimizer steps, as a share of that of the first ones; between them half a
# cosine.
LAST_STEP_LENGTH = 0.05
# Longer gradients are shortened: near a temperature or bandwidth that makes no sense they can be of
# any size.
MAX_GRADIENT = 10.0
MAX_DECIDING = 48  # more deciding cases take longer without improving the decision


class Trajectory:
    """The training of one start: the model, Adam, the history, and the best values so far.

    `prior` pulls it back to its start.
    """

    def __init__(
        self,
        start: Start,
        material: Material,
        num_optimizer_steps: int,
        step_length: float = 1.0,
        prior: float = 0.0,
    ) -> None:
        self.start = start
        self.optimizer_step = 0
        self.history: list[dict[str, Any]] = []
        self.best_score = -math.inf
        self.best_optimizer_step = 0
        # as a file holds them; None until the first evaluation
        self.best_parameters: CrfParameters | None = None
        self.model = Model(start.parameters, material.learn, material.sizes, material.device)
        self._origin = self.model.positions()
        self._prior = prior
        self._num_optimizer_steps = num_optimizer_steps
        self._step_lengths = [
            step_length * setup.STEP_LENGTHS[group] for group in self.model.groups
        ]
        self._optimizer = torch.optim.Adam(
            [{"params": values} for values in self.model.groups.values()], betas=(0.8, 0.95)
        )

    def step(self, gradients: Sequence[Tensor], loss: float) -> None:
        """Move along the gradients, one per learned parameter, and that of the prior."""
        parameters = [parameter for _, parameter in self.model.learned]
        for parameter, gradient, pull in zip(
            parameters, gradients, self.model.pull(self._origin), strict=True
        ):
            parameter.grad = (
                torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0) + self._prior * pull
            )
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT)
        share = min(1.0, self.optimizer_step / self._num_optimizer_steps)
        factor = LAST_STEP_LENGTH + (1.0 - LAST_STEP_LENGTH) * 0.5 * (
            1.0 + math.cos(math.pi * share)
        )
        for group, step_length in zip(
            self._optimizer.param_groups, self._step_lengths, strict=True
        ):
            group["lr"] = step_length * factor
        self._optimizer.step()
        self.optimizer_step += 1
        self.history.append(
            {"iteration": self.optimizer_step, "loss": loss, "thetas": self.thetas()}
        )

    def scored(self, score: float, loss: float) -> None:
        """Note how good the present values are on the deciding cases, and keep them if they are the best."""
        if not self.history:
            self.history.append({"iteration": 0, "thetas": self.thetas()})
        self.history[-1].update(score=score, deciding_loss=loss)
        if score > self.best_score:
            self.best_score = score
            self.best_optimizer_step = self.optimizer_step
            self.best_parameters = rounded(self.model.to_parameters())

    def is_over(self) -> bool:
        """Return whether the last optimizer step is made, or PATIENCE evaluations brought no improvement."""
        since_best = sum(
            "score" in record and record["iteration"] > self.best_optimizer_step
            for record in self.history
        )
        return self.optimizer_step >= self._num_optimizer_steps or since_best >= setup.PATIENCE

    def thetas(self) -> dict[str, Any]:
        """Return the present bandwidths, as plain numbers."""
        parameters = self.model.to_parameters()
        values: dict[str, Any] = {}
        for number, kernel in enumerate(parameters.bilateral):
            prefix = f"bilateral.{number}." if len(parameters.bilateral) > 1 else "bilateral."
            values |= {prefix + name: to_plain(getattr(kernel, name)) for name in BANDWIDTHS}
        if parameters.spatial.weight:
            values["spatial.theta_gamma"] = to_plain(parameters.spatial.theta_gamma)
        return values


@dataclass(frozen=True)
class Fit:
    """A training on some cases, and the choice of a candidate by others.

    `stepped` is called after each step of the optimizer.
    """

    material: Material
    workers: Workers
    stepped: Callable[[str, str, str], object]
    name: str  # of the part of the run
    split: Split  # the cases that are trained on and those that decide
    starts: Sequence[Start]  # at least one
    num_optimizer_steps: int  # of each start
    step_length: float = 1.0  # factor on the lengths of the steps
    trains_best: bool = False  # whether the starts are only tried, and the best one is trained
    # the network recalibrated, without weights; None means that it is not a candidate
    calibrated: CrfParameters | None = None
    rivals: Rivals = setup.NO_RIVALS  # further candidates
    # kind of the only candidate, where it is chosen already; None means that the deciding cases
    # choose
    kind: str | None = None

    def run(self) -> FitResult:
        """Train, and return the candidate that the cases choose, among the recalibrated network, the best CRF and its rivals."""
        network = self._score(network_refiner(self.material.device), self.material.crops)[0]
        prior = setup.PRIOR / len(self.split.training)
        trajectories = [
            Trajectory(start, self.material, self.num_optimizer_steps, self.step_length, prior)
            for start in self.starts
        ]
        trained = trajectories
        if self.trains_best:
            for trajectory in trajectories:
                trajectory.scored(*self._evaluate(trajectory))
            trained = [max(trajectories, key=lambda trajectory: trajectory.best_score)]
        for trajectory in trained:
            self._train(trajectory)
        best = max(trajectories, key=lambda trajectory: trajectory.best_score)
        candidates = self._candidates(best, network)
        histories = {
            trajectory.start.name: trajectory.history
            for trajectory in trajectories
            if trajectory.history
        }
        more = {
            "histories": histories,
            "candidates": tuple(candidates),
            "trained": best.best_parameters,
        }
        chosen = choose(candidates)
        if chosen is None:
            gains = next(
                (candidate.gains for candidate in candidates if candidate.kind == setup.CRF), ()
            )
            return no_crf(best.start.parameters, mean_defined(network), gains, **more)
        return taken(chosen, mean_defined(network), **more)

    def _train(self, trajectory: Trajectory) -> None:
        """Train a start to its end, or until it stops improving."""
        material = self.material
        last = self.num_optimizer_steps
        while not trajectory.is_over():
            batch = material.batch(trajectory.optimizer_step, self.split.training, setup.BATCH_SIZE)
            results = self.workers.run_on_device(
                lambda crop, threads: trajectory.model.gradient(crop, material.loss, threads), batch
            )
            losses, gradients = zip(*results, strict=True)
            loss = sum(losses) / len(batch)
            dice = ""
            trajectory.step(
                [sum(parts[1:], parts[0]) / len(batch) for parts in zip(*gradients, strict=True)],
                loss,
            )
            step = trajectory.optimizer_step
            if step % setup.EVALUATE_EVERY == 0 or step == last:
                mean, deciding_loss = self._evaluate(trajectory)
                trajectory.scored(mean, deciding_loss)
                dice = "" if math.isnan(mean) else f", Dice {mean:.4f}"
            thetas = ", ".join(
                f"{name} {_numbers(value)}"
                for name, value in trajectory.history[-1]["thetas"].items()
            )
            self.stepped(
                self.name, trajectory.start.name, f"{step}/{last}: loss {loss:.4f}{dice}, {thetas}"
            )

    def _evaluate(self, trajectory: Trajectory) -> tuple[float, float]:
        """Return mean Dice and loss of the deciding cases, estimated from their samples."""
        dice, losses = self._score(trajectory.model.refine, self.material.samples)
        return mean_defined(dice), float(np.mean(losses))

    def _score(
        self, refine: Refine, sources: Sequence[Crop | Sample]
    ) -> tuple[NDArray[np.float64], list[float]]:
        """Return mean Dice and loss of the deciding cases, evenly thinned out to MAX_DECIDING."""
        step = max(1, math.ceil(len(self.split.deciding) / MAX_DECIDING))
        chosen = [sources[case] for case in self.split.deciding[::step]]
        return score_cases(refine, chosen, self.material, self.workers)

    def _candidates(self, best: Trajectory, network: NDArray[np.float64]) -> list[Candidate]:
        """Return the candidates to choose from, simpler models first.

        `network` is the Dice of the network on each deciding case.
        """
        tried = [] if self.calibrated is None else [(setup.CALIBRATION, self.calibrated)]
        tried += [] if best.best_parameters is None else variants(best.best_parameters, self.rivals)
        candidates = []
        for kind, parameters in tried:
            if self.kind in (None, kind):
                gains = (
                    self._score(refiner_of(kind, parameters, self.material), self.material.crops)[0]
                    - network
                )
                unmoved = kind in (setup.CALIBRATION, setup.UNTRAINED)
                start, step = (kind, 0) if unmoved else (best.start.name, best.best_optimizer_step)
                candidates.append(
                    Candidate(
                        kind, start, parameters, step, tuple(gains[~np.isnan(gains)].tolist())
                    )
                )
        return candidates


def _numbers(value: float | list[float]) -> str:
    return "/".join(f"{number:.3g}" for number in np.atleast_1d(value))


def score_cases(
    refine: Refine, samples: Sequence[Crop | Sample], material: Material, workers: Workers
) -> tuple[NDArray[np.float64], list[float]]:
    """Return mean Dice and loss of each sample or crop."""
    scores = workers.run_on_device(
        lambda sample, threads: score(refine, sample, material.loss, threads), samples
    )
    return np.array([mean_dice(confusion, material.regions) for _, confusion in scores]), [
        loss for loss, _ in scores
    ]
