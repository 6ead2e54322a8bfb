"""A rival of the CRF: the network's probabilities, recalibrated and decided for the best expected Dice instead of by the argmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.dice_decision import dice_labels, dice_region_labels
from crfrefine.runs.execution.threads import Workers
from crfrefine.train.baselines import Scores, VectorScaling, fit_scaling, label_confusion, network_labels
from crfrefine.train.crops import FOREGROUND_RATIO, Crop, count_confusion, foreground_ratio, probabilities_of
from crfrefine.train.losses import Loss, make_loss, make_region_loss
from crfrefine.train.material import Material
from crfrefine.train.model import mean_dice

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.arrays.region_scheme import RegionScheme

TEMPERATURES = (0.7, 1.0, 1.4, 2.0)
"""Tried beside what is fitted: the best decision is often not that of the most likely calibration, since voxels are not independent."""


@dataclass(frozen=True)
class DiceDecision:
    """How logits are recalibrated before the decision; None: it was worse than the argmax, and the rival is the network itself."""

    scaling: VectorScaling | None = None


ARGMAX = DiceDecision()
"""The network itself."""


def decided_labels(
    logits: NDArray[np.floating[Any]], scaling: VectorScaling, regions: RegionScheme | None, mask: NDArray[np.bool_] | None
) -> NDArray[np.unsignedinteger[Any]]:
    """Return the label map of (L, *grid) logits with the best expected Dice, or of log-odds (R, *grid) of regions.

    It is background where nothing else has a hundredth of background's probability: there, millions of voxels would add up to a
    structure's expected size as soon as the temperature rises.
    """
    return _decide(logits, scaling, regions, _near(logits, regions, mask))


def score_decisions(material: Material, workers: Workers) -> NDArray[np.float64]:
    """Return the mean Dice (cases, 1 + temperatures) of the argmax and of the decision after each of TEMPERATURES."""

    def scores(crop: Crop, threads: int) -> list[float]:
        network = mean_dice(label_confusion(crop, network_labels(crop)), material.regions)
        alone = [_only_temperature(temperature, len(crop.logits)) for temperature in TEMPERATURES]
        return [network, *_scores(crop, alone, material.regions)]

    return np.array(workers.run(scores, material.crops))


def tune_decision(
    scores: NDArray[np.float64], scaling: VectorScaling, cases: Sequence[int], material: Material, workers: Workers
) -> DiceDecision:
    """Choose the recalibration that is best on the cases that may be fitted to.

    It is one of TEMPERATURES, whose `scores` are those of `score_decisions`; the scaling that is a rival itself; or the likeliest one.
    """
    fitted = (scaling, fit_scaling(material, cases, workers, loss=_cross_entropy(material)))
    found = workers.run(lambda case, threads: _scores(material.crops[case], fitted, material.regions), cases)
    table = np.column_stack([scores[list(cases)], np.array(found)])
    choices = (None, *(_only_temperature(temperature, material.sizes[0]) for temperature in TEMPERATURES), *fitted)
    return DiceDecision(Scores(choices, table).best(range(len(cases))))


def _scores(crop: Crop, scalings: Sequence[VectorScaling], regions: Sequence[tuple[int, ...]]) -> list[float]:
    """Return the mean Dice of the decision after each scaling."""
    # Most voxels are sure to be background: they are counted once, for all scalings.
    logits = crop.logits.astype(np.float32)
    places = np.flatnonzero(_near(logits, crop.regions, crop.mask))
    flat, labels = logits.reshape(len(logits), -1)[:, places], np.ravel(crop.labels)[places]
    far = label_confusion(crop, np.zeros_like(crop.labels)) - count_confusion(labels, np.zeros_like(labels), crop.num_labels)
    return [
        mean_dice(far + count_confusion(labels, _decide(flat, scaling, crop.regions, None), crop.num_labels), regions)
        for scaling in scalings
    ]


def _near(logits: NDArray[np.floating[Any]], regions: RegionScheme | None, mask: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """Return where something but background has at least a hundredth of its probability, inside the mask."""
    near = foreground_ratio(logits, regions) > math.log(FOREGROUND_RATIO)
    return near if mask is None else near & mask


def _decide(
    logits: NDArray[np.floating[Any]], scaling: VectorScaling, regions: RegionScheme | None, mask: NDArray[np.bool_] | None
) -> NDArray[np.unsignedinteger[Any]]:
    probabilities = probabilities_of(scaling.apply(logits), regions)
    return dice_labels(probabilities, mask) if regions is None else dice_region_labels(probabilities, regions, mask)


def _only_temperature(temperature: float, num_channels: int) -> VectorScaling:
    return VectorScaling(temperature, (0.0,) * num_channels)


def _cross_entropy(material: Material) -> Loss:
    """Return the cross-entropy of a case, which weighs all voxels alike: a proper score, unlike soft Dice."""
    scheme, num_labels = material.crops[0].regions, material.crops[0].num_labels
    alike = (1.0 / num_labels,) * num_labels
    return make_loss("ce", material.regions, alike) if scheme is None else make_region_loss("ce", scheme, alike)
