"""The folds of a training run, and the files that keep them.

Each fold trains on the cases that it does not hold out, and tries its candidates on those that it
does. All folds are trained before any is measured, since they choose the kind of each other's
model.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from crfrefine.base.plain import from_plain, to_plain
from crfrefine.base.text import MAX_OF_A_REASON, shorten
from crfrefine.cases.case_files import CaseFiles
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io.paths import files_read
from crfrefine.io.writing import write_small_file
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
    Candidate,
    choose_kind,
    no_crf,
    ranked,
    variants,
)
from crfrefine.train.comparison import MethodValues, Training
from crfrefine.train.fit import fit_starts, histories_of, score_cases, spread_out
from crfrefine.train.material import Material
from crfrefine.train.measuring import measure_methods
from crfrefine.train.model import network_refiner, refiner_of
from crfrefine.train.plan import Split, TrainingPlan
from crfrefine.train.screening import best_on_crops
from crfrefine.version import __version__


def train_fold(
    number: int, starts_of_folds: Mapping[int, Sequence[Candidate]], material: Material
) -> Training:
    """Return a fold that is trained but not measured, and write it into its file.

    It has the trained model; which candidate is taken depends on the other folds.
    """
    plan = material.plan
    split = plan.folds[number]
    name = f"cross-validation fold {number + 1} of {len(plan.folds)}"
    material.progress.stage_started(name)
    starts = starts_of_folds[number]
    first = starts[0]
    calibrated = calibrate(material, split.training, first.parameters)
    if calibrated is not None and len(split.training) >= MIN_CALIBRATED:
        starts = [first, with_calibrated(first, calibrated)]
    stepped = partial(material.progress.stepped, name)
    trajectories = fit_starts(material, split, starts, plan.num_optimizer_steps, stepped)
    winner = best_on_crops(trajectories, split.deciding, material)

    scaling = fit_scaling(material, split.seen)
    calibrated = calibrate(material, split.seen, first.parameters, scaling)
    models = []
    start = winner.start
    if calibrated is not None:
        models.append(Candidate(CALIBRATION, CALIBRATION, calibrated))
        recalibrated = with_calibrated(first, calibrated)
        if recalibrated.name == start.name:
            start = recalibrated
    best = winner.best
    if best is not None:
        # The start is trained on all cases of the fold, also on those that decided.
        everything = Split(split.seen, split.seen, ())
        (fitted,) = fit_starts(material, everything, [start], best.optimizer_step, stepped)
        trained = replace(best, parameters=(fitted.best or best).parameters)
        models += variants(trained, plan.volumes, plan.untrained)

    network_score, candidates = _try(models, split.held_out, material)
    material.progress.fold_trained(name)
    fold = Training(
        name,
        split,
        no_crf(winner.start.parameters),
        network_score,
        histories_of(trajectories),
        candidates,
        scaling,
        ranked(material.rules, split.seen)[0],
        ranked(material.guided, split.seen)[0],
    )
    return _kept(number, replace(fold, chosen=fold.candidate(CRF) or fold.chosen), material)


def _try(
    models: Sequence[Candidate], held_out: Sequence[int], material: Material
) -> tuple[float, tuple[Candidate, ...]]:
    """Return the mean Dice of the network on the cases held out, and models with their gains."""
    crops = [material.crops[case] for case in spread_out(held_out)]
    refiners = [network_refiner(material.device)]
    refiners += [refiner_of(model, material) for model in models]
    dice = [score_cases(refine, crops, material)[0].T for refine in refiners]
    # All candidates are compared with the network over the same regions of the same cases.
    means = means_where_all_defined(np.array(dice))
    network, *of_models = means[:, ~np.isnan(means[0])]

    candidates = []
    for model, values in zip(models, of_models, strict=True):
        candidates.append(replace(model, gains=tuple((values - network).tolist())))

    network_score = float(network.mean()) if network.size else math.nan
    return network_score, tuple(candidates)


def measure_fold(number: int, folds: Sequence[Training], material: Material) -> Training:
    """Return a fold with the candidate of the kind that the other folds choose, measured.

    The file of the fold keeps it. A measured fold stays as it is.
    """
    plan = material.plan
    fold = folds[number]
    if fold.measured:
        return fold
    material.progress.stage_started(f"{fold.name}: measuring the cases held out")
    if material.device.is_gpu:
        torch.cuda.empty_cache()  # The engine allocates without PyTorch.

    best = choose_kind([each.candidates for each in folds], without=number)
    chosen = None if best is None else fold.candidate(best.kind)
    if chosen is None:
        chosen = no_crf(fold.chosen.parameters, fold.chosen.gains)
    chosen = calibrate_output(chosen, fold.split.seen, material)
    fold = replace(fold, chosen=chosen)

    def measure(files: CaseFiles, threads: int) -> MethodValues:
        case = plan.read(files, threads)
        values = measure_methods(
            case, plan.regions, fold, material.device.name, threads, plan.options.lesions
        )
        material.progress.case_measured()
        return values

    held_out = [plan.cases.files[case] for case in fold.split.held_out]
    values = material.workers.run(measure, held_out, one_by_one=plan.cases.are_large)
    case_ids = [files.case_id for files in held_out]
    fold = replace(fold, measured=dict(zip(case_ids, values, strict=True)))
    material.progress.training_ended(fold.name, f"{fold.name}: {fold.describe()}")
    return _kept(number, fold, material)


def _kept(number: int, fold: Training, material: Material) -> Training:
    """Write a fold into its file, and return it."""
    content = {"fingerprint": material.digest, "fold": to_plain(fold)}
    write_small_file(material.plan.fold_files[number], json.dumps(content).encode())
    return fold


def fingerprint(plan: TrainingPlan, *, is_gpu: bool) -> str:
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
