"""The folds of a training run, and the files that keep them.

Each fold trains on the cases that it does not hold out, and tries its candidates on those that it
does. All folds are trained before any is measured, since they choose the kind of each other's
model.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from crfrefine.base.plain import from_plain, to_plain
from crfrefine.base.text import MAX_OF_A_REASON, shorten
from crfrefine.cases.case_files import CaseFiles
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io.atomic import write_small_file
from crfrefine.io.paths import files_read
from crfrefine.parameters.model import CrfParameters
from crfrefine.statistics.comparison import means_where_all_defined
from crfrefine.train.baselines import (
    MIN_CALIBRATED,
    calibrate,
    calibrate_output,
    fit_scaling,
    with_calibrated,
)
from crfrefine.train.choice import (
    CALIBRATION,
    CRF,
    UNTRAINED,
    Candidate,
    choose_kind,
    no_crf,
    variants,
)
from crfrefine.train.comparison import MethodValues, Training
from crfrefine.train.fit import (
    Stepped,
    Trajectory,
    fit_starts,
    histories_of,
    score_cases,
    spread_out,
)
from crfrefine.train.material import Material
from crfrefine.train.measuring import measure_methods
from crfrefine.train.model import network_refiner, refiner_of
from crfrefine.train.plan import Plan, Split
from crfrefine.train.preparing import Prepared
from crfrefine.train.screening import best_on_crops
from crfrefine.train.starts import Start
from crfrefine.version import __version__


def train_fold(number: int, starts: Sequence[Start], prepared: Prepared) -> Training:
    """Return a fold that is trained but not measured, and write it into its file.

    It has the trained model; which candidate is taken depends on the other folds.
    """
    plan = prepared.plan
    material = prepared.material
    split = plan.folds[number]
    name = f"cross-validation fold {number + 1} of {len(plan.folds)}"
    prepared.progress.stage_started(name)
    first = starts[0]
    calibrated = calibrate(material, split.training, first.parameters)
    if calibrated is not None and len(split.training) >= MIN_CALIBRATED:
        starts = [first, with_calibrated(first, calibrated)]
    stepped = partial(prepared.progress.stepped, name)
    trajectories = fit_starts(material, split, starts, plan.num_optimizer_steps, stepped)
    winner = best_on_crops(trajectories, split.deciding, prepared)

    scaling = fit_scaling(material, split.seen)
    calibrated = calibrate(material, split.seen, first.parameters, scaling)
    models = []
    recalibrated = None
    if calibrated is not None:
        models.append((CALIBRATION, calibrated))
        recalibrated = with_calibrated(first, calibrated)
    if winner.best is not None:
        trained = _fit_to_all(winner, recalibrated, split, material, stepped)
        models += variants(trained, plan.volumes, plan.untrained)

    network_score, candidates = _try(models, winner, split.held_out, prepared)
    fold = Training(
        name,
        split,
        no_crf(winner.start.parameters),
        network_score,
        histories_of(trajectories),
        candidates,
        scaling,
        prepared.largest.best(split.seen),
        prepared.guided.best(split.seen),
    )
    best = fold.candidate(CRF)
    if best is not None:
        fold = replace(fold, chosen=best)
    return _kept(number, fold, prepared)


def _fit_to_all(
    winner: Trajectory,
    recalibrated: Start | None,
    split: Split,
    material: Material,
    stepped: Stepped,
) -> CrfParameters:
    """Train the winning start on all cases of its fold, also on those that decided.

    `recalibrated`, the start on the network recalibrated on these cases, replaces one of its name.
    """
    assert winner.best is not None
    start = winner.start
    if recalibrated is not None and recalibrated.name == start.name:
        start = recalibrated
    seen = tuple(split.seen)
    (fitted,) = fit_starts(
        material, Split(seen, seen, ()), [start], winner.best.optimizer_step, stepped
    )
    return (fitted.best or winner.best).parameters


def _try(
    models: Sequence[tuple[str, CrfParameters]],
    winner: Trajectory,
    held_out: Sequence[int],
    prepared: Prepared,
) -> tuple[float, tuple[Candidate, ...]]:
    """Return the mean Dice of the network on the cases held out, and all candidates.

    `models` has kind and parameters of each candidate, simpler ones first.
    """
    material = prepared.material
    crops = [material.crops[case] for case in spread_out(held_out)]
    refiners = [network_refiner(material.device)]
    for kind, parameters in models:
        refiners.append(refiner_of(kind, parameters, material))
    dice = []
    for refine in refiners:
        of_refiner, _ = score_cases(refine, crops, material)
        dice.append(of_refiner.T)
    # All candidates are compared with the network over the same regions of the same cases.
    means = means_where_all_defined(np.array(dice))
    network, *of_models = means[:, ~np.isnan(means[0])]

    candidates = []
    for (kind, parameters), values in zip(models, of_models, strict=True):
        start = kind
        step = 0
        if winner.best is not None and kind not in (CALIBRATION, UNTRAINED):  # It was trained.
            start = winner.best.start
            step = winner.best.optimizer_step
        gains = tuple((values - network).tolist())
        candidates.append(Candidate(kind, start, parameters, step, gains))

    network_score = float(network.mean()) if network.size else math.nan
    return network_score, tuple(candidates)


def measure_fold(number: int, folds: Sequence[Training], prepared: Prepared) -> Training:
    """Return a fold with the candidate of the kind that the other folds choose, measured.

    The file of the fold keeps it.
    """
    plan = prepared.plan
    fold = folds[number]
    prepared.progress.stage_started(f"{fold.name}: measuring the cases held out")
    if prepared.material.device.is_gpu:
        torch.cuda.empty_cache()  # The engine allocates without PyTorch.

    best = choose_kind([each.candidates for each in folds], without=number)
    chosen = None if best is None else fold.candidate(best.kind)
    if chosen is None:
        chosen = no_crf(fold.chosen.parameters, fold.chosen.gains)
    chosen = calibrate_output(chosen, fold.split.seen, prepared.material)
    fold = replace(fold, chosen=chosen)

    def measure(files: CaseFiles, threads: int) -> MethodValues:
        case = plan.read(files, threads)
        device = prepared.material.device.name
        return measure_methods(case, plan.regions, fold, device, threads)

    held_out = [plan.cases.files[case] for case in fold.split.held_out]
    values = prepared.material.workers.run(measure, held_out, one_by_one=plan.cases.are_large)
    measured = {}
    for files, values_of_case in zip(held_out, values, strict=True):
        measured[files.case_id] = values_of_case
    prepared.progress.training_ended(fold.name, f"{fold.name}: {fold.describe()}")
    return _kept(number, replace(fold, measured=measured), prepared)


def _kept(number: int, fold: Training, prepared: Prepared) -> Training:
    """Write a fold into its file, and return it."""
    content = {"fingerprint": prepared.digest, "fold": to_plain(fold)}
    write_small_file(prepared.plan.fold_files[number], json.dumps(content).encode())
    return fold


def fingerprint(plan: Plan, *, is_gpu: bool) -> str:
    """Return a digest of everything that the result depends on.

    These are settings, and names, sizes and dates of the files.
    """
    cases = plan.cases
    entries: list[object] = [
        __version__,
        replace(plan.options, output=Path(), threads=None, resume=False),
        is_gpu,
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


def read_folds(paths: Sequence[Path], digest: str) -> dict[int, Training]:
    """Return the folds that a stopped run has trained, by their numbers; some are measured, too.

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
            finished[number] = from_plain(Training, content["fold"])
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
