"""Scores of lesions: a row for each lesion, and the metrics of a case.

The definitions, and their sources, are in `docs/reference/metrics.md`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import chain, product
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from crfrefine.arrays.arguments import given_array
from crfrefine.arrays.label_maps import Box, box_around
from crfrefine.base.array_types import Array
from crfrefine.base.lesion_rules import LESION_RULES, LesionRules
from crfrefine.errors import ConfigError
from crfrefine.metrics.lesion_matching import (
    Components,
    boxes_by_label,
    components_of,
    find_components,
    find_pairs,
    group_by_dilation,
    merge_near,
    more_than_half,
)
from crfrefine.metrics.overlap import LabelMapPair, MaskPair, members_of, ratio

PENALTY_MM = 374.0  # HD95 of a missed or a false lesion: the diagonal of the grids of BraTS
_ROUNDING = 1e-6  # The volume of a voxel is a product of rounded numbers.


class Lesion(NamedTuple):
    """A lesion of the reference, or a false one of the label map."""

    region: str
    outcome: str  # "found", "missed", "small" (too small to count), or "false"
    # In the reference, from 1 for the largest; that of a false one is in the label map.
    number: int
    volume_ml: float
    center_mm: tuple[float, ...]  # along each axis, from the center of the grid's first voxel
    matched_to: tuple[int, ...] = ()  # numbers of the lesions of the label map that match it
    dice: float = 0.0  # with all of these
    hd95_mm: float = PENALTY_MM  # with all of these


def lesions(
    label_map: ArrayLike,
    reference: ArrayLike,
    spacing: ArrayLike,
    *,
    rules: LesionRules | str = "isles",
    regions: Mapping[str, Iterable[int]] | None = None,
    ignore_label: int | None = None,
) -> list[Lesion]:
    """Return a row for each lesion of the reference, and for each false one of the label map.

    `pandas.DataFrame(rows)` is a table of them.

    Args:
        label_map: (*grid) integers.
        reference: (*grid) integers.
        spacing: mm, one per grid axis or one for all.
        rules: those of matching, or the name of a challenge's, which are in LESION_RULES.
        regions: the labels of each named region; None means each label from 1 up by itself.
        ignore_label: voxels where the reference has this value count as background in both maps.

    Raises:
        GridMismatchError: the maps differ in shape.
        InputError: a map does not hold integers, or the spacing is not a positive number per axis.
        ConfigError: an unknown name of rules, or a region without proper labels.
    """
    if regions is None:
        found = set[int]()
        for labels in (label_map, reference):
            found.update(np.unique(given_array(labels, "a label map")).tolist())
        found -= {ignore_label}
        # Of masks of bools, True is label 1.
        regions = {str(int(label)): (int(label),) for label in sorted(found) if label > 0}
    results = measure_lesions(label_map, reference, regions, spacing, rules, ignore_label)
    rows = []
    for result in results.values():
        rows += result.lesions
    return rows


def measure_lesions(
    label_map: ArrayLike,
    reference: ArrayLike,
    regions: Mapping[str, Iterable[int]],
    spacing: ArrayLike,
    rules: LesionRules | str,
    ignore_label: int | None = None,
) -> dict[str, LesionSums]:
    """Return what `LesionSums` says of each region; arguments and errors are as in `lesions`."""
    if isinstance(rules, str):
        rules = LESION_RULES.get(rules, rules)
    if not isinstance(rules, LesionRules):
        raise ConfigError(f"lesions: expected {', '.join(LESION_RULES)}, got {rules!r}")
    maps = LabelMapPair(label_map, reference, spacing, ignore_label)
    sums = {name: LesionSums(name, maps, rules) for name in regions}
    # Lesions in different boxes do not meet, even when both are dilated.
    for name, labels, box in _boxes_of_regions(maps, regions, 2 * rules.dilation):
        sums[name].add(labels, box)
    return sums


def components_apart(
    label_map: ArrayLike,
    other: ArrayLike,
    regions: Mapping[str, Iterable[int]],
    spacing: ArrayLike,
    connectivity: int,
) -> list[Lesion]:
    """Return the components of each region in a (*grid) map without a voxel of it in the other one.

    They are those of either map, each as a "false" lesion.
    """
    maps = LabelMapPair(label_map, other, spacing, None)
    apart = []
    for name, labels, box in _boxes_of_regions(maps, regions, 0):
        first, second = (find_components(mask, connectivity) for mask in maps.masks_in(box, labels))
        pairs = find_pairs(first.numbers, second.numbers)
        for components, touching in ((first, pairs.reference), (second, pairs.predicted)):
            for number in components.others(touching):
                apart.append(_unmatched(maps, name, "false", number, components, box))
    return apart


def _boxes_of_regions(
    maps: LabelMapPair, regions: Mapping[str, Iterable[int]], gap: int
) -> Iterator[tuple[str, Array, Box]]:
    """Yield each region and its labels with boxes that together contain its voxels in both maps.

    More than `gap` voxels are between two of its boxes.
    """
    members = {name: members_of(name, labels) for name, labels in regions.items()}
    all_labels = set(chain(*(labels.tolist() for labels in members.values())))
    boxes = [boxes_by_label(labels, all_labels) for labels in (maps.prediction, maps.reference)]
    for name, labels in members.items():
        boxes_of_region = []
        for boxes_of_map, label in product(boxes, labels.tolist()):
            boxes_of_region += boxes_of_map[label]
        for box in merge_near(boxes_of_region, gap):
            yield name, labels, box


class LesionSums:
    """The lesions of a region, added box by box; those in different boxes do not meet."""

    def __init__(self, region: str, maps: LabelMapPair, rules: LesionRules) -> None:
        self.region = region
        self.maps = maps
        self.rules = rules
        self._wanted: list[Lesion] = []  # those of the reference
        self._false: list[Lesion] = []
        # All components, of any size:
        self._num_predicted = 0
        self._num_reference = 0
        self._ious: list[float] = []  # of the pairs whose intersection is more than half the union
        self._volume_difference = 0  # voxels of the prediction, less those of the reference
        self._false_positive = 0  # voxels of predicted components that touch no reference
        self._false_negative = 0  # voxels of reference components that no prediction touches

    def add(self, labels: Array, box: Box) -> None:
        """Match the lesions in a box; `labels` are those of the region."""
        maps = self.maps
        rules = self.rules
        prediction, reference = maps.masks_in(box, labels)
        predicted = find_components(prediction, rules.connectivity)
        wanted = find_components(reference, rules.connectivity)
        del prediction, reference  # Their numbers say the same, and take the memory.
        overlaps = find_pairs(wanted.numbers, predicted.numbers)
        halves = more_than_half(overlaps, wanted.sizes, predicted.sizes)
        unions = wanted.sizes[halves.reference] + predicted.sizes[halves.predicted] - halves.voxels
        first = self._num_predicted  # The numbers of predicted lesions continue those so far.
        self._num_predicted += len(predicted.boxes)
        self._num_reference += len(wanted.boxes)
        self._ious += (halves.voxels / unions).tolist()
        self._volume_difference += int(predicted.sizes.sum() - wanted.sizes.sum())
        self._false_positive += int(np.delete(predicted.sizes, overlaps.predicted).sum())
        self._false_negative += int(np.delete(wanted.sizes, overlaps.reference).sum())

        matches = overlaps
        if rules.dilation:
            wide = group_by_dilation(wanted.numbers > 0, rules)
            matches = find_pairs(wide, predicted.numbers)
            wanted = components_of(wide * (wanted.numbers > 0))
            overlaps = find_pairs(wanted.numbers, predicted.numbers)
        if rules.match == "iou":
            matches = more_than_half(overlaps, wanted.sizes, predicted.sizes)

        for number, wanted_box in enumerate(wanted.boxes, start=1):
            lesion = _unmatched(maps, self.region, "missed", number, wanted, box)
            matching = matches.predicted_with(number)
            if matching.size:
                boxes = [predicted.boxes[match - 1] for match in matching]
                around = box_around([wanted_box, *boxes])
                pair = MaskPair(
                    predicted.mask_of(matching, around),
                    wanted.mask_of((number,), around),
                    maps.spacing,
                )
                lesion = lesion._replace(
                    outcome="found",
                    matched_to=tuple((first + matching).tolist()),
                    dice=pair.dice(),
                    hd95_mm=pair.hd95_mm(),
                )
            if 1000.0 * lesion.volume_ml <= rules.min_volume_mm3 * (1.0 + _ROUNDING):
                lesion = lesion._replace(outcome="small")
            self._wanted.append(lesion)
        for number in predicted.others(matches.predicted):
            lesion = _unmatched(maps, self.region, "false", number, predicted, box)
            self._false.append(lesion._replace(number=first + number))

    @cached_property
    def lesions(self) -> list[Lesion]:
        """The lesions of the reference, then the false ones."""
        # These numbers do not depend on the label map, so that several can be compared.
        wanted = sorted(self._wanted, key=lambda lesion: (-lesion.volume_ml, lesion.center_mm))
        numbered = enumerate(wanted, start=1)
        return [*(lesion._replace(number=number) for number, lesion in numbered), *self._false]

    @cached_property
    def values(self) -> dict[str, float]:
        """The value of each of LESION_METRICS; NaN where undefined."""
        outcomes = Counter(lesion.outcome for lesion in self.lesions)
        found = outcomes["found"]
        missed = outcomes["missed"]
        false = outcomes["false"]
        ratios = detection_ratios(found, missed, false)
        dice = 1.0
        hd95_mm = 0.0
        measured = [lesion for lesion in self.lesions if lesion.outcome != "small"]
        if not measured:
            ratios["lesion_f1"] = 1.0
        else:
            dice = math.fsum(lesion.dice for lesion in measured) / len(measured)
            hd95_mm = math.fsum(lesion.hd95_mm for lesion in measured) / len(measured)

        ious = self._ious
        num_components = self._num_predicted + self._num_reference
        panoptic_quality = ratio(2 * math.fsum(ious), num_components)
        segmentation_quality = panoptic_quality  # 0 without a match, NaN without components
        if ious:
            segmentation_quality = math.fsum(ious) / len(ious)
        voxel_ml = self.maps.voxel_volume / 1000.0
        return {
            "lesions": float(found + missed),
            "lesions_found": float(found),
            "lesions_missed": float(missed),
            "lesions_false": float(false),
            **ratios,
            "lesion_dice": dice,
            "lesion_hd95_mm": hd95_mm,
            "rq": ratio(2 * len(ious), num_components),
            "sq": segmentation_quality,
            "pq": panoptic_quality,
            "false_positive_ml": self._false_positive * voxel_ml,
            "false_negative_ml": self._false_negative * voxel_ml,
            "absolute_volume_difference_ml": abs(self._volume_difference) * voxel_ml,
            "lesion_count_difference": float(abs(self._num_predicted - self._num_reference)),
        }


def _unmatched(
    maps: LabelMapPair, region: str, outcome: str, number: int, components: Components, part: Box
) -> Lesion:
    """Return the lesion of a component in a part of the grid, as one without a match."""
    box = components.boxes[number - 1]
    mask = components.mask_of((number,), box)
    size = int(components.sizes[number])
    center = [0.0] * maps.num_axes
    for index, axis in enumerate(maps.axes):
        planes = np.moveaxis(mask, index, 0).reshape(mask.shape[index], -1)
        first = part[index].start + box[index].start
        total = planes.sum(axis=1) @ np.arange(first, first + len(planes))
        center[axis] = float(total) / size * maps.spacing[index]
    return Lesion(region, outcome, number, size * maps.voxel_volume / 1000.0, tuple(center))


def detection_ratios(found: int, missed: int, false: int) -> dict[str, float]:
    """Return sensitivity, precision and F1 of numbers of lesions; NaN where undefined."""
    return {
        "lesion_sensitivity": ratio(found, found + missed),
        "lesion_precision": ratio(found, found + false),
        "lesion_f1": ratio(2 * found, 2 * found + missed + false),
    }
