"""The whole of `crfrefine train-crf`, stage after stage: prepare, cross-validate, train on all cases, compare, write.

The starts are tried first, untrained: at a bandwidth ten times too large there is nothing to learn
from the gradient.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import crfrefine
from crfrefine.base.inputs import add_inputs, check_no_input, keeping_inputs
from crfrefine.base.limits import available_threads
from crfrefine.base.plain import from_plain, to_plain
from crfrefine.base.text import MAX_OF_A_REASON, listed, shorten
from crfrefine.errors import ConfigError, CrfRefineError, InputError
from crfrefine.io.atomic import check_replaceable, write_small_file
from crfrefine.io.paths import files_read
from crfrefine.runs.cases.case_files import CaseFiles, left_out_entries
from crfrefine.statistics.comparison import summary_dicts
from crfrefine.train import starts as setup
from crfrefine.train.baselines import (
    MIN_CALIBRATED,
    Scores,
    Tuned,
    calibrate,
    calibrate_output,
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
from crfrefine.train.fit import Fit, score_cases
from crfrefine.train.material import choose_device
from crfrefine.train.model import Model, mean_defined
from crfrefine.train.observer import SCREENING_SHARE, Progress, TrainingObserver, Workers
from crfrefine.train.options import DEFAULT_LEARN, WRITTEN_BY, TrainingOptions
from crfrefine.train.plan import Plan, Prepared, Split, make_plan, prepare
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

MAX_SCREENED = 40  # cases that the starts are tried on, at most
# Step length in the training on all cases, which starts where the folds ended, relative to that in
# the folds.
STEP_LENGTH = 0.3
SCHEMA = 1
DEFAULT_NAME = "crfrefine.toml"  # the parameter file in the folder of a trained network of nnU-Net


@keeping_inputs()
def run_training(
    options: TrainingOptions, observer: TrainingObserver | None = None
) -> TrainingResult:
    """Fit the CRF to labeled cases, write the results, and return them.

    Finished folds stay if the run is stopped.
    """
    started = time.monotonic()
    add_inputs(*filter(None, [options.config]))
    if not options.learn or not set(options.learn) <= set(DEFAULT_LEARN):
        groups = listed(options.learn) or "nothing"
        raise ConfigError(
            f"--learn: expected some of {', '.join(DEFAULT_LEARN)}, separated by commas; got {groups}"
        )
    options.check_files()
    plan = make_plan(options, choose_device(options.device))
    check_replaceable(*plan.fold_files)
    for path in options.files:
        check_no_input(path)
    finished = read_folds(plan.fold_files, fingerprint(plan)) if options.resume else {}
    observer = observer or TrainingObserver()
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(
        1
        # Sums of several threads depend on how many there are; the time is spent in the engine anyway.
    )
    try:
        with Workers(
            options.threads or available_threads(), one_by_one=plan.device.is_gpu
        ) as workers:
            result = _train(plan, finished, observer, workers, started)
    except KeyboardInterrupt as interrupt:
        if any(path.exists() for path in plan.fold_files):
            interrupt.add_note(
                f"finished folds are beside {options.output}, run again with --resume for the rest"
            )
        raise
    finally:
        torch.set_num_threads(torch_threads)
    origin = f" train-crf on {datetime.now(UTC):%Y-%m-%d} from {len(plan.cases.files)} cases: {options.report.name} has the verdict."
    options.write(SCHEMA, make_report(result), result.parameters, origin)
    for path in plan.fold_files:
        path.unlink(missing_ok=True)
    return result


def _train(
    plan: Plan,
    finished: Mapping[int, FoldResult],
    observer: TrainingObserver,
    workers: Workers,
    started: float,
) -> TrainingResult:
    """Prepare, cross-validate, train on all cases, and compare."""
    observer.run_started(plan.describe(workers.threads))
    for note in filter(None, (plan.device.note, *plan.cases.notes)):
        observer.note(note)
    progress = Progress(
        observer, 1 + len(plan.folds) - len(finished), setup.NUM_TRAINED * plan.num_optimizer_steps
    )
    prepared = prepare(plan, workers, progress)
    starts = choose_starts(
        prepared, [number for number in range(len(plan.folds)) if number not in finished]
    )
    folds = tuple(
        finished.get(number) or _run_fold(number, starts[number], prepared)
        for number in range(len(plan.folds))
    )
    everything = range(len(plan.cases.files))
    fit = calibrate_output(
        train_on_all_cases(prepared, folds), everything, prepared.material, workers
    )
    final = prepared.tune_rivals(fit, everything)
    return TrainingResult(
        plan, folds, final, compare(folds, plan), time.monotonic() - started, workers.threads
    )


def choose_starts(prepared: Prepared, folds: Sequence[int]) -> dict[int, Sequence[Start]]:
    """Return the starts for each of some folds: those of different bandwidths that are best, untrained, on the cases of the fold."""
    plan = prepared.plan
    starts = prepared.starts
    material = prepared.material
    progress = prepared.progress
    if not folds or len(starts) <= setup.NUM_TRAINED:
        return dict.fromkeys(folds, starts)
    progress.observer.stage_started(f"trying {len(starts)} starts")
    cases = sorted(
        {
            int(number)
            for number in np.linspace(
                0, len(material.crops) - 1, min(len(material.crops), MAX_SCREENED)
            ).round()
        }
    )
    samples = [material.samples[case] for case in cases]
    columns = []
    for start in starts:
        refine = Model(start.parameters, (), material.sizes, material.device).refine
        columns.append(score_cases(refine, samples, material, prepared.workers)[0])
        progress.observer.progressed(SCREENING_SHARE * len(columns) / len(starts))
    scores = Scores(starts, np.array(columns).T)
    chosen: dict[int, Sequence[Start]] = {}
    for fold in folds:
        means = scores.means(
            [row for row, case in enumerate(cases) if case in plan.folds[fold].seen]
        )
        best: dict[str, Start] = {}
        for number in np.argsort(-means, kind="stable"):
            thetas = repr(
                [replace(kernel, weight=0.0) for kernel in starts[number].parameters.bilateral]
            )
            if len(best) < setup.NUM_TRAINED:
                best.setdefault(thetas, starts[number])
        chosen[fold] = list(best.values())
    return chosen


def _run_fold(number: int, starts: Sequence[Start], prepared: Prepared) -> FoldResult:
    """Return the result of a fold, and write it into its file."""
    plan = prepared.plan
    observer = prepared.progress.observer
    split = plan.folds[number]
    name = f"cross-validation fold {number + 1} of {len(plan.folds)}"
    observer.stage_started(name)
    fit = calibrate_output(
        _fit(name, split, starts, prepared), split.seen, prepared.material, prepared.workers
    )
    tuned = prepared.tune_rivals(fit, split.seen)
    observer.stage_started(f"{name}: measuring the cases held out")
    regions = {region.name: region.labels for region in plan.regions}
    if plan.device.is_gpu:
        torch.cuda.empty_cache()  # The engine allocates without PyTorch.

    def measure(files: CaseFiles, threads: int) -> MethodValues:
        return measure_methods(plan.read(files, threads), regions, tuned, plan.device.name, threads)

    held_out = [plan.cases.files[case] for case in split.held_out]
    values = prepared.workers.run(measure, held_out, one_by_one=plan.cases.are_large)
    result = FoldResult(
        name,
        split,
        tuned,
        {files.case_id: own for files, own in zip(held_out, values, strict=True)},
    )
    write_small_file(
        plan.fold_files[number],
        json.dumps({"fingerprint": fingerprint(plan), "fold": to_plain(result)}).encode(),
    )
    prepared.progress.part_ended()
    observer.stage_ended(f"{name}: {fit.describe()}")
    return result


def _fit(name: str, split: Split, starts: Sequence[Start], prepared: Prepared) -> FitResult:
    """Train on the cases of a fold that supply gradients.

    Its deciding cases choose the candidate.
    """
    plan = prepared.plan
    material = prepared.material
    workers = prepared.workers
    first = starts[0]
    calibrated = calibrate(material, split.training, first.parameters, workers)
    if calibrated is not None and len(split.training) >= MIN_CALIBRATED:
        starts = [first, with_calibrated(first, calibrated)]
    num_steps = plan.num_optimizer_steps
    rivals = plan.rivals if len(split.seen) >= setup.MIN_CASES else setup.NO_RIVALS
    training = Fit(
        *prepared.tools, name, split, starts, num_steps, calibrated=calibrated, rivals=rivals
    )
    fit = training.run()
    if fit.kind in (setup.NO_CRF, UNTRAINED):
        return fit
    # The choice is fitted to all cases of the fold, those that decided too, as the rivals are:
    # nothing is left to be decided.
    seen = tuple(split.seen)
    calibrated = calibrate(material, seen, first.parameters, workers)
    if fit.kind == CALIBRATION:
        if calibrated is None:
            return fit
        return replace(fit, parameters=calibrated)
    recalibrated = [] if calibrated is None else [with_calibrated(first, calibrated)]
    named = {start.name: start for start in (*starts, *recalibrated)}
    again = Split(seen, seen, ())
    fitted = replace(
        training,
        split=again,
        starts=[named[fit.start]],
        num_optimizer_steps=fit.best_optimizer_step,
        kind=fit.kind,
    ).run()
    if fitted.is_network:
        return fit
    return replace(fit, parameters=fitted.parameters, trained=fitted.trained)


def fingerprint(plan: Plan) -> str:
    """Return a digest of everything that the result depends on: settings, and names, sizes and dates of the files."""
    cases = plan.cases
    options = replace(plan.options, output=Path(), threads=None, resume=False)
    entries: list[Any] = [
        crfrefine.__version__,
        options,
        plan.device.is_gpu,
        plan.folds,
        plan.regions,
        cases.label_names,
        cases.regions,
    ]
    for case in cases.files:
        for file in (file for path in case.paths for file in files_read(path)):
            # If a separate file of voxels is missing, reading reports it.
            status = file.stat() if file in case.paths or file.exists() else None
            entries.append(
                (case.case_id, file.name, status and (status.st_size, status.st_mtime_ns))
            )
    return hashlib.sha256(repr(entries).encode()).hexdigest()


def read_folds(paths: Sequence[Path], digest: str) -> dict[int, FoldResult]:
    """Return the folds that a stopped run has finished, by their numbers.

    Raise InputError for a file of another run, or of no fold.
    """
    finished = {}
    for number, path in ((number, path) for number, path in enumerate(paths) if path.exists()):
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
                f"{path}: not a fold of this run: {reason}; repeat its options exactly, or leave --resume out"
            ) from None
    return finished


def train_on_all_cases(prepared: Prepared, folds: Sequence[FoldResult]) -> FitResult:
    """Return the result of the training on all cases.

    No CRF if the CRFs of the folds do not help the cases held out.
    """
    plan = prepared.plan
    fits = [fold.tuned.fit for fold in folds]
    gains = gains_held_out(folds)
    everything = tuple(range(len(plan.cases.files)))
    helping = [fit for fit in fits if not fit.is_network]
    network_mean = mean_defined([fit.network_score for fit in fits])
    if not helping or not is_gain(gains):
        return no_crf(fits[0].parameters, network_mean, gains)
    name = "all cases"
    prepared.progress.observer.stage_started(name)
    calibrated = calibrate(
        prepared.material, everything, prepared.starts[0].parameters, prepared.workers
    )
    # The deciding cases of all folds choose the kind; it is mostly the kind that was measured on
    # the cases held out.
    chosen = choose(pooled([fit.candidates for fit in fits]))
    kind = helping[0].kind if chosen is None else chosen.kind
    unmoved = {CALIBRATION: calibrated, UNTRAINED: plan.rivals.untrained}.get(kind)
    if unmoved is not None:
        fit = taken(Candidate(kind, kind, unmoved, 0, gains), network_mean)
    else:
        trained = [
            (fold.name, fit)
            for fold, fit in zip(folds, fits, strict=True)
            if not fit.is_network and fit.trained is not None
        ]
        half = int(np.median([fit.best_optimizer_step for _, fit in trained])) // 2
        starts = [
            Start(f"{fold}: {fit.start}", fit.trained)
            for fold, fit in trained
            if fit.trained is not None
        ]
        num_steps = min(max(setup.EVALUATE_EVERY, half), plan.num_optimizer_steps)
        shared = (
            *prepared.tools,
            name,
            Split(everything, everything, ()),
            starts,
            num_steps,
            STEP_LENGTH,
        )
        fit = Fit(
            *shared, trains_best=True, calibrated=calibrated, rivals=plan.rivals, kind=kind
        ).run()
    prepared.progress.observer.stage_ended(f"{name}: {fit.describe()}")
    return fit


def gains_held_out(folds: Sequence[FoldResult]) -> tuple[float, ...]:
    """Return how much the folds' CRFs added to the mean Dice of each case that they had not seen."""
    gains = []
    for values in (values for fold in folds for values in fold.measured.values()):
        changes = [
            values[TRAINED][region]["dice"] - values[NETWORK][region]["dice"]
            for region in values[TRAINED]
        ]
        defined = [change for change in changes if not math.isnan(change)]
        gains += [sum(defined) / len(defined)] if defined else []
    return tuple(gains)


def make_report(result: TrainingResult) -> dict[str, Any]:
    """Return the content of the report, as JSON has it."""
    plan = result.plan
    comparison = result.comparison
    options = result.plan.options
    cases = result.plan.cases
    return {
        "seconds": result.seconds,
        "device": plan.device.name,
        "threads": result.threads,
        "options": {
            **vars(options.data),
            "input_type": "labels" if cases.declared is not None else options.input_type,
            "num_folds": len(plan.folds),
            "num_iterations": options.num_optimizer_steps,
            **{
                name: getattr(options, name)
                for name in ("learn", "loss", "seed", "resample", "config")
            },
        },
        "cases": cases.case_ids,
        "left_out": left_out_entries(cases.left_out),
        "label_names": cases.label_names,
        "channels": to_plain(cases.regions),
        "regions": {region.name: region.labels for region in plan.regions},
        "verdict": comparison.verdict.to_dict(),
        "verdict_without_postprocessing": comparison.verdict_alone.to_dict(),
        "parameters": result.parameters.to_dict(),
        **_tuned_dict("final", result.final),
        "folds": [
            {
                "name": fold.name,
                **{
                    name: [cases.case_ids[case] for case in chosen]
                    for name, chosen in vars(fold.split).items()
                },
                **_tuned_dict("fit", fold.tuned),
            }
            for fold in result.folds
        ],
        "comparison": summary_dicts(comparison.summary),
        "comparison_with_largest_component": summary_dicts(comparison.summary_of_largest),
        "comparison_of_probabilities": summary_dicts(comparison.summary_of_probabilities),
        "measurements": [asdict(line) for line in comparison.table],
    }


def _tuned_dict(name: str, tuned: Tuned) -> dict[str, Any]:
    fit = tuned.fit
    return {
        name: {
            **to_plain(fit),
            "is_network": fit.is_network,
            "is_calibration": fit.kind == CALIBRATION,
        },
        "vector_scaling": to_plain(tuned.scaling),
        "guided_filter": to_plain(tuned.guidance),
        "keep_largest": tuned.keep_largest,
    }


def default_output(folder: Path) -> Path:
    """Return the parameter file to write in a folder.

    Raise InputError if it holds a file of that name that `train-crf` has not written.
    """
    path = folder / DEFAULT_NAME
    start = f"# {WRITTEN_BY}".encode()
    if os.path.lexists(path) and not (path.is_file() and path.read_bytes().startswith(start)):
        raise InputError(
            f"{path}: was not written by train-crf, so it is not replaced; name another file with --output"
        )
    return path
