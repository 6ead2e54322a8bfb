"""The stages of a training run that need PyTorch, one after the other."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from importlib import import_module

import torch

from crfrefine.base.limits import available_threads, run_beside
from crfrefine.train.comparison import TrainingResult
from crfrefine.train.final import train_on_all_cases
from crfrefine.train.folds import fingerprint, measure_fold, read_folds, train_fold
from crfrefine.train.material import choose_device
from crfrefine.train.plan import TrainingPlan
from crfrefine.train.progress import Progress, TrainingObserver
from crfrefine.train.reading import read_material
from crfrefine.train.screening import choose_starts
from crfrefine.train.workers import Workers


def train(plan: TrainingPlan, observer: TrainingObserver, started: float) -> TrainingResult:
    """Read, cross-validate, train on all cases, and compare.

    `started` is when the run began, in seconds of the monotonic clock.
    """
    device = choose_device(plan.options.device)
    digest = fingerprint(plan, is_gpu=device.is_gpu)
    finished = {}
    if plan.options.resume:
        finished = read_folds(plan.fold_files, digest)

    num_threads = plan.options.threads or available_threads()
    observer.run_started(plan.describe(num_threads, device.name))
    if device.note is not None:
        observer.note(device.note)
    for note in plan.cases.notes:
        observer.note(note)

    numbers = range(len(plan.folds))
    untrained = [number for number in numbers if number not in finished]
    num_unmeasured = 0
    for number, split in enumerate(plan.folds):
        if number not in finished or not finished[number].measured:
            num_unmeasured += len(split.held_out)
    progress = Progress(observer, len(untrained), plan.num_optimizer_steps, num_unmeasured)

    def import_ahead() -> None:
        """Import what PyTorch's Adam and the comparison need; these raise the error, if any."""
        for module in ("torch._dynamo", "scipy.stats"):
            with suppress(Exception):
                import_module(module)

    torch_threads = torch.get_num_threads()
    # PyTorch's sums depend on its number of threads; the engine takes most of the time anyway.
    torch.set_num_threads(1)
    try:
        with Workers(num_threads, one_by_one=device.is_gpu) as workers:
            material = read_material(plan, digest, device, workers, progress)
            # All cores but one would wait for these imports later.
            run_beside(import_ahead)
            starts = choose_starts(material, untrained)
            train_one = partial(train_fold, starts_of_folds=starts, material=material)
            trained = workers.run_parts(train_one, untrained)
            finished.update(zip(untrained, trained, strict=True))
            folds = [finished[number] for number in numbers]
            measure_one = partial(measure_fold, folds=folds, material=material)
            folds = workers.run_parts(measure_one, numbers)
            final = train_on_all_cases(material, folds)
    finally:
        torch.set_num_threads(torch_threads)

    return TrainingResult(plan, folds, final, device.name, num_threads, started)
