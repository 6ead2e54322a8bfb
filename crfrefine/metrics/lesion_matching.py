"""Lesions of a mask and of its reference, and which of them match.

The definitions, and their sources, are in `docs/reference/metrics.md`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from crfrefine.arrays.components import label_components
from crfrefine.arrays.label_maps import Box, relative
from crfrefine.base.array_types import Array, Bool, Integers, Labels
from crfrefine.base.lesion_rules import AXES_OF_STEP, LesionRules

_BLOCK = 32  # voxels along each side of the blocks in which maps are searched for labels
_MAX_BOXES = 3000  # each pair of them is compared


def boxes_by_label(label_map: Array, labels: Iterable[int]) -> dict[int, list[Integers]]:
    """Return boxes that together contain all voxels of each label, from 1 up, in a (*grid) map.

    Each is (2, axes): its first voxel, and the end behind its last one.
    """
    from scipy import ndimage

    boxes: dict[int, list[Integers]] = {label: [] for label in labels}
    for corner in product(*(range(0, size, _BLOCK) for size in label_map.shape)):
        block = tuple(slice(start, start + _BLOCK) for start in corner)
        last = min(max(boxes, default=0), int(label_map[block].max()))
        found = ndimage.find_objects(label_map[block], last) if last > 0 else []
        for label, boxes_of_label in boxes.items():
            box = found[label - 1] if label <= last else None
            if box is not None:
                ends = np.array([[side.start, side.stop] for side in box], np.int64)
                boxes_of_label.append(ends.T + np.array(corner))
    return boxes


def merge_near(boxes: Sequence[Integers], gap: int) -> list[Box]:
    """Join boxes, (2, axes), with at most so many voxels between them, until none are left.

    Of very many boxes, others in one part of the grid are joined, too.
    """
    if not boxes:
        return []
    starts, stops = np.stack(boxes, axis=1)
    side = _BLOCK
    while True:
        if len(starts) > _MAX_BOXES:
            _, firsts, group = np.unique(
                starts // side, axis=0, return_index=True, return_inverse=True
            )
            side *= 2
        else:
            is_near = (starts[:, None] <= stops + gap).all(axis=2)
            first_near = (is_near & is_near.T).argmax(axis=1)
            firsts, group = np.unique(first_near, return_inverse=True)
            if len(firsts) == len(starts):
                break
        joined_starts = starts[firsts]
        joined_stops = stops[firsts]
        np.minimum.at(joined_starts, group.reshape(-1), starts)
        np.maximum.at(joined_stops, group.reshape(-1), stops)
        starts = joined_starts
        stops = joined_stops
    merged = []
    for ends in zip(starts.tolist(), stops.tolist(), strict=True):
        merged.append(tuple(slice(start, stop) for start, stop in zip(*ends, strict=True)))
    return merged


class Components(NamedTuple):
    """The connected components of a mask, numbered from 1."""

    numbers: Labels  # (*grid), 0 outside
    sizes: Integers  # (components + 1,) voxels of each number, 0 for number 0
    boxes: list[Box]  # of each number from 1

    def others(self, members: Integers) -> list[int]:
        """Return the numbers of the components that are not among some."""
        return np.setdiff1d(np.arange(1, len(self.sizes)), members).tolist()

    def mask_of(self, members: Iterable[int], box: Box) -> Bool:
        """Return the mask of some of the components, in a box around them."""
        mask = np.zeros([side.stop - side.start for side in box], bool)
        for member in members:
            around = self.boxes[member - 1]
            mask[relative(around, box)] |= self.numbers[around] == member
        return mask


def find_components(mask: Bool, connectivity: int) -> Components:
    """Return the components of a mask, (*grid)."""
    components, count = label_components(mask, AXES_OF_STEP[connectivity])
    return components_of(components.astype(np.min_scalar_type(count), copy=False))


def components_of(numbers: Labels) -> Components:
    """Return components from the number of each voxel, (*grid), 0 outside."""
    from scipy import ndimage

    boxes = ndimage.find_objects(numbers)
    sizes = np.bincount(numbers[numbers > 0], minlength=len(boxes) + 1)
    return Components(numbers, sizes, boxes)


class Pairs(NamedTuple):
    """Pairs of a reference lesion and a predicted one with common voxels, in ascending order."""

    reference: Integers  # (pairs,) numbers
    predicted: Integers  # (pairs,) numbers
    voxels: Integers  # (pairs,) common voxels

    def predicted_with(self, number: int) -> Integers:
        """Return the predicted lesions that are in pairs with a reference lesion."""
        first, last = np.searchsorted(self.reference, (number, number + 1))
        return self.predicted[first:last]


def find_pairs(reference: Labels, predicted: Labels) -> Pairs:
    """Return the pairs of numbers, from 1, that two (*grid) arrays have at the same voxels."""
    both = (reference > 0) & (predicted > 0)
    base = int(predicted.max(initial=0)) + 1
    keys = reference[both].astype(np.int64)
    keys *= base
    keys += predicted[both]
    found, counts = np.unique(keys, return_counts=True)
    return Pairs(*np.divmod(found, base), counts)


# What may become of components, as a run's record has it.
COMPONENT_CHANGES = ("vanished", "made", "merged", "split")


class ComponentChanges(NamedTuple):
    """The components of a label that differ between two label maps."""

    # Of COMPONENT_CHANGES: components of the first map without a voxel of the label in the second;
    # those of the second without one in the first; those of the second with voxels of several of
    # the first; those of the first with voxels of several of the second.
    counts: tuple[int, ...]
    largest_vanished: int  # voxels; 0 if none vanished


def component_changes(
    before: Labels, after: Labels, labels: Iterable[int]
) -> dict[int, ComponentChanges]:
    """Return the changes of the components of labels that occur, from 1 up, in (*grid) label maps.

    Neighbors over faces, edges and corners are connected.
    """
    boxes_before = boxes_by_label(before, labels)
    boxes_after = boxes_by_label(after, labels)
    changes = {}
    for label, boxes in boxes_before.items():
        counts = np.zeros(len(COMPONENT_CHANGES), np.int64)
        largest = 0
        for box in merge_near([*boxes, *boxes_after[label]], 0):
            old = find_components(before[box] == label, 26)
            new = find_components(after[box] == label, 26)
            pairs = find_pairs(old.numbers, new.numbers)
            new_of_old = np.bincount(pairs.reference, minlength=len(old.sizes))[1:]
            old_of_new = np.bincount(pairs.predicted, minlength=len(new.sizes))[1:]
            has_vanished = new_of_old == 0
            largest = max(largest, int(old.sizes[1:][has_vanished].max(initial=0)))
            kinds = (has_vanished, old_of_new == 0, old_of_new > 1, new_of_old > 1)
            counts += [np.count_nonzero(kind) for kind in kinds]
        changes[label] = ComponentChanges(tuple(counts.tolist()), largest)
    return changes


def changes_text(counts: Iterable[Sequence[int]]) -> str:
    """Return the sums of numbers of components, each of COMPONENT_CHANGES, as text."""
    parts = []
    for change, numbers in zip(COMPONENT_CHANGES, zip(*counts, strict=True), strict=True):
        parts.append(f"{sum(numbers)} {change}")
    return f"components: {', '.join(parts)}"


def more_than_half(pairs: Pairs, reference_sizes: Integers, predicted_sizes: Integers) -> Pairs:
    """Return the pairs whose common voxels are more than half of their union.

    Each lesion is in at most one of them.
    """
    union = reference_sizes[pairs.reference] + predicted_sizes[pairs.predicted] - pairs.voxels
    chosen = 2 * pairs.voxels > union
    return Pairs(*(column[chosen] for column in pairs))


def group_by_dilation(reference: Bool, rules: LesionRules) -> Labels:
    """Return the number of the lesion of each voxel of a dilated reference, (*grid), 0 outside.

    Components that meet are one lesion. A step of the dilation goes along at most two axes.
    """
    from scipy import ndimage

    step = ndimage.generate_binary_structure(reference.ndim, 2)
    wide = ndimage.binary_dilation(reference, step, rules.dilation)
    numbers, count = label_components(wide, AXES_OF_STEP[rules.connectivity])
    return numbers.astype(np.min_scalar_type(count), copy=False)
