"""The choice of small-object rules by the Dice of some cases: a small search, smaller where there are few of them.

All labels together come first, then each label, then holes, as the rules are applied. A rule is kept only if it adds more than MARGIN to
the mean Dice, and more than the standard error of what it adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.components import boxes_of_labels, kept_components, label_components, postprocess
from crfrefine.parameters.object_rules import ObjectRule, rules_as_parameters
from crfrefine.parameters.sections import PostprocessParameters
from crfrefine.runs.execution.threads import Workers
from crfrefine.train.baselines import label_confusion, network_labels
from crfrefine.train.candidates import FitResult, is_gain
from crfrefine.train.crops import Crop
from crfrefine.train.material import Material
from crfrefine.train.model import Model, mean_dice

if TYPE_CHECKING:
    from numpy.typing import NDArray

MARGIN = 0.001
"""Smallest gain of mean Dice for which a rule is kept."""

MIN_CASES = 8
"""With fewer cases, all labels get the same rule, and fewer rules are tried."""

MAX_LABELS_APART = 30
"""With more labels, all get the same rule."""

MIN_ML = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
NUMS_KEPT = (3, 2, 1)
MIN_ML_OF_FEW = (0.1, 1.0)
NUMS_KEPT_OF_FEW = (1,)

Rules = tuple[ObjectRule, ...]


@dataclass(frozen=True)
class ChosenRules:
    """The rules for the network's labels, also after recalibration or smoothing, and those for the trained CRF's."""

    network: PostprocessParameters
    trained: PostprocessParameters


def choose_rules_for(fit: FitResult, cases: Sequence[int], material: Material, workers: Workers) -> ChosenRules:
    """Choose the rules for the network and for a trained CRF, on the cases that it was fitted to."""
    crops = [material.crops[case] for case in cases]
    network = choose_rules(crops, workers.run(lambda crop, threads: network_labels(crop), crops), material.regions, workers)
    if fit.is_network:
        return ChosenRules(network, network)
    model = Model(fit.parameters, (), material.sizes, material.device)
    maps = workers.run_on_device(model.label_map, crops)
    return ChosenRules(network, choose_rules(crops, maps, material.regions, workers))


def choose_rules(
    crops: Sequence[Crop], maps: Sequence[NDArray[Any]], regions: Sequence[tuple[int, ...]], workers: Workers
) -> PostprocessParameters:
    """Return the rules that are best for the label maps (*box) of some crops; no rules if none adds enough."""
    num_labels = crops[0].num_labels
    is_few = len(crops) < MIN_CASES
    sizes, numbers = (MIN_ML_OF_FEW, NUMS_KEPT_OF_FEW) if is_few else (MIN_ML, NUMS_KEPT)
    # The gentlest first: it is taken among equals.
    removals = [*(ObjectRule(min_ml=size) for size in sizes), *(ObjectRule(num_kept=number) for number in numbers)]
    are_alike = is_few or num_labels > MAX_LABELS_APART
    groups = [tuple(range(1, num_labels))] if are_alike else [(label,) for label in range(1, num_labels)]
    cases = list(zip(crops, maps, strict=True))

    def best(candidates: Sequence[Rules]) -> Rules:
        """Return the best of some rules, of which the first are those so far."""
        parameters = [rules_as_parameters(candidate) for candidate in candidates]
        return candidates[_best(workers.run(lambda case, threads: _scores(*case, parameters, regions), cases))]

    none = (ObjectRule(),) * num_labels
    rules = best([none, *((removal, *none[1:]) for removal in removals)])
    together = rules_as_parameters(rules)
    rules = _best_by_label(rules, groups, removals, workers.run(lambda case, threads: _effects(*case, together, removals), cases), regions)
    each = (rules[0], *(replace(rule, fills_holes=True) for rule in rules[1:]))
    foreground = (replace(rules[0], fills_holes=True), *rules[1:])
    return rules_as_parameters(best([rules, each, foreground]))


def _best_by_label(
    rules: Rules,
    groups: Sequence[tuple[int, ...]],
    removals: Sequence[ObjectRule],
    effects: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    regions: Sequence[tuple[int, ...]],
) -> Rules:
    """Return the rules with the best removal for each group of labels, one group after the other; `effects` are those of each case."""
    found = list(rules)
    confusions = [confusion for confusion, _ in effects]
    for group in groups:
        tried = [
            [confusion, *(_without(confusion, removed[:, number], group) for number in range(len(removals)))]
            for confusion, (_, removed) in zip(confusions, effects, strict=True)
        ]
        chosen = _best([[mean_dice(confusion, regions) for confusion in own] for own in tried])
        confusions = [own[chosen] for own in tried]
        if chosen:
            for label in group:
                found[label] = removals[chosen - 1]
    return tuple(found)


def _best(scores: Sequence[Sequence[float]]) -> int:
    """Return the best choice (a column of the scores of the cases), the first, which changes nothing, if no other adds enough."""
    table = np.array(scores, dtype=float)
    best, most = 0, MARGIN
    for number in range(1, table.shape[1]):
        gains = table[:, number] - table[:, 0]
        gains = gains[~np.isnan(gains)]
        if is_gain(gains) and float(gains.mean()) > most:
            best, most = number, float(gains.mean())
    return best


def _scores(
    crop: Crop, found: NDArray[Any], candidates: Sequence[PostprocessParameters], regions: Sequence[tuple[int, ...]]
) -> list[float]:
    """Return the mean Dice of a case with each of some rules."""
    voxel_ml = float(np.prod(crop.spacing)) / 1000.0
    return [mean_dice(label_confusion(crop, postprocess(found, candidate, voxel_ml)), regions) for candidate in candidates]


def _effects(
    crop: Crop, found: NDArray[Any], together: PostprocessParameters, removals: Sequence[ObjectRule]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the confusion (L, L) of a case, and (L, removals, L) what each removal takes from a label, by reference label.

    Labels do not depend on each other here, so that each is looked at once, however many rules are tried.
    """
    voxel_ml = float(np.prod(crop.spacing)) / 1000.0
    found = postprocess(found, together, voxel_ml)
    num_labels = crop.num_labels
    removed = np.zeros((num_labels, len(removals), num_labels), dtype=np.int64)
    for label, box in enumerate(boxes_of_labels(found), start=1):
        if box is None:
            continue
        components, count = label_components(found[box] == label)
        # Voxels without a reference have the label L.
        pairs = components.ravel().astype(np.int64) * (num_labels + 1) + crop.labels[box].ravel()
        table = np.bincount(pairs, minlength=(count + 1) * (num_labels + 1)).reshape(count + 1, num_labels + 1)
        for number, rule in enumerate(removals):
            is_removed = ~kept_components(components, table.sum(axis=1), rule, voxel_ml)
            removed[label, number] = table[is_removed, :num_labels].sum(axis=0)
    return label_confusion(crop, found), removed


def _without(confusion: NDArray[np.int64], removed: NDArray[np.int64], labels: Sequence[int]) -> NDArray[np.int64]:
    """Return the confusion after voxels of some labels, (L, L) by label and reference label, have become background."""
    result = confusion.copy()
    for label in labels:
        result[:, label] -= removed[label]
        result[:, 0] += removed[label]
    return result
