"""A training, and the cross-validation: in each fold, a CRF is trained on some cases and measured on the others.

The starts are tried first without training, once for all folds: a forward pass costs a fraction of a gradient, and at a bandwidth ten
times too large there is nothing to learn from the gradient. A finished fold goes into a JSON file, from which `--resume` takes it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import crfrefine
from crfrefine.base.plain import from_plain, to_plain
from crfrefine.base.text import MAX_OF_A_REASON, shorten
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io.atomic import write_small_file
from crfrefine.io.paths import files_read
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import BANDWIDTHS
from crfrefine.train import starts as setup
from crfrefine.train.baselines import MIN_CALIBRATED, calibrate, calibrate_output, with_calibrated
from crfrefine.train.comparison import FoldResult, MethodValues, measure_methods
from crfrefine.train.material import Material
from crfrefine.train.model import CaseScore, Model, mean_defined, mean_dice, network_score
from crfrefine.train.observer import Step, Workers
from crfrefine.train.plan import Plan, Prepared, Split
from crfrefine.train.starts import (
    CALIBRATION,
    CRF,
    MIN_CASES,
    NO_CRF,
    NO_RIVALS,
    NUM_TRAINED,
    UNTRAINED,
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

# Length of the last optimizer steps, as a share of that of the first ones; between them half a cosine.
LAST_STEP_LENGTH = 0.05
# Longer gradients are shortened: near a temperature or bandwidth that makes no sense they can be of any size.
MAX_GRADIENT = 10.0
MAX_DECIDING = 48  # more deciding cases take longer without improving the decision


class Trajectory:
    """The training of one start: the model, Adam, the history, and the best values so far; `prior` pulls it back to its start."""

    def __init__(self, start: Start, material: Material, num_optimizer_steps: int, step_length: float = 1.0, prior: float = 0.0) -> None:
        self.start = start
        self.optimizer_step = 0
        self.history: list[dict[str, Any]] = []
        self.best_score, self.best_optimizer_step = -math.inf, 0
        self.best_parameters: CrfParameters | None = None  # as a file holds them; None until the first evaluation
        self.model = Model(start.parameters, material.learn, material.sizes, material.device)
        self._origin, self._prior, self._num_optimizer_steps = self.model.positions(), prior, num_optimizer_steps
        self._step_lengths = [step_length * setup.STEP_LENGTHS[group] for group in self.model.groups]
        self._optimizer = torch.optim.Adam([{"params": values} for values in self.model.groups.values()], betas=(0.8, 0.95))

    def step(self, gradients: Sequence[Tensor], loss: float) -> None:
        """Move along the gradients, one per learned parameter, and that of the prior."""
        parameters = [parameter for _, parameter in self.model.learned]
        for parameter, gradient, pull in zip(parameters, gradients, self.model.pull(self._origin), strict=True):
            parameter.grad = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0) + self._prior * pull
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT)
        share = min(1.0, self.optimizer_step / self._num_optimizer_steps)
        factor = LAST_STEP_LENGTH + (1.0 - LAST_STEP_LENGTH) * 0.5 * (1.0 + math.cos(math.pi * share))
        for group, step_length in zip(self._optimizer.param_groups, self._step_lengths, strict=True):
            group["lr"] = step_length * factor
        self._optimizer.step()
        self.optimizer_step += 1
        self.history.append({"iteration": self.optimizer_step, "loss": loss, "thetas": self.thetas()})

    def scored(self, score: float, loss: float) -> None:
        """Note how good the present values are on the deciding cases, and keep them if they are the best."""
        if not self.history:
            self.history.append({"iteration": 0, "thetas": self.thetas()})
        self.history[-1].update(score=score, deciding_loss=loss)
        if score > self.best_score:
            self.best_score, self.best_optimizer_step = score, self.optimizer_step
            self.best_parameters = rounded(self.model.to_parameters())

    def evaluations_since_best(self) -> int:
        """Return the number of consecutive evaluations without improvement."""
        return sum("score" in record and record["iteration"] > self.best_optimizer_step for record in self.history)

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
class Task:
    """A training to be done."""

    name: str  # of the part of the run
    split: Split  # the cases that are trained on and those that decide
    starts: Sequence[Start]  # at least one
    num_optimizer_steps: int  # of each start
    step_length: float = 1.0  # factor on the lengths of the steps
    trains_best: bool = False  # whether the starts are only tried, and the best one is trained
    calibrated: CrfParameters | None = None  # the network recalibrated, without weights; None means that it is not a candidate
    rivals: Rivals = NO_RIVALS  # further candidates
    kind: str | None = None  # kind of the only candidate, where it is chosen already; None means that the deciding cases choose


class Fit:
    """A training on some cases; `stepped` is called after each step of the optimizer."""

    def __init__(self, material: Material, task: Task, workers: Workers, stepped: Callable[[Step], object] = lambda _: None) -> None:
        self._material, self._task, self._workers, self._stepped = material, task, workers, stepped
        prior = setup.PRIOR / len(task.split.training)
        self._trajectories = [Trajectory(start, material, task.num_optimizer_steps, task.step_length, prior) for start in task.starts]
        deciding = task.split.deciding
        self._deciding = deciding[:: max(1, math.ceil(len(deciding) / MAX_DECIDING))]

    def run(self) -> FitResult:
        """Train, and return the candidate that the cases choose, among the recalibrated network, the best CRF and its rivals."""
        network = self._network_dice()
        trained = self._trajectories
        if self._task.trains_best:
            for trajectory in trained:
                trajectory.scored(*self._evaluate(trajectory))
            trained = [max(trained, key=lambda trajectory: trajectory.best_score)]
        for trajectory in trained:
            self._train(trajectory)
        best = max(self._trajectories, key=lambda trajectory: trajectory.best_score)
        candidates = self._candidates(best, network)
        histories = {trajectory.start.name: trajectory.history for trajectory in self._trajectories if trajectory.history}
        more = {"histories": histories, "candidates": tuple(candidates), "trained": best.best_parameters}
        chosen = choose(candidates)
        if chosen is None:
            gains = next((candidate.gains for candidate in candidates if candidate.kind == CRF), ())
            return no_crf(best.start.parameters, mean_defined(network), gains, **more)
        return taken(chosen, mean_defined(network), **more)

    def _train(self, trajectory: Trajectory) -> None:
        """Train a start to its end, or until it stops improving."""
        material, last = self._material, self._task.num_optimizer_steps
        while trajectory.optimizer_step < last and trajectory.evaluations_since_best() < setup.PATIENCE:
            batch = material.batch(trajectory.optimizer_step, self._task.split.training, setup.BATCH_SIZE)
            results = self._workers.run_on_device(lambda crop, threads: trajectory.model.gradient(crop, material.loss, threads), batch)
            losses, gradients = zip(*results, strict=True)
            loss, score = sum(losses) / len(batch), math.nan
            trajectory.step([sum(parts[1:], parts[0]) / len(batch) for parts in zip(*gradients, strict=True)], loss)
            step = trajectory.optimizer_step
            if step % setup.EVALUATE_EVERY == 0 or step == last:
                score, deciding_loss = self._evaluate(trajectory)
                trajectory.scored(score, deciding_loss)
            thetas = ", ".join(f"{name} {_numbers(value)}" for name, value in trajectory.thetas().items())
            measured = None if math.isnan(score) else score
            self._stepped(Step(self._task.name, trajectory.start.name, step, last, loss, measured, thetas))

    def _evaluate(self, trajectory: Trajectory) -> tuple[float, float]:
        """Return mean Dice and loss of the deciding cases, estimated from their samples."""
        samples, loss = self._material.samples, self._material.loss
        scores = self._workers.run_on_device(lambda case, threads: trajectory.model.score(samples[case], loss, threads), self._deciding)
        return mean_defined(self._dice(scores)), float(np.mean([score.loss for score in scores]))

    def _network_dice(self, calibrated: CrfParameters | None = None) -> NDArray[np.float64]:
        """Return the mean Dice of each deciding case for the network, as it is or recalibrated."""
        crops, loss, device = self._material.crops, self._material.loss, self._material.device
        return self._dice(self._workers.run_on_device(lambda case, _: network_score(crops[case], loss, device, calibrated), self._deciding))

    def _dice(self, scores: Sequence[CaseScore]) -> NDArray[np.float64]:
        return np.array([mean_dice(score.confusion, self._material.regions) for score in scores])

    def _candidates(self, best: Trajectory, network: NDArray[np.float64]) -> list[Candidate]:
        """Return the candidates to choose from, simpler models first; `network` is the Dice of the network on each deciding case."""
        material, calibrated, chosen = self._material, self._task.calibrated, self._task.kind
        candidates = []
        if calibrated is not None and chosen in (None, CALIBRATION):
            gains = _defined(self._network_dice(calibrated) - network)
            candidates.append(Candidate(CALIBRATION, CALIBRATION, calibrated, 0, gains))
        if best.best_parameters is None:
            return candidates
        for kind, parameters in variants(best.best_parameters, self._task.rivals):
            if chosen in (None, kind):
                model = Model(parameters, (), material.sizes, material.device)
                scores = self._workers.run_on_device(
                    lambda case, threads, model=model: model.score(material.crops[case], material.loss, threads),  # type: ignore[misc]
                    self._deciding,
                )
                start, step = (UNTRAINED, 0) if kind == UNTRAINED else (best.start.name, best.best_optimizer_step)
                candidates.append(Candidate(kind, start, parameters, step, _defined(self._dice(scores) - network)))
        return candidates


def _defined(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(values[~np.isnan(values)].tolist())


def _numbers(value: float | list[float]) -> str:
    return "/".join(f"{number:.3g}" for number in (value if isinstance(value, list) else (value,)))


MAX_SCREENED = 40  # cases that the starts are tried on, at most


def cross_validate(prepared: Prepared, finished: Mapping[int, FoldResult]) -> tuple[FoldResult, ...]:
    """Return the result of every fold; those that are finished already are not repeated."""
    plan, starts, results = prepared.plan, prepared.starts, dict(finished)
    missing = [number for number in range(len(plan.folds)) if number not in finished]
    chosen = dict.fromkeys(missing, starts)
    if missing and len(starts) > NUM_TRAINED:
        prepared.progress.observer.stage_started(f"trying {len(starts)} starts")
        cases = sorted({int(number) for number in np.linspace(0, plan.num_cases - 1, min(plan.num_cases, MAX_SCREENED)).round()})
        table = screen(prepared.material, starts, cases, prepared.workers, prepared.progress.tried)
        chosen = {number: choose_starts(starts, table, cases, plan.folds[number].seen, NUM_TRAINED) for number in missing}
    results |= {number: _run_fold(number, chosen[number], prepared) for number in missing}
    return tuple(results[number] for number in range(len(plan.folds)))


def screen(
    material: Material, starts: Sequence[Start], cases: Sequence[int], workers: Workers, tried: Callable[[float], object] = lambda _: None
) -> NDArray[np.float64]:
    """Return the (cases, starts) mean Dice of some cases with each start, without any training; `tried` gets the share of the starts."""
    columns = []
    samples = [material.samples[case] for case in cases]
    for start in starts:
        model = Model(start.parameters, (), material.sizes, material.device)
        scores = workers.run_on_device(lambda sample, threads, model=model: model.score(sample, material.loss, threads), samples)  # type: ignore[misc]
        columns.append([mean_dice(score.confusion, material.regions) for score in scores])
        tried(len(columns) / len(starts))
    return np.array(columns).T


def choose_starts(
    starts: Sequence[Start], table: NDArray[np.float64], cases: Sequence[int], allowed: Sequence[int], count: int
) -> list[Start]:
    """Return the best starts for a training on the allowed cases, of different bandwidths; `table` of `screen` has the rows `cases`."""
    rows = [row for row, case in enumerate(cases) if case in set(allowed)]
    means = np.nan_to_num([mean_defined(column) for column in table[rows].T], nan=0.0)
    chosen: dict[str, Start] = {}
    for number in sorted(range(len(starts)), key=lambda number: -means[number]):
        thetas = repr([replace(kernel, weight=0.0) for kernel in starts[number].parameters.bilateral])
        if len(chosen) < count:
            chosen.setdefault(thetas, starts[number])
    return list(chosen.values())


def _run_fold(number: int, starts: Sequence[Start], prepared: Prepared) -> FoldResult:
    """Return the result of a fold, and write it into its file."""
    plan, observer = prepared.plan, prepared.progress.observer
    split, name = plan.folds[number], f"cross-validation fold {number + 1} of {len(plan.folds)}"
    observer.stage_started(name)
    fit = calibrate_output(_fit(name, split, starts, prepared), split.seen, prepared.material, prepared.workers)
    tuned = prepared.tune_rivals(fit, split.seen)
    observer.stage_started(f"{name}: measuring the cases held out")
    regions = {region.name: region.labels for region in plan.regions}
    if plan.device.is_gpu:
        torch.cuda.empty_cache()  # The engine allocates without PyTorch.

    def measure(case: int, threads: int) -> MethodValues:
        return measure_methods(plan.read(case, threads), regions, tuned, plan.device.name, threads)

    values = prepared.workers.run(measure, split.held_out, one_by_one=prepared.has_large_cases)
    result = FoldResult(name, split, tuned, dict(zip((plan.cases.case_ids[case] for case in split.held_out), values, strict=True)))
    write_small_file(plan.fold_files[number], fold_text(result, fingerprint(plan)).encode())
    prepared.progress.part_ended()
    observer.stage_ended(f"{name}: {fit.describe()}")
    return result


def _fit(name: str, split: Split, starts: Sequence[Start], prepared: Prepared) -> FitResult:
    """Train on the cases of a fold that supply gradients; its deciding cases choose the candidate."""
    plan, material, workers, first = prepared.plan, prepared.material, prepared.workers, starts[0]
    calibrated = calibrate(material, split.training, first.parameters, workers)
    if calibrated is not None and len(split.training) >= MIN_CALIBRATED:
        starts = [first, with_calibrated(first, calibrated)]
    rivals = plan.rivals if len(split.seen) >= MIN_CASES else NO_RIVALS
    task = Task(name, split, starts, plan.num_optimizer_steps, calibrated=calibrated, rivals=rivals)
    fit = Fit(material, task, workers, prepared.progress.stepped).run()
    if fit.kind in (NO_CRF, UNTRAINED):
        return fit
    # The choice is fitted to all cases of the fold, those that decided too, as the rivals are: nothing is left to be decided.
    seen = tuple(split.seen)
    calibrated = calibrate(material, seen, first.parameters, workers)
    if fit.is_calibration:
        return fit if calibrated is None else replace(fit, parameters=calibrated)
    recalibrated = [] if calibrated is None else [with_calibrated(first, calibrated)]
    named = {start.name: start for start in (*starts, *recalibrated)}
    task = replace(task, split=Split(seen, seen, ()), starts=[named[fit.start]], num_optimizer_steps=fit.best_optimizer_step, kind=fit.kind)
    fitted = Fit(material, task, workers, prepared.progress.stepped).run()
    return fit if fitted.is_network else replace(fit, parameters=fitted.parameters, trained=fitted.trained)


def fingerprint(plan: Plan) -> str:
    """Return a digest of everything that the result depends on: settings, and names, sizes and dates of the files."""
    cases, options = plan.cases, replace(plan.options, output=Path(), threads=None, resume=False)
    entries: list[Any] = [crfrefine.__version__, options, plan.device.is_gpu, plan.folds, plan.regions, cases.label_names, cases.regions]
    for case in cases.files:
        for file in (file for path in case.paths for file in files_read(path)):
            # If a separate file of voxels is missing, reading reports it.
            status = file.stat() if file in case.paths or file.exists() else None
            entries.append((case.case_id, file.name, status and (status.st_size, status.st_mtime_ns)))
    return hashlib.sha256(repr(entries).encode()).hexdigest()


def fold_text(fold: FoldResult, digest: str) -> str:
    """Return the content of the file of a finished fold."""
    return json.dumps({"fingerprint": digest, "fold": to_plain(fold)})


def read_folds(paths: Sequence[Path], digest: str) -> dict[int, FoldResult]:
    """Return the folds that a stopped run has finished, by their numbers; raise InputError for a file of another run, or of no fold."""
    finished = {}
    for number, path in enumerate(paths):
        if not path.exists():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            is_same = content["fingerprint"] == digest
            if is_same:
                finished[number] = from_plain(FoldResult, content["fold"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, CrfRefineError) as error:
            reason = shorten(error, MAX_OF_A_REASON)
            raise InputError(f"{path}: not a fold of train-crf ({reason}); remove it to train the fold again") from None
        if not is_same:
            raise InputError(
                f"{path}: is of a run with other data, options or another version; repeat its options exactly, "
                "or leave --resume out to start anew"
            )
    return finished
