"""Which starts a training begins with, and with which of them it ends.

Starts are tried first, without any training: at a bandwidth ten times too large, the gradient says
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from crfrefine.base.array_types import Float64
from crfrefine.metrics.overlap import mean_defined
from crfrefine.train import starts as setup
from crfrefine.train.choice import Candidate, ranked
from crfrefine.train.crops import Crop
from crfrefine.train.fit import Trajectory, score_cases, spread_out
from crfrefine.train.material import Material, Sample
from crfrefine.train.model import refiner_of

MAX_SCREENED = 40  # cases that the starts are tried on, at most
# Starts of a fold that are tried on whole crops, too. Tiles cut off their surroundings, and with
# it the messages of wide kernels: on atria with a theta_alpha of 7.5 mm, tiles tell a gain of 1.5
# points and whole crops one of 3.3.
NUM_FINALISTS = 4


def choose_starts(material: Material, folds: Sequence[int]) -> dict[int, Sequence[Candidate]]:
    """Return the starts to train in each of some folds.

    They have different bandwidths, and are the best without training on the cases of the fold.
    """
    starts = material.starts
    if not folds or len(starts) <= setup.NUM_TRAINED:
        return dict.fromkeys(folds, starts)

    material.progress.stage_started(f"trying {len(starts)} starts")
    cases = setup.evenly_spread(len(material.crops), MAX_SCREENED)
    samples = []
    crops = []
    for case in cases:
        samples.append(material.samples[case])
        crops.append(material.crops[case])
    rows_of_folds = {}
    for fold in folds:
        seen = material.plan.folds[fold].seen
        rows_of_folds[fold] = [row for row, case in enumerate(cases) if case in seen]

    best_of_folds: dict[int, Sequence[Candidate]] = dict.fromkeys(folds, starts)
    if all(sample.is_whole for sample in samples):
        best_of_folds = _ranked(best_of_folds, rows_of_folds, samples, material, share=1.0)
    else:
        best_of_folds = _ranked(best_of_folds, rows_of_folds, samples, material, share=0.5)
        # A fold has only its own finalists: those of others were chosen on cases that it holds out.
        finalists = {fold: best[:NUM_FINALISTS] for fold, best in best_of_folds.items()}
        best_of_folds = _ranked(finalists, rows_of_folds, crops, material, share=0.5)
    chosen: dict[int, Sequence[Candidate]] = {}
    for fold, best in best_of_folds.items():
        # The first starts that differ by more than their weights.
        start_of_bandwidths: dict[str, Candidate] = {}
        for start in best:
            kernels = [replace(kernel, weight=0.0) for kernel in start.parameters.bilateral]
            start_of_bandwidths.setdefault(repr(kernels), start)
        chosen[fold] = list(start_of_bandwidths.values())[: setup.NUM_TRAINED]
    return chosen


def _ranked(
    starts_of_folds: Mapping[int, Sequence[Candidate]],
    rows_of_folds: Mapping[int, Sequence[int]],
    sources: Sequence[Crop | Sample],
    material: Material,
    *,
    share: float,
) -> dict[int, Sequence[Candidate]]:
    """Return the starts of each fold, the best first by Dice on some of the cases.

    `rows_of_folds` are the cases that count in each, `share` is that of the trying of starts.
    """
    together = set[Candidate]().union(*starts_of_folds.values())
    starts = [start for start in material.starts if start in together]

    def dice_of(start: Candidate) -> Float64:
        dice = _dice_of(start, sources, material)
        material.progress.start_tried(share / len(starts))
        return dice

    tried = dict(zip(starts, material.workers.run_parts(dice_of, starts), strict=True))
    best_of_folds: dict[int, Sequence[Candidate]] = {}
    for fold, rows in rows_of_folds.items():
        of_fold = starts_of_folds[fold]
        best_of_folds[fold] = [start for start in ranked(tried, rows) if start in of_fold]
    return best_of_folds


def best_on_crops(
    trajectories: Sequence[Trajectory], deciding: Sequence[int], material: Material
) -> Trajectory:
    """Return the trajectory whose best values have the highest Dice on the deciding cases.

    The trajectories are the best first by samples of these cases; whole crops decide if there are
    larger ones.
    """
    cases = spread_out(deciding)
    if len(trajectories) == 1 or all(material.samples[case].is_whole for case in cases):
        return trajectories[0]
    crops = [material.crops[case] for case in cases]

    def mean_dice(trajectory: Trajectory) -> float:
        if trajectory.best is None:
            return -math.inf
        mean = mean_defined(_dice_of(trajectory.best, crops, material))
        return -math.inf if math.isnan(mean) else mean

    return max(trajectories, key=mean_dice)


def _dice_of(candidate: Candidate, sources: Sequence[Crop | Sample], material: Material) -> Float64:
    """Return the mean Dice of each case with a candidate."""
    dice, _ = score_cases(refiner_of(candidate, material), sources, material)
    return np.array([mean_defined(of_case) for of_case in dice])
