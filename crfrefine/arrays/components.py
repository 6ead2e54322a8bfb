"""Connected components (26 neighbors in 3-D), the small-object rules (`[postprocess]`), their note.

The note names the structures that the rules removed entirely or mostly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.label_maps import Box, box_around
from crfrefine.base.array_types import Array, Bool, Float64, Labels
from crfrefine.base.geometry import voxel_ml
from crfrefine.base.notes import NoteKind, Notes
from crfrefine.base.text import counted, listed, shorten_value
from crfrefine.errors import ConfigError
from crfrefine.parameters.sections import PostprocessParameters


@dataclass(frozen=True)
class Cleaned:
    """A label map after the small-object rules."""

    label_map: Labels  # (*grid), of the type and memory order of the one passed in
    voxels_removed: int = 0  # voxels of components that became background
    voxels_filled: int = 0  # voxels of holes that got a label; some may just have been removed
    # For each label that lost voxels: their number before the rules, and how many of these voxels
    # still have the label.
    lost: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    def after(self, first: Cleaned) -> Cleaned:
        """Return this map, with what was lost and gained since before the rules were applied first.

        In between the voxels of a label may have changed.
        """
        lost = dict(self.lost)
        for label, (total, left) in first.lost.items():
            before, after = lost.get(label, (left, left))
            lost_later = before - after
            lost[label] = (total, max(0, left - lost_later))
        return Cleaned(
            self.label_map,
            self.voxels_removed + first.voxels_removed,
            self.voxels_filled + first.voxels_filled,
            lost,
        )


def clean(
    label_map: Labels, parameters: PostprocessParameters, spacing: Sequence[float]
) -> Cleaned:
    """Apply the rules for small objects to an integer label map, (*grid), and return the result.

    The spacing is mm between voxels, one per axis.
    The rules for all foreground together come first, then those for each label. Holes are filled
    afterwards. Raises ConfigError if a list of values has another number of labels.
    """
    lengths = [len(values) for values in parameters.label_lists.values()]
    num_labels = max([int(label_map.max(initial=0)) + 1, *lengths])
    rules = parameters.spread({"label": num_labels})
    # Entry 0 of these is about all foreground labels together.
    keeps_largest = _by_label(rules["keep_largest"])
    fills_holes = _by_label(rules["fill_holes"])
    min_voxels: Float64 = np.array(rules["min_component_ml"]) / voxel_ml(spacing)
    # A single size is about the components that keep_largest is about.
    if not isinstance(parameters.min_component_ml, tuple):
        if keeps_largest[1:].any():
            min_voxels[0] = 0.0
        else:
            min_voxels[1:] = 0.0
    if not (keeps_largest.any() or min_voxels.any() or fills_holes.any()):
        return Cleaned(label_map)

    from scipy import ndimage

    boxes = ndimage.find_objects(label_map)
    occurring = [box for box in boxes if box is not None]
    if not occurring:
        return Cleaned(label_map)
    foreground = box_around(occurring)
    result = label_map.copy(order="K")
    removed = _remove_components(result, [foreground, *boxes], keeps_largest, min_voxels)
    filled = 0
    if fills_holes.any():
        filled = fill_holes(result, foreground, fills_holes)
    lost = {}
    if removed:
        losses = np.bincount(label_map[label_map != result])
        losses[0:1] = 0  # Background that became a label is no loss.
        for label in np.flatnonzero(losses).tolist():
            total = int(np.count_nonzero(label_map == label))
            lost[label] = (total, total - int(losses[label]))
    return Cleaned(result, removed, filled, lost)


def _by_label(words: Sequence[str]) -> Bool:
    """Return whether the rule is on for all foreground together, and for each label from 1 on."""
    is_on: Bool = np.array(words) == "each"
    is_on[0] = words[0] == "foreground"
    return is_on


def _remove_components(
    label_map: Labels, boxes: Sequence[Box | None], keeps_largest: Bool, min_voxels: Float64
) -> int:
    """Remove components in place, and return the number of their voxels.

    Those are all but the largest one of a label, where only that is kept, and those of less than
    the smallest number of voxels. Entry 0 is about all foreground labels together. The boxes hold
    these and each label from 1 on; None means that a label does not occur.
    """
    removed = 0
    for label, box in enumerate(boxes):
        has_rule = keeps_largest[label] or min_voxels[label] > 0.0
        if box is None or not has_rule:
            continue
        part = label_map[box]
        components, count = label_components(part == label if label else part != 0)
        sizes = np.bincount(components.ravel(), minlength=count + 1)
        # A component of exactly the smallest size stays, however spacing and division were rounded.
        keep = sizes >= min_voxels[label] * (1.0 - 1e-6)
        if keeps_largest[label] and count:
            # Components are numbered by their first voxel in C order of the axes, whatever the
            # order in memory: of equally large ones the first counts.
            keep &= np.arange(len(sizes)) == 1 + sizes[1:].argmax()
        keep[0] = True  # Number 0 is not a component.
        if not keep.all():
            part[~keep[components]] = 0
            removed += int(sizes[~keep].sum())
    return removed


def label_components(mask: Bool, axes_of_step: int | None = None) -> tuple[NDArray[np.int32], int]:
    """Return each voxel's component number, 0 outside, and the number of components.

    Neighbors are one voxel apart along at most so many axes: 1 are those over faces. None means
    all axes.
    """
    from scipy import ndimage

    neighbors = ndimage.generate_binary_structure(mask.ndim, axes_of_step or mask.ndim)
    components, count = ndimage.label(mask, structure=neighbors)
    return components, int(count)


def largest_component(mask: Bool) -> Bool:
    """Return the largest component of a mask; of equally large ones the first in C order."""
    from scipy import ndimage

    largest = mask.astype(np.uint8)
    _remove_components(largest, ndimage.find_objects(largest), np.array([True]), np.zeros(1))
    return largest.view(np.bool_)


def fill_holes(label_map: Array, box: Box, fills: Bool) -> int:
    """Fill holes of (*grid) labels in place, and return the number of voxels filled.

    A hole is a region of background, connected over faces, that touches no border of the grid; axes
    of one voxel do not count. It gets the label that it shares most faces with, the lowest of a
    tie.

    Args:
        label_map: (*grid) labels.
        box: a part of the grid that holds all labels above 0.
        fills: (L,), True for labels of which a hole is filled that touches no other one; if the
            entry 0 is True, every hole is filled, whatever labels it touches.
    """
    axes = [axis for axis, extent in enumerate(label_map.shape) if extent > 1]
    if not axes:
        return 0
    from scipy import ndimage

    part = label_map[box]
    regions, count = ndimage.label(part == 0)
    is_hole = np.arange(count + 1) > 0
    for axis in axes:
        # A region that reaches the end of the box is at the grid's border, or continues outside the
        # box, where all is background.
        for end in (0, -1):
            is_hole[regions.take(end, axis=axis)] = False
    voxels = np.flatnonzero(is_hole[regions])
    if not voxels.size:
        return 0
    hole_numbers = regions.ravel()[voxels].astype(np.int64)

    # The faces that holes share with labels, each as hole * base + label.
    flat = part.ravel()
    base = int(part.max()) + 1
    faces = []
    for axis in axes:
        stride = math.prod(part.shape[axis + 1 :])
        for step in (-stride, stride):
            touched = flat[voxels + step]
            is_face = touched != 0
            faces.append(hole_numbers[is_face] * base + touched[is_face])
    pairs, num_faces = np.unique(np.concatenate(faces), return_counts=True)
    hole, label = np.divmod(pairs, base)
    # Within a hole the label with most faces comes first, of equal ones the lowest.
    label = label[np.lexsort((label, -num_faces, hole))]
    holes, first, num_labels = np.unique(hole, return_index=True, return_counts=True)
    main_labels = label[first]
    if not fills[0]:
        main_labels[(num_labels > 1) | ~fills[main_labels]] = 0
    label_of_hole = np.zeros(count + 1, part.dtype)
    label_of_hole[holes] = main_labels
    values = label_of_hole[hole_numbers]
    is_filled = values != 0
    part[np.unravel_index(voxels[is_filled], part.shape)] = values[is_filled]
    return int(np.count_nonzero(is_filled))


MAX_LOSS = 0.1  # share of a structure's voxels that rules may remove without permission
_MAX_NAMED = 50


def check_losses(
    lost: Mapping[int, tuple[int, int]],
    rules: PostprocessParameters,
    names: Mapping[int, str],
    spacing: Sequence[float],
    *,
    allowed: bool,
) -> Notes:
    """Return a note on the structures that lost more than MAX_LOSS of their voxels to rules.

    Args:
        lost: that of `Cleaned`.
        rules: the rules that removed them.
        names: names of labels; others are called by their number.
        spacing: mm between voxels, one per axis; volumes are those on grids of three axes.
        allowed: whether rules may remove so much.

    Raises:
        ConfigError: rules removed so much, and that is not allowed.
    """
    texts = []
    for label, (before, after) in sorted(lost.items()):
        if before - after > MAX_LOSS * before:
            name = names.get(label, f"label {label}")
            volumes = ""
            if len(spacing) == 3:
                size_ml = voxel_ml(spacing)
                volumes = f" ({before * size_ml:.3g} → {after * size_ml:.3g} ml)"
            texts.append(f"{name} {before:,} → {after:,} voxels{volumes}")
    if not texts:
        return ()

    settings = []
    switches = []
    for key, value in rules.removing.items():
        settings.append(f"{key} = {shorten_value(value)}")
        value_when_off = "0" if key.endswith("_ml") else "none"
        switches.append(f"{key} = {value_when_off}")
    rule = " and ".join(settings)
    if allowed:
        return (NoteKind.REMOVED_BY_RULES(share=MAX_LOSS, rule=rule, structures=texts),)
    switched_off = " and ".join(switches)
    count = counted(len(texts), "structure")
    raise ConfigError(
        f"{rule} would remove more than {MAX_LOSS:.0%} of {count}: "
        f"{listed(texts, _MAX_NAMED)}\n"
        f"  Switch it off ({switched_off}), or allow it: --allow-vanishing, in Python "
        "allow_vanishing=True."
    )
