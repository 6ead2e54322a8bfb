"""The cross-validation: in each fold, a CRF is trained on some cases and measured on those held out.

The starts are tried first without training, once for all folds: a forward pass costs a fraction of a gradient, and at a bandwidth ten
times too large there is nothing to learn from the gradient. A finished fold goes into a JSON file, from which `--resume` takes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import crfrefine
from crfrefine.base.plain import from_plain, to_plain
from crfrefine.base.text import MAX_OF_A_REASON, shorten
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io.atomic import write_small_file
from crfrefine.io.paths import files_read
from crfrefine.train.calibration import MIN_CALIBRATED, calibrate, calibrate_output, with_calibrated
from crfrefine.train.candidates import MIN_CASES, NO_CRF, NO_RIVALS, UNTRAINED, FitResult
from crfrefine.train.comparison import FoldResult, MethodValues, measure_methods
from crfrefine.train.fitting import Fit, Task
from crfrefine.train.folds import Split
from crfrefine.train.material import Material
from crfrefine.train.model import Model, mean_defined, mean_dice
from crfrefine.train.plan import Plan, Prepared
from crfrefine.train.starts import NUM_TRAINED, Start
from crfrefine.train.threads import Workers

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
