"""The whole of `crfrefine train-crf`, stage after stage.

The stages are: plan, prepare, try the starts, cross-validate, train on all cases, compare, write.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch

from crfrefine.base.inputs import add_inputs, check_no_input, keeping_inputs
from crfrefine.base.limits import available_threads
from crfrefine.base.option import REFERENCE, mapping_of
from crfrefine.base.plain import from_plain, to_plain
from crfrefine.base.text import MAX_OF_A_REASON, listed, shorten
from crfrefine.cases.case_files import CaseFiles, left_out_entries
from crfrefine.errors import ConfigError, CrfRefineError, InputError
from crfrefine.io.atomic import check_replaceable, write_small_file
from crfrefine.io.paths import files_read
from crfrefine.parameters.model import CrfParameters
from crfrefine.statistics.comparison import summary_dicts
from crfrefine.train import starts as setup
from crfrefine.train.baselines import (
    MIN_CALIBRATED,
    Tuned,
    VectorScaling,
    calibrate,
    calibrate_output,
    fit_scaling,
    with_calibrated,
)
from crfrefine.train.comparison import (
    NETWORK,
    TRAINED,
    FoldResult,
    MethodValues,
    TrainingResult,
    compare,
    measure_methods,
)
from crfrefine.train.fit import Fit
from crfrefine.train.material import choose_device
from crfrefine.train.model import mean_defined
from crfrefine.train.observer import Progress, TrainingObserver
from crfrefine.train.options import DEFAULT_LEARN, WRITTEN_BY, TrainingOptions
from crfrefine.train.plan import Plan, Prepared, Split, make_plan, prepare
from crfrefine.train.screening import choose_starts
from crfrefine.train.starts import (
    CALIBRATION,
    UNTRAINED,
    Candidate,
    FitResult,
    Start,
    choose,
    is_gain,
    no_crf,
    pooled,
    taken,
)
from crfrefine.train.workers import Workers
from crfrefine.version import __version__

# Factor on the step length in the training on all cases, which starts where the folds ended.
STEP_LENGTH = 0.3
SCHEMA = 1
ALL_CASES = "all cases"  # name of the part of the run after the folds
DEFAULT_NAME = "crfrefine.toml"  # the parameter file in the folder of a trained network of nnU-Net


@keeping_inputs()
def run_training(
    options: TrainingOptions, observer: TrainingObserver | None = None
) -> TrainingResult:
    """Fit the CRF to labeled cases, write the results, and return them.

    Finished folds stay if the run is stopped.
    """
    started = time.monotonic()
    if options.config is not None:
        add_inputs(options.config)
    _check_learned(options.learn)
    options.check_files()
    plan = make_plan(options, choose_device(options.device))
    check_replaceable(*plan.fold_files)
    for path in options.files:
        check_no_input(path)
    finished: dict[int, FoldResult] = {}
    if options.resume:
        finished = read_folds(plan.fold_files, fingerprint(plan))

    num_threads = options.threads or available_threads()
    torch_threads = torch.get_num_threads()
    # PyTorch's sums depend on its number of threads; the engine takes most of the time anyway.
    torch.set_num_threads(1)
    try:
        with Workers(num_threads, one_by_one=plan.device.is_gpu) as workers:
            result = _train(plan, finished, observer or TrainingObserver(), workers, started)
    except KeyboardInterrupt as interrupt:
        if any(path.exists() for path in plan.fold_files):
            interrupt.add_note(
                f"finished folds are beside {options.output}, run again with --resume for the rest"
            )
        raise
    finally:
        torch.set_num_threads(torch_threads)

    origin = (
        f" train-crf on {datetime.now(UTC):%Y-%m-%d} from {len(plan.cases.files)} cases: "
        f"{options.report.name} has the verdict."
    )
    options.write(SCHEMA, make_report(result), result.parameters, origin)
    for path in plan.fold_files:
        path.unlink(missing_ok=True)
    return result


def _check_learned(learn: Sequence[str]) -> None:
    """Raise ConfigError unless the groups to learn are some of those that can be learned."""
    if learn and set(learn) <= set(DEFAULT_LEARN):
        return
    groups = listed(learn) or "nothing"
    raise ConfigError(
        f"--learn: expected some of {', '.join(DEFAULT_LEARN)}, separated by commas; got {groups}"
    )


def _train(
    plan: Plan,
    finished: Mapping[int, FoldResult],
    observer: TrainingObserver,
    workers: Workers,
    started: float,
) -> TrainingResult:
    """Prepare, cross-validate, train on all cases, and compare."""
    observer.run_started(plan.describe(workers.threads))
    if plan.device.note:
        observer.note(plan.device.note)
    for note in plan.cases.notes:
        observer.note(note)

    num_parts = 1 + len(plan.folds) - len(finished)
    progress = Progress(observer, num_parts, setup.NUM_TRAINED * plan.num_optimizer_steps)
    prepared = prepare(plan, workers, progress)

    # All cores but one would wait for this import at the end.
    Thread(target=_import_statistics).start()
    unfinished = [number for number in range(len(plan.folds)) if number not in finished]
    starts = choose_starts(prepared, unfinished)

    def run_fold(number: int) -> FoldResult:
        return _run_fold(number, starts[number], prepared)

    results = dict(finished)
    results.update(zip(unfinished, workers.run_parts(run_fold, unfinished), strict=True))
    folds = [results[number] for number in range(len(plan.folds))]
    everything = range(len(plan.cases.files))
    scaling = fit_scaling(prepared.material, everything, workers)
    trained = train_on_all_cases(prepared, folds, scaling)
    fit = calibrate_output(trained, everything, prepared.material, workers)
    final = prepared.tune_rivals(fit, scaling, everything)
    comparison = compare(folds, plan)
    seconds = time.monotonic() - started
    return TrainingResult(plan, tuple(folds), final, comparison, seconds, workers.threads)


def _import_statistics() -> None:
    """Import what the comparison at the end takes from SciPy; it raises the error, if any."""
    with suppress(Exception):
        import_module("scipy.stats")


def _run_fold(number: int, starts: Sequence[Start], prepared: Prepared) -> FoldResult:
    """Return the result of a fold, and write it into its file."""
    plan = prepared.plan
    workers = prepared.workers
    progress = prepared.progress
    split = plan.folds[number]
    name = f"cross-validation fold {number + 1} of {len(plan.folds)}"
    progress.stage_started(name)
    scaling = fit_scaling(prepared.material, split.seen, workers)
    trained = _fit(name, split, starts, prepared, scaling)
    fit = calibrate_output(trained, split.seen, prepared.material, workers)
    tuned = prepared.tune_rivals(fit, scaling, split.seen)

    progress.stage_started(f"{name}: measuring the cases held out")
    if plan.device.is_gpu:
        torch.cuda.empty_cache()  # The engine allocates without PyTorch.

    def measure(files: CaseFiles, threads: int) -> MethodValues:
        case = plan.read(files, threads)
        return measure_methods(case, plan.labels_of_regions, tuned, plan.device.name, threads)

    held_out = [plan.cases.files[case] for case in split.held_out]
    values = workers.run(measure, held_out, one_by_one=plan.cases.are_large)
    measured = {}
    for files, values_of_case in zip(held_out, values, strict=True):
        measured[files.case_id] = values_of_case
    result = FoldResult(name, split, tuned, measured)
    content = {"fingerprint": fingerprint(plan), "fold": to_plain(result)}
    write_small_file(plan.fold_files[number], json.dumps(content).encode())
    progress.training_ended(name, f"{name}: {fit.describe()}")
    return result


def _fit(
    name: str,
    split: Split,
    starts: Sequence[Start],
    prepared: Prepared,
    scaling: VectorScaling,
) -> FitResult:
    """Train on the cases of a fold that supply gradients.

    The deciding cases choose a candidate, which is then fitted to all cases of the fold, as the
    rivals and `scaling` are.
    """
    plan = prepared.plan
    material = prepared.material
    first = starts[0]
    calibrated = calibrate(material, split.training, first.parameters, prepared.workers)
    if calibrated is not None and len(split.training) >= MIN_CALIBRATED:
        starts = [first, with_calibrated(first, calibrated)]
    rivals = plan.rivals if len(split.seen) >= setup.MIN_CASES else setup.NO_RIVALS
    training = Fit(
        material,
        prepared.workers,
        prepared.progress.stepped,
        name,
        split,
        starts,
        plan.num_optimizer_steps,
        calibrated=calibrated,
        rivals=rivals,
    )
    fit = training.run()
    if fit.kind in (setup.NO_CRF, UNTRAINED):
        return fit

    calibrated = calibrate(material, split.seen, first.parameters, prepared.workers, scaling)
    if fit.kind == CALIBRATION:
        if calibrated is None:
            return fit
        return replace(fit, parameters=calibrated)
    return _fit_to_all(fit, training, calibrated)


def _fit_to_all(fit: FitResult, training: Fit, calibrated: CrfParameters | None) -> FitResult:
    """Train the winning start on all cases of its fold, also on those that decided.

    `calibrated` is the network recalibrated on these cases, which the start may build on.
    """
    starts = {start.name: start for start in training.starts}
    if calibrated is not None:
        first = training.starts[0]
        recalibrated = with_calibrated(first, calibrated)
        starts[recalibrated.name] = recalibrated
    # The kind is known, so these cases have nothing to decide.
    seen = tuple(training.split.seen)
    fitted = replace(
        training,
        split=Split(seen, seen, ()),
        starts=[starts[fit.start]],
        num_optimizer_steps=fit.best_optimizer_step,
        kind=fit.kind,
    ).run()
    if fitted.is_network:
        return fit
    return replace(fit, parameters=fitted.parameters, trained=fitted.trained)


def fingerprint(plan: Plan) -> str:
    """Return a digest of everything that the result depends on.

    These are settings, and names, sizes and dates of the files.
    """
    cases = plan.cases
    entries: list[object] = [
        __version__,
        replace(plan.options, output=Path(), threads=None, resume=False),
        plan.device.is_gpu,
        plan.folds,
        plan.regions,
        cases.label_names,
        cases.regions,
    ]
    for case in cases.files:
        for path in case.paths:
            for file in files_read(path):
                state = None
                # If a separate file of voxels is missing, reading reports it.
                if file in case.paths or file.exists():
                    status = file.stat()
                    state = (status.st_size, status.st_mtime_ns)
                entries.append((case.case_id, file.name, state))
    return hashlib.sha256(repr(entries).encode()).hexdigest()


def read_folds(paths: Sequence[Path], digest: str) -> dict[int, FoldResult]:
    """Return the folds that a stopped run has finished, by their numbers.

    Raise InputError for a file of another run, or of no fold.
    """
    finished = {}
    for number, path in enumerate(paths):
        if not path.exists():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["fingerprint"] != digest:
                raise InputError("it is of a run with other data, options or another version")
            finished[number] = from_plain(FoldResult, content["fold"])
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            ArithmeticError,
            RecursionError,
            CrfRefineError,
        ) as error:
            reason = shorten(error, MAX_OF_A_REASON)
            raise InputError(
                f"{path}: not a fold of this run: {reason}; "
                "repeat its options exactly, or leave --resume out"
            ) from None
    return finished


def train_on_all_cases(
    prepared: Prepared, folds: Sequence[FoldResult], scaling: VectorScaling
) -> FitResult:
    """Return the result of the training on all cases, to which `scaling` is fitted, too.

    The result is the network alone if the CRFs of the folds do not help the cases held out.
    """
    fits = [fold.tuned.fit for fold in folds]
    gains = gains_held_out(folds)
    network_mean = mean_defined([fit.network_score for fit in fits])
    helping = [fit for fit in fits if not fit.is_network]
    if not helping or not is_gain(gains):
        return no_crf(fits[0].parameters, network_mean, gains)

    progress = prepared.progress
    progress.stage_started(ALL_CASES)
    material = prepared.material
    everything = range(len(material.crops))
    base = prepared.starts[0].parameters
    calibrated = calibrate(material, everything, base, prepared.workers, scaling)
    # The deciding cases of all folds choose the kind; it is mostly the kind that was measured on
    # the cases held out.
    chosen = choose(pooled([fit.candidates for fit in fits]))
    kind = helping[0].kind if chosen is None else chosen.kind
    unmoved = {CALIBRATION: calibrated, UNTRAINED: prepared.plan.rivals.untrained}.get(kind)
    if unmoved is not None:
        fit = taken(Candidate(kind, kind, unmoved, 0, gains), network_mean)
    else:
        fit = _continue_folds(prepared, folds, calibrated, kind)
    progress.training_ended(ALL_CASES, f"{ALL_CASES}: {fit.describe()}")
    return fit


def _continue_folds(
    prepared: Prepared, folds: Sequence[FoldResult], calibrated: CrfParameters | None, kind: str
) -> FitResult:
    """Train the best of the folds' models on all cases, and return the candidate of a kind."""
    plan = prepared.plan
    starts = []
    steps = []
    for fold in folds:
        fit = fold.tuned.fit
        if not fit.is_network and fit.trained is not None:
            starts.append(Start(f"{fold.name}: {fit.start}", fit.trained))
            steps.append(fit.best_optimizer_step)
    half = int(np.median(steps)) // 2
    everything = tuple(range(len(plan.cases.files)))
    training = Fit(
        prepared.material,
        prepared.workers,
        prepared.progress.stepped,
        ALL_CASES,
        Split(everything, everything, ()),
        starts,
        num_optimizer_steps=min(max(setup.EVALUATE_EVERY, half), plan.num_optimizer_steps),
        step_length=STEP_LENGTH,
        trains_best=True,
        calibrated=calibrated,
        rivals=plan.rivals,
        kind=kind,
    )
    return training.run()


def gains_held_out(folds: Sequence[FoldResult]) -> tuple[float, ...]:
    """Return how much the CRFs of the folds added to the mean Dice of the cases held out.

    There is a gain for each case that has a Dice.
    """
    gains = []
    for fold in folds:
        for values in fold.measured.values():
            changes = []
            for region, trained in values[TRAINED].items():
                change = trained["dice"] - values[NETWORK][region]["dice"]
                if not math.isnan(change):
                    changes.append(change)
            if changes:
                gains.append(sum(changes) / len(changes))
    return tuple(gains)


def make_report(result: TrainingResult) -> dict[str, Any]:
    """Return the content of the report, as JSON has it."""
    cases = result.plan.cases
    comparison = result.comparison
    return {
        "seconds": result.seconds,
        "device": result.plan.device.name,
        "threads": result.threads,
        "options": _options_entry(result.plan),
        "cases": cases.case_ids,
        "left_out": left_out_entries(cases.left_out),
        "label_names": cases.label_names,
        "channels": to_plain(cases.regions),
        "regions": result.plan.labels_of_regions,
        "verdict": comparison.verdict.to_dict(),
        "verdict_without_postprocessing": comparison.verdict_alone.to_dict(),
        "parameters": result.parameters.to_dict(),
        "final": _fit_entry(result.final.fit),
        **_rivals_entries(result.final),
        "folds": [_fold_entry(fold, cases.case_ids) for fold in result.folds],
        "comparison": summary_dicts(comparison.summary),
        "comparison_with_largest_component": summary_dicts(comparison.summary_of_largest),
        "comparison_of_probabilities": summary_dicts(comparison.summary_of_probabilities),
        "measurements": [asdict(line) for line in comparison.table],
    }


def _options_entry(plan: Plan) -> dict[str, Any]:
    """Return what the report says of the options of a run."""
    options = plan.options
    input_type = options.input_type
    if plan.cases.declared is not None:
        input_type = "labels"
    return {
        **vars(options.data),
        "input_type": input_type,
        "num_folds": len(plan.folds),
        "num_iterations": options.num_optimizer_steps,
        "learn": options.learn,
        "loss": options.loss,
        "seed": options.seed,
        "resample": options.resample,
        "mapping": mapping_of(options.mapped),
        "reference_mapping": mapping_of(options.mapped, REFERENCE),
        "config": options.config,
    }


def _fold_entry(fold: FoldResult, case_ids: Sequence[str]) -> dict[str, Any]:
    """Return what the report says of a fold."""
    entry: dict[str, Any] = {"name": fold.name}
    for role, numbers in vars(fold.split).items():
        entry[role] = [case_ids[number] for number in numbers]
    entry["fit"] = _fit_entry(fold.tuned.fit)
    entry.update(_rivals_entries(fold.tuned))
    return entry


def _fit_entry(fit: FitResult) -> dict[str, Any]:
    """Return what the report says of a training."""
    entry: dict[str, Any] = to_plain(fit)
    entry["is_network"] = fit.is_network
    entry["is_calibration"] = fit.kind == CALIBRATION
    return entry


def _rivals_entries(tuned: Tuned) -> dict[str, Any]:
    """Return what the report says of the rivals of a CRF, tuned on the same cases."""
    return {
        "vector_scaling": to_plain(tuned.scaling),
        "guided_filter": to_plain(tuned.guidance),
        "keep_largest": tuned.keep_largest,
    }


def default_output(folder: Path) -> Path:
    """Return the parameter file to write in a folder.

    Raise InputError if it holds a file of that name that `train-crf` has not written.
    """
    path = folder / DEFAULT_NAME
    if not os.path.lexists(path):
        return path
    start = f"# {WRITTEN_BY}".encode()
    if path.is_file() and path.read_bytes().startswith(start):
        return path
    raise InputError(
        f"{path}: was not written by train-crf, so it is not replaced; "
        "name another file with --output"
    )
