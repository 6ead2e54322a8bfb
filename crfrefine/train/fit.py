"""A training: starts move along the gradients of some cases, others decide which is best."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import attrgetter, methodcaller
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crfrefine.base.array_types import Float64, Integers
from crfrefine.base.plain import to_plain
from crfrefine.metrics.overlap import dice_of, mean_defined
from crfrefine.parameters.model import CrfParameters
from crfrefine.train import starts as setup
from crfrefine.train.choice import CRF, Candidate, rounded
from crfrefine.train.crops import Crop
from crfrefine.train.material import Material, Sample
from crfrefine.train.model import Model, Refine, score
from crfrefine.train.plan import Split

# Length of the last optimizer steps, as a share of the first ones'; between, it follows a cosine.
LAST_STEP_LENGTH = 0.05
# Longer gradients are shortened: near a temperature or bandwidth that makes no sense they can be of
# any size.
MAX_GRADIENT = 10.0
# More cases take longer without improving a decision, or the fit of a single number.
MAX_NEEDED = 48

# Called after each step of a start, with its name and its state in words.
Stepped = Callable[[str, str], object]


def spread_out(cases: Sequence[int]) -> Sequence[int]:
    """Return at most MAX_NEEDED of some cases, evenly spread."""
    return cases[:: max(1, math.ceil(len(cases) / MAX_NEEDED))]


class Trajectory:
    """The training of one start: the model, Adam, the history, and the best values so far.

    `prior` is the strength of the pull that draws the model back to its start.
    """

    def __init__(
        self,
        start: Candidate,
        material: Material,
        num_optimizer_steps: int,
        step_length: float = 1.0,
        prior: float = 0.0,
    ) -> None:
        self.start = start
        self._material = material
        self.optimizer_step = 0
        self.history: list[dict[str, Any]] = []
        # The records of steps that have a score, and the parameters then, as a file holds them.
        self._scored: list[tuple[dict[str, Any], CrfParameters]] = []

        self.model = Model(
            start.parameters, material.plan.learn, material.plan.cases.sizes, material.device
        )
        self._origin = self.model.positions()
        self._prior = prior
        self._num_optimizer_steps = num_optimizer_steps
        groups = []
        for name, values in self.model.groups.items():
            groups.append({"params": values, "lr": step_length * setup.STEP_LENGTHS[name]})
        self._optimizer = torch.optim.Adam(groups, betas=(0.8, 0.95))

        def share_of_length(num_steps: int) -> float:
            """Return the length of the step after so many, as a share of that of the first one."""
            done = min(1.0, num_steps / num_optimizer_steps)
            half_cosine = 0.5 * (1.0 + math.cos(math.pi * done))
            return LAST_STEP_LENGTH + (1.0 - LAST_STEP_LENGTH) * half_cosine

        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, share_of_length)

    def train(self, split: Split, stepped: Stepped) -> None:
        """Train the start to its end, or until it stops improving."""
        material = self._material
        last = self._num_optimizer_steps
        while not self.is_over():
            batch = material.batch(self.optimizer_step, split.training, setup.BATCH_SIZE)
            loss, gradients = self.model.gradient(batch, material.loss, material.workers)
            self.step(gradients, loss)
            dice = ""
            if self.optimizer_step % setup.EVALUATE_EVERY == 0 or self.optimizer_step == last:
                mean = self.evaluate(split.deciding)
                if not math.isnan(mean):
                    dice = f", Dice {mean:.4f}"
            state = f"{self.optimizer_step}/{last}: loss {loss:.4f}{dice}"
            for name, value in self.history[-1]["thetas"].items():
                numbers = "/".join(f"{number:.3g}" for number in np.atleast_1d(value))
                state += f", {name} {numbers}"
            stepped(self.start.name, state)

    def evaluate(self, deciding: Sequence[int]) -> float:
        """Return the mean Dice of the deciding cases, estimated from their samples, and note it."""
        samples = [self._material.samples[case] for case in spread_out(deciding)]
        dice, losses = score_cases(self.model.refine, samples, self._material)
        mean = mean_defined([mean_defined(of_case) for of_case in dice])
        self.scored(mean, mean_defined(losses))
        return mean

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
            self._scored.append((self.history[-1], rounded(self.model.to_parameters())))

    @property
    def best_score(self) -> float:
        """The highest score so far; minus infinity before the first one."""
        return max((record["score"] for record, _ in self._scored), default=-math.inf)

    @property
    def best(self) -> Candidate | None:
        """The values that are kept, without gains; None before the first score.

        They are those of the lowest loss among those whose score is about equal to the highest one;
        a missing loss is the worst one.
        """
        lowest = self.best_score - setup.EQUAL_DICE
        best = None
        best_rank = (math.inf, math.inf)
        for record, parameters in self._scored:
            loss = record["deciding_loss"]
            rank = (math.inf if math.isnan(loss) else loss, -record["score"])
            if record["score"] > lowest and rank < best_rank:
                best_rank = rank
                best = Candidate(CRF, self.start.name, parameters, record["iteration"])
        return best

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


def histories_of(trajectories: Sequence[Trajectory]) -> dict[str, list[dict[str, Any]]]:
    """Return the history of each start that was tried or trained."""
    return {each.start.name: each.history for each in trajectories if each.history}


def fit_starts(
    material: Material,
    split: Split,
    starts: Sequence[Candidate],
    num_optimizer_steps: int,
    stepped: Stepped,
    *,
    step_length: float = 1.0,
    tolerance: float | None = None,
) -> list[Trajectory]:
    """Train the starts, and return their trajectories, the best one first.

    Args:
        material: what all trainings of the run share.
        split: the cases that are trained on, and those that decide when to stop.
        starts: at least one.
        num_optimizer_steps: of each start, at most.
        stepped: called after each step, with the name of the start and the state in words.
        step_length: factor on the lengths of the steps.
        tolerance: None means that all starts are trained. Else all are tried, but only one of them
            is trained: the first one whose Dice is at most this much below the best one.
    """
    prior = setup.PRIOR / len(split.training)
    trajectories = []
    for start in starts:
        trajectories.append(Trajectory(start, material, num_optimizer_steps, step_length, prior))

    trained = trajectories
    if tolerance is not None:
        material.workers.run_parts(methodcaller("evaluate", split.deciding), trajectories)
        lowest = max(trajectory.best_score for trajectory in trajectories) - tolerance
        trained = [next(each for each in trajectories if each.best_score >= lowest)]
    material.workers.run_parts(methodcaller("train", split, stepped), trained)
    best_first = sorted(trajectories, key=attrgetter("best_score"), reverse=True)
    return sorted(best_first, key=lambda trajectory: trajectory not in trained)


def score_cases(
    refine: Refine, samples: Sequence[Crop | Sample], material: Material
) -> tuple[Float64, list[float]]:
    """Return the Dice (cases, regions) and the loss of each sample or crop."""

    def score_case(sample: Crop | Sample, threads: int) -> tuple[float, Integers]:
        return score(refine, sample, material.loss, threads)

    dice = []
    losses = []
    for loss, confusion in material.workers.run_on_device(score_case, samples):
        dice.append(dice_of(confusion, material.plan.regions.values()))
        losses.append(loss)
    return np.array(dice), losses
