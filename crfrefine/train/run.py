"""The whole of `crfrefine train-crf`: read, cross-validate, train on all cases, compare, write.

Each part that is finished goes into the checkpoint, and so does the one that is going on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import crfrefine
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.execution.threads import Workers
from crfrefine.parameters.model import CrfParameters
from crfrefine.threads import available_threads
from crfrefine.train import starts as setup
from crfrefine.train.baselines import (
    LARGEST_KINDS,
    SIGMAS_VOXELS,
    choose_best,
    fit_vector_scaling,
    largest_scores,
    network_dice,
    smoothing_scores,
)
from crfrefine.train.budget import Budget
from crfrefine.train.checkpoint import Checkpoint, fingerprint
from crfrefine.train.checks import check_options, choose_regions
from crfrefine.train.comparison import NETWORK, TRAINED, Contestants, MethodValues, measure_methods
from crfrefine.train.crops import Crop, CropStore, make_crop
from crfrefine.train.dataset import attempt, find_cases, raise_all, read_labeled
from crfrefine.train.device import TrainingDevice
from crfrefine.train.fitting import Fit, FitResult, Hooks, Material, is_gain, no_crf
from crfrefine.train.folds import Split, choose_num_folds, make_folds
from crfrefine.train.losses import make_loss
from crfrefine.train.model import mean_defined
from crfrefine.train.observer import Step, TrainingObserver
from crfrefine.train.options import LEARNABLE, TrainingOptions
from crfrefine.train.parts import Part
from crfrefine.train.results import FoldResult, TrainingResult, write_results
from crfrefine.train.screening import choose_starts, screen, screened_cases
from crfrefine.train.starts import Start, make_starts
from crfrefine.train.trajectory import Trajectory

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.cases.case import Case

SCREENING_SHARE = 0.1
"""Of the progress that is shown, for reading and for trying the starts."""

LARGE_CASE_VOXELS = 4_000_000
"""Cases of more voxels are read and measured one at a time: several whole ones in memory would be too much."""

LOW_DICE = 0.05
"""A network below this on a case has most likely not been compared with its own reference."""

FINAL_RATE = 0.3
"""Learning rates of the training on all cases, which starts where the folds ended, against those of the folds."""


def run_training(options: TrainingOptions, observer: TrainingObserver | None = None) -> TrainingResult:
    """Fit the CRF to labeled cases, write what was found, and return it.

    Args:
        options: what to do.
        observer: told of the progress.

    Raises:
        CrfRefineError: nothing can be done: cases that do not fit, a device that is not there, a place that cannot be written to.
        KeyboardInterrupt: passed on, after the checkpoint is saved.
    """
    device = check_options(options)
    threads_before = torch.get_num_threads()
    # Sums of several threads depend on how many there are; the time is spent in the engine anyway.
    torch.set_num_threads(1)
    store = CropStore()
    try:
        with Workers(options.threads or available_threads(), one_by_one=device.is_gpu) as workers:
            return _Run(options, observer or TrainingObserver(), workers, store, device).execute()
    finally:
        store.close()
        torch.set_num_threads(threads_before)


class _Run:
    """One call of `run_training`."""

    def __init__(
        self, options: TrainingOptions, observer: TrainingObserver, workers: Workers, store: CropStore, device: TrainingDevice
    ) -> None:
        self.options = options
        self._device = device
        self._observer = observer
        self._workers = workers
        self._store = store
        self._cases = find_cases(options.data, strict=options.strict)
        self._regions = choose_regions(options.regions, self._cases)
        self._num_folds = choose_num_folds(options.num_folds, len(self._cases.files))
        self._folds = make_folds(len(self._cases.files), self._num_folds, options.seed)
        self._num_iterations = options.num_iterations or setup.TRAINING_ITERATIONS
        base = CrfParameters() if options.parameters is None else options.parameters
        base.resolve(self._cases.num_labels, self._cases.num_modalities, self._cases.num_dims)  # lengths fit, or it says which do not
        self._base = base
        self._mask_mode = base.intensity.mask if options.data.masks is None else "none"
        digest = fingerprint(self._settings(), self._cases.files)
        self._checkpoint = Checkpoint(options.checkpoint, digest)
        state = self._checkpoint.load() if options.resume else None
        self._budget = Budget(options.max_minutes, 0.0 if state is None else float(state["seconds"]))
        self._parts = [Part(f"fold {fold + 1} of {self._num_folds}") for fold in range(self._num_folds)] + [Part("all cases")]
        self._current: dict[str, Any] | None = None
        if state is not None:
            for part, own in zip(self._parts, state["parts"], strict=True):
                part.restore(own)
            self._current = state["current"]
        self._steps_done = 0
        self._steps_before = 0
        self._screening: list[Any] | None = None if state is None else state["screening"]

    def execute(self) -> TrainingResult:
        """Run from where the checkpoint left off to the end."""
        cases, options = self._cases, self.options
        self._observer.run_started(
            f"{len(cases.files)} cases, {cases.num_labels} labels, {cases.num_modalities} "
            f"modalit{'y' if cases.num_modalities == 1 else 'ies'}; {self._num_folds} folds"
            + (", one case each" if self._num_folds == len(cases.files) else "")
            + f"; {self._device.name}, {self._workers.threads} thread{'' if self._workers.threads == 1 else 's'}"
        )
        if self._device.note:
            self._observer.note(self._device.note)
        for note in cases.notes:
            self._observer.note(note)
        try:
            self._prepare()
            for number, split in enumerate(self._folds):
                self._run_fold(number, split)
            self._run_final()
        except KeyboardInterrupt as interrupt:
            self._checkpoint.save(self._state())
            interrupt.add_note(f"what was done is in {options.checkpoint}, run again with --resume for the rest")
            raise
        result = self._result()
        write_results(result, options)
        self._checkpoint.remove()
        return result

    # --- the parts ---------------------------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Read the cases and set up what all parts share."""
        self._observer.stage_started("reading")
        self._large = False
        spacings: list[tuple[float, ...]] = []
        crops: list[Crop] = []
        failed: list[CrfRefineError] = []
        size = max(self._workers.threads, 1)
        for first in range(0, len(self._cases.files), size):
            numbers = range(first, min(first + size, len(self._cases.files)))
            for read in self._each(self._try_crop, numbers):
                if isinstance(read, CrfRefineError):
                    failed.append(read)
                    continue
                crop, is_large = read
                self._large |= is_large
                crops.append(self._store.keep(crop))
                spacings.append(crop.spacing)
        raise_all(failed, len(self._cases.files), self.options.data.images)
        self._spacing = tuple(float(step) for step in np.median(np.array(spacings), axis=0))
        frequencies = _frequencies(crops, self._cases.num_labels)
        if sum(frequencies[1:]) == 0:
            raise InputError(f"{self.options.data.labels}: no case has a foreground label; there is nothing to learn from")
        groups = tuple(region.labels for region in self._regions)
        sizes = self._cases.num_labels, self._cases.num_modalities, self._cases.num_dims
        learn = tuple(group for group in LEARNABLE if group in self.options.learn)
        loss = make_loss(self.options.loss, groups, frequencies)
        self._material = Material(crops, loss, groups, learn, sizes, self.options.seed, self._device)
        self._say_what_looks_wrong(crops, groups)
        self._starts = make_starts(self.options.parameters, learn, sizes[0], sizes[1], self._spacing)
        self._screen()
        voxel = math.prod(self._spacing) ** (1.0 / len(self._spacing))
        self._sigmas = tuple(sigma * voxel for sigma in SIGMAS_VOXELS)
        self._smoothing = smoothing_scores(crops, groups, self._sigmas, self._workers)
        self._largest = largest_scores(crops, groups, self._workers)

    def _screen(self) -> None:
        """Try all starts on some cases; what comes of it serves all folds."""
        self._screened = screened_cases(len(self._cases.files))
        if len(self._starts) <= setup.NUM_TRAINED:
            return
        if self._screening is None:
            self._observer.stage_started(f"trying {len(self._starts)} starts")
            self._screening = screen(self._material, self._starts, self._screened, self._workers, self._tried)
            self._checkpoint.save(self._state())

    def _tried(self, count: int) -> None:
        self._observer.progressed(SCREENING_SHARE * count / len(self._starts), None)

    def _starts_of(self, split: Split) -> list[Start]:
        if self._screening is None:
            return self._starts
        allowed = sorted({*split.training, *split.deciding})
        return choose_starts(self._starts, np.array(self._screening, dtype=float), self._screened, allowed, setup.NUM_TRAINED)

    def _run_fold(self, number: int, split: Split) -> None:
        part = self._parts[number]
        if part.measured is not None:
            self._steps_done = sum(self._planned_of(one) for one in self._folds[: number + 1])
            return
        self._observer.stage_started(part.name)
        if part.fit is None:
            part.fit = self._fit_fold(number, split)
        if part.scaling is None:
            part.scaling = fit_vector_scaling(self._material, split, self._workers)
        self._observer.stage_started(f"{part.name}: measuring the cases held out")
        contestants = self._contestants(part, split)
        self._device.release()
        values = self._each(partial(self._measure, contestants), split.held_out)
        part.measured = {self._cases.case_ids[case]: own for case, own in zip(split.held_out, values, strict=True)}
        self._checkpoint.save(self._state())
        self._observer.stage_ended(f"{part.name}: {_describe(part.fit)}")

    def _fit_fold(self, number: int, split: Split) -> FitResult:
        """Train on the cases of a fold; with few of them, let halves decide about the other half first."""
        starts = self._starts_of(split)
        if not split.decides_in_turns:
            return self._train(number, split, starts, self._num_iterations)
        part = self._parts[number]
        for half in split.halves()[len(part.halves) :]:
            part.halves.append(self._train(number, half, starts, self._num_iterations))
        gains = [gain for half in part.halves for gain in half.gains]
        found = [half for half in part.halves if not half.is_network]
        is_stopped = any(half.stopped_by_time for half in part.halves)
        if not is_gain(gains) or not found:
            network_mean = mean_defined([half.network_score for half in part.halves])
            return no_crf(starts[0].parameters, network_mean, tuple(gains), stopped_by_time=is_stopped)
        best = max(found, key=lambda half: half.score - half.network_score)
        iterations = max(1, round(float(np.mean([half.best_iteration for half in found]))))
        chosen = [start for start in starts if start.name == best.start]
        fit = self._train(number, split, chosen, iterations, rungs=())
        histories = {**{f"half: {name}": history for name, history in best.histories.items()}, **fit.histories}
        return replace(fit, histories=histories, stopped_by_time=fit.stopped_by_time or is_stopped)

    def _run_final(self) -> None:
        """Train on all cases, from the best of what the folds found; no CRF where the folds found none that helps the cases held out."""
        part = self._parts[-1]
        everything = tuple(range(len(self._cases.files)))
        fits = [fold.fit for fold in self._parts[:-1] if fold.fit is not None]
        found = [fit for fit in fits if not fit.is_network]
        gains = self._gains_held_out()
        if part.fit is None and (not found or not is_gain(gains)):
            part.fit = no_crf(fits[0].parameters, mean_defined([fit.network_score for fit in fits]), gains)
        elif part.fit is None:
            self._observer.stage_started(part.name)
            starts = [Start(f"{self._parts[number].name}: {fit.start}", fit.parameters) for number, fit in enumerate(fits) if fit in found]
            iterations = max(setup.EVALUATE_EVERY, int(np.median([fit.best_iteration for fit in found])) // 2)
            split = Split(everything, everything, ())
            part.fit = self._train(len(self._folds), split, starts, min(iterations, self._num_iterations), rungs=((0, 1),), rate=FINAL_RATE)
            self._observer.stage_ended(f"{part.name}: {_describe(part.fit)}")
        if part.scaling is None:
            part.scaling = fit_vector_scaling(self._material, Split(everything, everything, ()), self._workers)

    def _train(
        self,
        number: int,
        split: Split,
        starts: Sequence[Start],
        num_iterations: int,
        rungs: Sequence[tuple[int, int]] = setup.RUNGS,
        rate: float = 1.0,
    ) -> FitResult:
        pieces = sum(3 if one.decides_in_turns else 1 for one in self._folds[number:]) - len(self._parts[number].halves)
        self._budget.start_part(pieces + 1)
        self._steps_before = self._steps_done
        fit = Fit(self._material, split, starts, self._workers, num_iterations=num_iterations, rungs=rungs, rate=rate)
        if self._current is not None:
            fit.restore(self._current)
        result = fit.run(Hooks(partial(self._stepped, self._parts[number].name), self._keep, self._budget.is_part_over))
        self._current = None
        self._steps_done = self._steps_before + self._planned(len(starts), rungs, num_iterations)
        if result.stopped_by_time and result.is_network:
            self._observer.note(f"{self._parts[number].name}: the time ran out before a CRF was better than the network alone")
        return result

    # --- single steps ------------------------------------------------------------------------------------------------------------------

    def _each(self, function: Any, numbers: Sequence[int]) -> list[Any]:
        """Apply a function of a case's number and threads to cases: side by side, unless they are large."""
        if getattr(self, "_large", False):
            return [function(number, self._workers.threads) for number in numbers]
        results: list[Any] = self._workers.run(function, list(numbers))
        return results

    def _read(self, number: int, threads: int) -> Case:
        return read_labeled(
            self._cases.files[number], self._cases, input_type=self.options.input_type, mask_mode=self._mask_mode, threads=threads
        )

    def _try_crop(self, number: int, threads: int) -> tuple[Crop, bool] | CrfRefineError:
        return attempt(partial(self._read_crop, number, threads), self._cases.files[number])

    def _read_crop(self, number: int, threads: int) -> tuple[Crop, bool]:
        case = self._read(number, threads)
        return make_crop(case, self._base.intensity), case.logits[0].size > LARGE_CASE_VOXELS

    def _measure(self, contestants: Contestants, number: int, threads: int) -> MethodValues:
        regions = {region.name: region.labels for region in self._regions}
        return measure_methods(self._read(number, threads), regions, contestants, self._device.name, threads)

    def _contestants(self, part: Part, split: Split) -> Contestants:
        if part.fit is None or part.scaling is None:
            raise ValueError("the part is not trained yet")
        default = replace(CrfParameters(), intensity=self._base.intensity)
        trained = part.fit.parameters.replace(**{"postprocess.keep_largest": "none", "postprocess.min_component_ml": 0.0})
        return Contestants(trained, default, part.scaling, self._sigma(split), self._kind_of_largest(split))

    def _sigma(self, split: Split) -> float:
        return choose_best(self._smoothing, self._sigmas, sorted({*split.training, *split.deciding}))

    def _kind_of_largest(self, split: Split) -> str:
        return choose_best(self._largest, LARGEST_KINDS, sorted({*split.training, *split.deciding}))

    def _stepped(self, stage: str, trajectory: Trajectory, loss: float, score: float | None) -> None:
        self._steps_done += 1
        text = ", ".join(f"{name} {_numbers(value)}" for name, value in trajectory.thetas().items())
        self._observer.stepped(Step(stage, trajectory.name, trajectory.iteration, trajectory.num_iterations, loss, score, text))
        planned = sum(self._planned_of(split) for split in self._folds) + self._planned(1, (), self._num_iterations // 2)
        fraction = SCREENING_SHARE + (1.0 - SCREENING_SHARE) * min(1.0, self._steps_done / max(1, planned))
        spent = self._budget.spent_seconds
        self._observer.progressed(fraction, spent * (1.0 - fraction) / fraction if fraction > 0 else None)

    def _planned_of(self, split: Split) -> int:
        """Return the optimizer steps of a fold."""
        once = self._planned(min(len(self._starts), setup.NUM_TRAINED))
        return 2 * once + self._num_iterations if split.decides_in_turns else once

    def _gains_held_out(self) -> tuple[float, ...]:
        """Return how much the folds' CRFs added to the mean Dice of each case that they had not seen."""
        gains = []
        for part in self._parts[:-1]:
            for values in (part.measured or {}).values():
                pairs = [(values[TRAINED][region]["dice"], values[NETWORK][region]["dice"]) for region in values[TRAINED]]
                defined = [trained - network for trained, network in pairs if not math.isnan(trained - network)]
                gains += [sum(defined) / len(defined)] if defined else []
        return tuple(gains)

    def _planned(self, num_starts: int, rungs: Sequence[tuple[int, int]] = setup.RUNGS, num_iterations: int | None = None) -> int:
        """Return the optimizer steps of a training that is not stopped early."""
        total, before, active = 0, 0, num_starts
        last = self._num_iterations if num_iterations is None else num_iterations
        for iterations, keep in [*((min(count, last), keep) for count, keep in rungs), (last, 1)]:
            total += active * (iterations - before)
            before, active = iterations, min(active, keep)
        return total

    def _keep(self, state: dict[str, Any]) -> None:
        """Remember where a training stands, and write it down now and then."""
        self._current = state
        if self._checkpoint.is_due():
            self._checkpoint.save(self._state())

    def _state(self) -> dict[str, Any]:
        return {
            "seconds": self._budget.spent_seconds,
            "device": self._device.name,
            "screening": self._screening,
            "parts": [part.to_dict() for part in self._parts],
            "current": self._current,
        }

    def _settings(self) -> dict[str, Any]:
        """Return all that the result depends on, besides the data."""
        options = self.options
        return {
            "version": crfrefine.__version__,
            "parameters": None if options.parameters is None else options.parameters.to_dict(),
            "learn": sorted(options.learn),
            "folds": self._num_folds,
            "loss": options.loss,
            "num_iterations": options.num_iterations,
            "regions": [[region.name, list(region.labels)] for region in self._regions],
            "label_names": list(self._cases.label_names),
            "ignore_label": self._cases.ignore_label,
            "seed": options.seed,
            "device": self._device.kind,
            "input_type": options.input_type,
        }

    def _names(self, cases: Sequence[int]) -> tuple[str, ...]:
        return tuple(self._cases.case_ids[case] for case in cases)

    def _say_what_looks_wrong(self, crops: Sequence[Crop], groups: Sequence[tuple[int, ...]]) -> None:
        dice = network_dice(crops, groups)
        defined = dice[~np.isnan(dice).all(axis=1)]
        if defined.size and float(np.nanmean(defined)) < LOW_DICE:
            self._observer.note(
                f"the network agrees with the reference to a mean Dice of {np.nanmean(defined):.3f}: "
                "are the logits' channels in the order of the labels, and do logits and labels belong together?"
            )
        padded = [crop.case_id for crop in crops if crop.num_padding_voxels]
        if padded:
            share = sum(crop.num_padding_voxels for crop in crops) / max(1, sum(crop.num_case_voxels for crop in crops))
            self._observer.note(
                f"{len(padded)} of {len(crops)} cases have voxels whose logits are equal for all labels, as where a cropped output was "
                f"padded ({share:.1%} of all voxels); they take no part and count as background: {_first_names(padded)}"
            )
        empty = [crop.case_id for crop, row in zip(crops, dice, strict=True) if np.isnan(row).all()]
        if empty:
            self._observer.note(f"{len(empty)} of {len(crops)} cases have no foreground in reference and network: {_first_names(empty)}")

    def _result(self) -> TrainingResult:
        folds = []
        for part, split in zip(self._parts[:-1], self._folds, strict=True):
            if part.fit is None or part.scaling is None or part.measured is None:
                raise CrfRefineError(f"{part.name} was not finished")
            training, deciding, held_out = map(self._names, (split.training, split.deciding, split.held_out))
            tuned = part.scaling, self._sigma(split), self._kind_of_largest(split)
            folds.append(FoldResult(part.name, training, deciding, held_out, part.fit, *tuned, part.measured))
        final = self._parts[-1]
        if final.fit is None or final.scaling is None:
            raise CrfRefineError("the training on all cases was not finished")
        everything = Split(tuple(range(len(self._cases.files))), (), ())
        return TrainingResult(
            options=self.options,
            cases=self._cases,
            regions=self._regions,
            base=self._base,
            folds=tuple(folds),
            final=final.fit,
            scaling=final.scaling,
            sigma_mm=self._sigma(everything),
            keep_largest=self._kind_of_largest(everything),
            seconds=self._budget.spent_seconds,
            device=self._device.name,
            threads=self._workers.threads,
        )


def _first_names(case_ids: Sequence[str]) -> str:
    return ", ".join(case_ids[:3]) + (" ..." if len(case_ids) > 3 else "")


def _frequencies(crops: Sequence[Crop], num_labels: int) -> tuple[float, ...]:
    counts: NDArray[np.int64] = np.zeros(num_labels + 1, dtype=np.int64)
    for crop in crops:
        counts += np.bincount(crop.labels[crop.mask], minlength=num_labels + 1)
    total = max(1, int(counts[:num_labels].sum()))
    return tuple(float(count) / total for count in counts[:num_labels])


def _describe(fit: FitResult) -> str:
    if math.isnan(fit.network_score):
        return "no CRF is better than the network alone: none of the cases that decide has any foreground"
    if fit.is_network:
        return f"no CRF is better than the network alone (Dice {fit.network_score:.4f} on the cases that decide)"
    return f"{fit.start}: Dice {fit.network_score:.4f} -> {fit.score:.4f} on the cases that decide, at iteration {fit.best_iteration}"


def _numbers(value: Any) -> str:
    return "/".join(f"{number:.3g}" for number in (value if isinstance(value, list) else (value,)))
