"""A training: starts move along the gradients of some cases, others decide which is best."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crfrefine.base.plain import to_plain
from crfrefine.parameters.model import CrfParameters
from crfrefine.train import starts as setup
from crfrefine.train.choice import CRF, Candidate
from crfrefine.train.crops import Crop
from crfrefine.train.material import Material, Sample
from crfrefine.train.model import Model, Refine, dice_of, mean_defined, score
from crfrefine.train.plan import Split
from crfrefine.train.starts import Start, rounded

# Length of the last optimizer steps, as a share of the first ones'; between, it follows a cosine.
LAST_STEP_LENGTH = 0.05
# Longer gradients are shortened: near a temperature or bandwidth that makes no sense they can be of
# any size.
MAX_GRADIENT = 10.0
# More cases take longer without improving a decision, or the fit of a single number.
MAX_NEEDED = 48


def spread_out(cases: Sequence[int]) -> Sequence[int]:
    """Return at most MAX_NEEDED of some cases, evenly spread."""
    return cases[:: max(1, math.ceil(len(cases) / MAX_NEEDED))]


class Trajectory:
    """The training of one start: the model, Adam, the history, and the best values so far.

    `prior` is the strength of the pull that draws the model back to its start.
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
        self._parameters: dict[int, CrfParameters] = {}  # as a file holds them, by scored step

        self.model = Model(start.parameters, material.learn, material.sizes, material.device)
        self._origin = self.model.positions()
        self._prior = prior
        self._num_optimizer_steps = num_optimizer_steps
        groups: list[dict[str, Any]] = []
        for name, values in self.model.groups.items():
            groups.append({"params": values, "lr": step_length * setup.STEP_LENGTHS[name]})
        self._optimizer = torch.optim.Adam(groups, betas=(0.8, 0.95))

        def share_of_length(num_steps: int) -> float:
            """Return the length of the step after so many, as a share of that of the first one."""
            done = min(1.0, num_steps / num_optimizer_steps)
            half_cosine = 0.5 * (1.0 + math.cos(math.pi * done))
            return LAST_STEP_LENGTH + (1.0 - LAST_STEP_LENGTH) * half_cosine

        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, share_of_length)

    def step(self, gradients: Sequence[Tensor], loss: float) -> None:
        """Move along the gradients, one per learned parameter, and that of the prior."""
        parameters = self.model.moving
        pulls = self.model.pull(self._origin)
        for parameter, gradient, pull in zip(parameters, gradients, pulls, strict=True):
            finite = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
            parameter.grad = finite + self._prior * pull
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT)

        self._optimizer.step()
        self._schedule.step()
        self.optimizer_step += 1
        self.history.append(
            {"iteration": self.optimizer_step, "loss": loss, "thetas": self.thetas()}
        )

    def scored(self, score: float, loss: float) -> None:
        """Note how good the present values are on the deciding cases."""
        if not self.history:
            self.history.append({"iteration": 0, "thetas": self.thetas()})
        self.history[-1].update(score=score, deciding_loss=loss)
        if not math.isnan(score):
            self._parameters[self.optimizer_step] = rounded(self.model.to_parameters())

    @property
    def _scored(self) -> list[dict[str, Any]]:
        """The records of steps that were scored, and have a score."""
        return [record for record in self.history if record["iteration"] in self._parameters]

    @property
    def best_score(self) -> float:
        """The highest score so far; minus infinity before the first one."""
        return max((record["score"] for record in self._scored), default=-math.inf)

    @property
    def best(self) -> Candidate | None:
        """The values that are kept, without gains; None before the first score.

        They are those of the lowest loss among those whose score is about equal to the highest one;
        a missing loss is the worst one.
        """
        lowest = self.best_score - setup.EQUAL_DICE
        ranks = {}
        for record in self._scored:
            loss = record["deciding_loss"]
            if math.isnan(loss):
                loss = math.inf
            if record["score"] > lowest:
                ranks[record["iteration"]] = (loss, -record["score"])
        if not ranks:
            return None
        step = min(ranks, key=ranks.__getitem__)
        return Candidate(CRF, self.start.name, self._parameters[step], step, ())

    def is_over(self) -> bool:
        """Return whether training ends.

        It ends after the last optimizer step, after PATIENCE evaluations without improvement, or
        when NUM_EQUAL evaluations in a row are about equal.
        """
        if self.optimizer_step >= self._num_optimizer_steps:
            return True
        scores = []
        num_since_best = 0
        best = self.best
        best_step = 0 if best is None else best.optimizer_step
        for record in self.history:
            if "score" not in record:
                continue
            scores.append(record["score"])
            if record["iteration"] > best_step:
                num_since_best += 1
        if num_since_best >= setup.PATIENCE:
            return True
        last = scores[-setup.NUM_EQUAL :]
        return len(last) == setup.NUM_EQUAL and max(last) - min(last) < setup.EQUAL_DICE

    def thetas(self) -> dict[str, Any]:
        """Return the present bandwidths, as plain numbers."""
        bandwidths = self.model.to_parameters().bandwidths
        return {key: to_plain(value) for key, value in bandwidths.items()}

    def describe_thetas(self) -> str:
        """Return the bandwidths after the last step, as people read them."""
        described = []
        for name, value in self.history[-1]["thetas"].items():
            numbers = "/".join(f"{number:.3g}" for number in np.atleast_1d(value))
            described.append(f"{name} {numbers}")
        return ", ".join(described)


def histories_of(trajectories: Sequence[Trajectory]) -> dict[str, list[dict[str, Any]]]:
    """Return the history of each start that was tried or trained."""
    return {each.start.name: each.history for each in trajectories if each.history}


@dataclass(frozen=True)
class Fit:
    """A training on some cases, which others stop.

    `stepped` is called after each step of the optimizer.
    """

    material: Material
    stepped: Callable[[str, str, str], object]
    name: str  # name of the part of the run
    split: Split  # the cases that are trained on and those that decide
    starts: Sequence[Start]  # at least one
    num_optimizer_steps: int  # of each start
    step_length: float = 1.0  # factor on the lengths of the steps
    trains_best: bool = False  # True if all starts are tried, but only the best is trained

    def run(self) -> list[Trajectory]:
        """Train the starts, and return their trajectories, the best one first.

        With `trains_best`, only the start that is best untrained is trained.
        """
        prior = setup.PRIOR / len(self.split.training)
        trajectories = []
        for start in self.starts:
            trajectory = Trajectory(
                start, self.material, self.num_optimizer_steps, self.step_length, prior
            )
            trajectories.append(trajectory)

        trained = trajectories
        if self.trains_best:
            self.material.workers.run_parts(self._evaluate, trajectories)
            trained = [max(trajectories, key=attrgetter("best_score"))]
        self.material.workers.run_parts(self._train, trained)
        return sorted(trajectories, key=attrgetter("best_score"), reverse=True)

    def _train(self, trajectory: Trajectory) -> None:
        """Train a start to its end, or until it stops improving."""
        last = self.num_optimizer_steps
        while not trajectory.is_over():
            batch = self.material.batch(
                trajectory.optimizer_step, self.split.training, setup.BATCH_SIZE
            )
            loss, gradients = trajectory.model.gradient(
                batch, self.material.loss, self.material.workers
            )
            trajectory.step(gradients, loss)
            step = trajectory.optimizer_step
            dice = ""
            if step % setup.EVALUATE_EVERY == 0 or step == last:
                mean = self._evaluate(trajectory)
                if not math.isnan(mean):
                    dice = f", Dice {mean:.4f}"
            thetas = trajectory.describe_thetas()
            state = f"{step}/{last}: loss {loss:.4f}{dice}, {thetas}"
            self.stepped(self.name, trajectory.start.name, state)

    def _evaluate(self, trajectory: Trajectory) -> float:
        """Return the mean Dice of the deciding cases, estimated from their samples, and note it."""
        cases = spread_out(self.split.deciding)
        samples = [self.material.samples[case] for case in cases]
        dice, losses = score_cases(trajectory.model.refine, samples, self.material)
        mean = mean_defined([mean_defined(of_case) for of_case in dice])
        trajectory.scored(mean, mean_defined(losses))
        return mean


def score_cases(
    refine: Refine, samples: Sequence[Crop | Sample], material: Material
) -> tuple[NDArray[np.float64], list[float]]:
    """Return the Dice (cases, regions) and the loss of each sample or crop."""

    def score_case(sample: Crop | Sample, threads: int) -> tuple[float, NDArray[np.int64]]:
        return score(refine, sample, material.loss, threads)

    dice = []
    losses = []
    for loss, confusion in material.workers.run_on_device(score_case, samples):
        dice.append(dice_of(confusion, material.regions))
        losses.append(loss)
    return np.array(dice), losses
