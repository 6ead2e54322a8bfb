"""The stages of a training run that need PyTorch, one after the other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

import torch

from crfrefine.base.limits import available_threads
from crfrefine.base.observer import Observer
from crfrefine.base.workers import run_beside
from crfrefine.train import starts as setup
from crfrefine.train.baselines import calibrate_output, fit_scaling
from crfrefine.train.comparison import FoldResult, TrainingResult, compare
from crfrefine.train.final import train_on_all_cases
from crfrefine.train.folds import fingerprint, measure_fold, read_folds, train_fold
from crfrefine.train.material import choose_device
from crfrefine.train.plan import Plan
from crfrefine.train.preparing import Prepared, prepare
from crfrefine.train.progress import Progress
from crfrefine.train.screening import choose_starts
from crfrefine.train.workers import Workers


def train(plan: Plan, observer: Observer, started: float) -> TrainingResult:
    """Prepare, cross-validate, train on all cases, and compare.

    `started` is when the run began, in seconds of the monotonic clock.
    """
    device = choose_device(plan.options.device)
    finished: dict[int, FoldResult] = {}
    if plan.options.resume:
        finished = read_folds(plan.fold_files, fingerprint(plan, is_gpu=device.is_gpu))

    num_threads = plan.options.threads or available_threads()
    if plan.cases.found:
        observer.cases_found(plan.cases.found)
    observer.run_started(plan.describe(num_threads, device.name))
    if device.note is not None:
        observer.note(device.note)
    for note in plan.cases.notes:
        observer.note(note)

    num_unmeasured = len(plan.folds) - sum(bool(fold.measured) for fold in finished.values())
    progress = Progress(observer, 1 + num_unmeasured, setup.NUM_TRAINED * plan.num_optimizer_steps)
    torch_threads = torch.get_num_threads()
    # PyTorch's sums depend on its number of threads; the engine takes most of the time anyway.
    torch.set_num_threads(1)
    try:
        with Workers(num_threads, one_by_one=device.is_gpu) as workers:
            prepared = prepare(plan, device, workers, progress)
            # All cores but one would wait for this import at the end.
            run_beside(_import_statistics)
            folds = _run_folds(prepared, finished)
            everything = range(len(plan.cases.files))
            scaling = fit_scaling(prepared.material, everything, workers)
            trained = train_on_all_cases(prepared, folds, scaling)
            fit = calibrate_output(trained, everything, prepared.material, workers)
            final = prepared.tune_rivals(fit, scaling, everything)
    finally:
        torch.set_num_threads(torch_threads)

    comparison = compare(folds, final.fit.kind, plan)
    seconds = time.monotonic() - started
    return TrainingResult(plan, tuple(folds), final, comparison, seconds, device.name, num_threads)


def _import_statistics() -> None:
    """Import what the comparison at the end takes from SciPy; it raises the error, if any."""
    with suppress(Exception):
        import_module("scipy.stats")


def _run_folds(prepared: Prepared, finished: dict[int, FoldResult]) -> Sequence[FoldResult]:
    """Return all folds, trained and then measured; those that are finished stay as they are."""
    numbers = range(len(prepared.plan.folds))
    untrained = [number for number in numbers if number not in finished]
    starts = choose_starts(prepared, untrained)

    def train_one(number: int) -> FoldResult:
        return train_fold(number, starts[number], prepared)

    results = dict(finished)
    trained = prepared.workers.run_parts(train_one, untrained)
    results.update(zip(untrained, trained, strict=True))
    folds = [results[number] for number in numbers]

    def measure_one(number: int) -> FoldResult:
        if folds[number].measured:
            return folds[number]
        return measure_fold(number, folds, prepared)

    return prepared.workers.run_parts(measure_one, numbers)
