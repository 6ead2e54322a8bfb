"""The whole of `crfrefine train-crf`, stage after stage: prepare, screen, cross-validate, train on all cases, compare, write.

Each stage is a function of what the stages before it returned. Finished work goes into the checkpoint, and so does the training in
progress.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

from crfrefine.base.threads import available_threads
from crfrefine.runs.execution.executor import Executor
from crfrefine.runs.execution.factory import make_executor
from crfrefine.runs.execution.threads import Workers
from crfrefine.train.budget import Budget, TimeIsUpError
from crfrefine.train.checkpoint import Checkpoint, fingerprint
from crfrefine.train.checks import check_options
from crfrefine.train.comparison import compare
from crfrefine.train.cross_validation import cross_validate
from crfrefine.train.curves import require_matplotlib
from crfrefine.train.device import TrainingDevice
from crfrefine.train.done import Done, Part
from crfrefine.train.final import train_on_all_cases
from crfrefine.train.folds_elsewhere import torch_in_one_thread, train_folds_elsewhere
from crfrefine.train.journal import Journal
from crfrefine.train.observer import TrainingObserver
from crfrefine.train.options import TrainingOptions
from crfrefine.train.plan import make_plan
from crfrefine.train.preparation import Prepared, prepare
from crfrefine.train.progress import Progress
from crfrefine.train.results import TrainingResult
from crfrefine.train.screening import screen_starts
from crfrefine.train.session import Session
from crfrefine.train.unfinished import best_so_far, measured_folds
from crfrefine.train.writing import write_results


def run_training(options: TrainingOptions, observer: TrainingObserver | None = None, *, started: float | None = None) -> TrainingResult:
    """Fit the CRF to labeled cases, write what was found, and return it.

    Args:
        options: what to do.
        observer: told of the progress.
        started: reading of the monotonic clock when the time of `max_minutes` began; None: now.

    Raises:
        CrfRefineError: nothing can be done: no matplotlib, cases that do not fit, a device that is not there, a place that cannot be
            written to.
        KeyboardInterrupt: passed on, after the checkpoint is saved.
    """
    require_matplotlib()
    budget = Budget(options.max_minutes, started=started)
    device = check_options(options)
    placement = replace(options.placement, threads=options.threads, one_per_device=device.is_gpu)
    with (
        torch_in_one_thread(),
        Workers(options.threads or available_threads(), one_by_one=device.is_gpu, check=budget.check) as workers,
        make_executor("processes", 1, placement) if placement.is_cluster else nullcontext() as executor,
    ):
        return _run_stages(options, device, observer or TrainingObserver(), workers, executor, budget)


def _run_stages(
    options: TrainingOptions,
    device: TrainingDevice,
    observer: TrainingObserver,
    workers: Workers,
    executor: Executor | None,
    budget: Budget,
) -> TrainingResult:
    plan = make_plan(options, device)
    digest = fingerprint(plan.settings(), plan.cases.files)
    checkpoint = Checkpoint(options.checkpoint, digest)
    done = (checkpoint.load() if options.resume else None) or Done((Part(),) * len(plan.part_names))
    budget.spent_before = done.seconds
    journal = Journal(done, checkpoint, budget)
    observer.run_started(plan.describe(workers.threads))
    for note in (*([device.note] if device.note else []), *plan.cases.notes):
        observer.note(note)
    for warning in executor.warnings if executor is not None else ():
        observer.warning(warning)
    prepared: Prepared | None = None
    try:
        prepared = prepare(plan, workers, observer)
        progress = Progress(plan.num_planned_of_all(len(prepared.starts)), observer, budget)
        session = Session(workers, observer, journal, budget, progress)
        screened = screen_starts(prepared, session)
        if executor is not None:
            train_folds_elsewhere(plan, digest, session, executor)
        folds = cross_validate(plan, prepared, screened, session)
        final, is_over = train_on_all_cases(plan, prepared, folds, session), False
    except TimeIsUpError:
        journal.save()
        folds = measured_folds(plan, prepared, journal)
        final, is_over = best_so_far(plan, prepared, folds, journal), True
        observer.note(f"the time (--max-minutes) ran out; what was done is in {options.checkpoint}, run again with --resume for the rest")
    except KeyboardInterrupt as interrupt:
        journal.save()
        interrupt.add_note(f"what was done is in {options.checkpoint}, run again with --resume for the rest")
        raise
    seconds = budget.spent_seconds
    comparison = compare(folds, plan)
    result = TrainingResult(
        options,
        plan.cases,
        plan.regions,
        plan.base,
        folds,
        final,
        comparison,
        seconds,
        device=device.name,
        threads=workers.threads,
        num_folds=len(plan.folds),
    )
    write_results(result)
    if not is_over:
        checkpoint.remove()
    return result
