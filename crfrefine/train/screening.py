"""Which starts a training begins with, and with which of them it ends.

Starts are tried first, without any training: at a bandwidth ten times too large, the gradient says
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from crfrefine.parameters.model import CrfParameters
from crfrefine.train import starts as setup
from crfrefine.train.baselines import Scores
from crfrefine.train.crops import Crop
from crfrefine.train.fit import Trajectory, score_cases, spread_out
from crfrefine.train.material import NUM_SAMPLED, Sample
from crfrefine.train.model import Model, mean_defined
from crfrefine.train.preparing import Prepared
from crfrefine.train.starts import Start

MAX_SCREENED = 40  # cases that the starts are tried on, at most
# Starts of a fold that are tried on whole crops, too. Tiles cut off what is around them, and with
# it the messages of wide kernels: on atria with a theta_alpha of 7.5 mm, tiles tell a gain of 1.5
# points and whole crops one of 3.3.
NUM_FINALISTS = 4


def choose_starts(prepared: Prepared, folds: Sequence[int]) -> dict[int, Sequence[Start]]:
    """Return the starts to train in each of some folds.

    They have different bandwidths, and are the best without training on the cases of the fold.
    """
    starts = prepared.starts
    if not folds or len(starts) <= setup.NUM_TRAINED:
        return dict.fromkeys(folds, starts)

    prepared.progress.stage_started(f"trying {len(starts)} starts")
    material = prepared.material
    num_cases = len(material.crops)
    places = np.linspace(0, num_cases - 1, min(num_cases, MAX_SCREENED)).round()
    cases = np.unique(places.astype(int)).tolist()
    samples = []
    crops = []
    for case in cases:
        samples.append(material.samples[case])
        crops.append(material.crops[case])
    rows_of_folds = {}
    for fold in folds:
        seen = prepared.plan.folds[fold].seen
        rows_of_folds[fold] = [row for row, case in enumerate(cases) if case in seen]

    are_whole = _are_whole(crops)
    tried = _try(starts, samples, prepared, share=1.0 if are_whole else 0.5)
    ranked = {}
    for fold, rows in rows_of_folds.items():
        ranked[fold] = _ranked(tried, rows)
    if not are_whole:
        ranked = _ranked_by_crops(ranked, rows_of_folds, crops, prepared)
    chosen: dict[int, Sequence[Start]] = {}
    for fold, best in ranked.items():
        # The first starts that differ by more than their weights.
        start_of_bandwidths: dict[str, Start] = {}
        for start in best:
            kernels = [replace(kernel, weight=0.0) for kernel in start.parameters.bilateral]
            start_of_bandwidths.setdefault(repr(kernels), start)
        chosen[fold] = list(start_of_bandwidths.values())[: setup.NUM_TRAINED]
    return chosen


def _ranked_by_crops(
    ranked: Mapping[int, Sequence[Start]],
    rows_of_folds: Mapping[int, Sequence[int]],
    crops: Sequence[Crop],
    prepared: Prepared,
) -> dict[int, list[Start]]:
    """Return the best starts of each fold, in their order on whole crops.

    A fold has only its own finalists: those of others were chosen on cases that it holds out.
    """
    finalists = {}
    for fold, best in ranked.items():
        finalists[fold] = best[:NUM_FINALISTS]
    together = []
    for start in prepared.starts:
        if any(start in best for best in finalists.values()):
            together.append(start)
    tried = _try(together, crops, prepared, share=0.5)
    by_crops = {}
    for fold, rows in rows_of_folds.items():
        best = finalists[fold]
        by_crops[fold] = [start for start in _ranked(tried, rows) if start in best]
    return by_crops


def best_on_crops(
    trajectories: Sequence[Trajectory], deciding: Sequence[int], prepared: Prepared
) -> Trajectory:
    """Return the trajectory whose best values have the highest Dice on the deciding cases.

    The trajectories are the best first by samples of these cases; whole crops decide if there are
    larger ones.
    """
    crops = [prepared.material.crops[case] for case in spread_out(deciding)]
    if len(trajectories) == 1 or _are_whole(crops):
        return trajectories[0]

    def mean_dice(trajectory: Trajectory) -> float:
        if trajectory.best is None:
            return -math.inf
        mean = mean_defined(_dice_of(trajectory.best.parameters, crops, prepared))
        return -math.inf if math.isnan(mean) else mean

    return max(trajectories, key=mean_dice)


def _are_whole(crops: Sequence[Crop]) -> bool:
    """Return whether the samples of crops are all of their voxels that count."""
    return all(len(crop.tiles) <= NUM_SAMPLED for crop in crops)


def _dice_of(
    parameters: CrfParameters, sources: Sequence[Crop | Sample], prepared: Prepared
) -> NDArray[np.float64]:
    """Return the mean Dice of each case with some parameters."""
    material = prepared.material
    refine = Model(parameters, (), material.sizes, material.device).refine
    dice, _ = score_cases(refine, sources, material)
    return np.array([mean_defined(of_case) for of_case in dice])


def _try(
    starts: Sequence[Start],
    sources: Sequence[Crop | Sample],
    prepared: Prepared,
    *,
    share: float,
) -> Scores[Start]:
    """Return the Dice of each start on some cases: such a share of the trying of starts."""

    def dice_of(start: Start) -> NDArray[np.float64]:
        dice = _dice_of(start.parameters, sources, prepared)
        prepared.progress.start_tried(share / len(starts))
        return dice

    return Scores(starts, np.array(prepared.material.workers.run_parts(dice_of, starts)).T)


def _ranked(tried: Scores[Start], rows: Sequence[int]) -> list[Start]:
    """Return the starts, best first by their mean Dice on the cases of some rows."""
    order = np.argsort(-tried.means(rows), kind="stable")
    return [tried.choices[number] for number in order]
