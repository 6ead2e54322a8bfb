"""Which starts a training begins with, and with which of them it ends.

Starts are tried first, without any training: at a bandwidth ten times too large, the gradient says
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

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
    samples = [material.samples[case] for case in cases]
    rounds: list[Sequence[Crop | Sample]] = [samples]
    if not all(sample.is_whole for sample in samples):
        rounds.append([material.crops[case] for case in cases])

    def dice_of(start: Candidate, sources: Sequence[Crop | Sample], share: float) -> Float64:
        dice = _dice_of(start, sources, material)
        material.progress.start_tried(share)
        return dice

    best_of_folds: dict[int, Sequence[Candidate]] = dict.fromkeys(folds, starts)
    for sources in rounds:
        together = set[Candidate]().union(*best_of_folds.values())
        tried = [start for start in starts if start in together]
        share = 1 / len(rounds) / len(tried)
        try_one = partial(dice_of, sources=sources, share=share)
        dice = dict(zip(tried, material.workers.run_parts(try_one, tried), strict=True))
        for fold in folds:
            seen = material.plan.folds[fold].seen
            rows = [row for row, case in enumerate(cases) if case in seen]
            of_fold = best_of_folds[fold]
            best_first = [start for start in ranked(dice, rows) if start in of_fold]
            # A fold has only its own finalists: those of others were chosen on cases that it holds
            # out.
            is_last = sources is rounds[-1]
            best_of_folds[fold] = best_first if is_last else best_first[:NUM_FINALISTS]
    chosen: dict[int, Sequence[Candidate]] = {}
    for fold, best in best_of_folds.items():
        # The first starts that differ by more than their weights.
        start_of_bandwidths: dict[str, Candidate] = {}
        for start in best:
            kernels = [replace(kernel, weight=0.0) for kernel in start.parameters.bilateral]
            start_of_bandwidths.setdefault(repr(kernels), start)
        chosen[fold] = list(start_of_bandwidths.values())[: setup.NUM_TRAINED]
    return chosen


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
