"""Connected components (26 neighbors in 3-D), the small-object rules (`[postprocess]`), what these took away."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.label_maps import bounding_box
from crfrefine.base.array_types import Array, Bool, Labels
from crfrefine.base.text import counted, listed, shorten_value
from crfrefine.errors import ConfigError
from crfrefine.parameters.sections import PostprocessParameters


@dataclass(frozen=True)
class Cleaned:
    """A label map after the small-object rules."""

    label_map: Labels  # (*grid), of the type and memory order of the one passed in
    voxels_removed: int = 0  # voxels of components that became background
    # voxels of holes that got a label, including voxels that had just been removed
    voxels_filled: int = 0
    # Voxels of each label before the rules, and how many of these voxels still have it, for labels
    # that lost voxels.
    lost: Mapping[int, tuple[int, int]] = field(default_factory=dict)


def clean(label_map: Labels, parameters: PostprocessParameters, voxel_volume_ml: float) -> Cleaned:
    """Apply the rules for small objects to an integer label map, (*grid), and return the result."""
    # Components of all foreground together, then of each label, below a volume become background;
    # then holes are filled.
    if parameters == PostprocessParameters():
        return Cleaned(label_map)
    num_labels = max(
        [int(label_map.max(initial=0)) + 1, *map(len, parameters.label_lists.values())]
    )
    parameters.spread({"label": num_labels})  # checks the lengths
    # The first rule is that of all foreground labels together.
    keeps = _by_label(parameters.keep_largest, num_labels)
    fills = _by_label(parameters.fill_holes, num_labels)
    sizes = parameters.min_component_ml
    if not isinstance(sizes, tuple):
        if any(keeps[1:]):
            sizes = (0.0, *(sizes,) * (num_labels - 1))
        else:
            sizes = (sizes, *(0.0,) * (num_labels - 1))
    removes = {label for label in range(num_labels) if keeps[label] or sizes[label] > 0.0}
    if not removes and not any(fills):
        return Cleaned(label_map)
    result = label_map.copy(order="K")
    removed = filled = 0
    if 0 in removes and (box := bounding_box(result != 0)) is not None:
        removed += _remove(result[box], result[box] != 0, keeps[0], sizes[0] / voxel_volume_ml)
    if removes - {0}:
        from scipy import ndimage

        for label, box in enumerate(ndimage.find_objects(result), start=1):
            if label in removes and box is not None:
                removed += _remove(
                    result[box], result[box] == label, keeps[label], sizes[label] / voxel_volume_ml
                )
    if any(fills):
        filled = fill_holes(
            result, [label for label in range(1, num_labels) if fills[label]], any_hole=fills[0]
        )
    lost = {}
    for label, fewer in enumerate(
        np.bincount(label_map[label_map != result]).tolist() if removed else ()
    ):
        if label and fewer:
            total = int(np.count_nonzero(label_map == label))
            lost[label] = total, total - fewer
    return Cleaned(result, removed, filled, lost)


def _by_label(words: str | tuple[str, ...], num_labels: int) -> tuple[bool, ...]:
    """Return whether the rule is on, for all foreground labels together and for each label from 1 on."""
    if isinstance(words, str):
        return (words == "foreground", *(words == "each",) * (num_labels - 1))
    return tuple(word != "none" for word in words)


def label_components(mask: Bool) -> tuple[NDArray[np.int32], int]:
    """Return each voxel's component number, 0 outside all components, and the number of components."""
    from scipy import ndimage

    components, count = ndimage.label(mask, structure=np.ones((3,) * mask.ndim, dtype=bool))
    return components, int(count)


def largest_component(mask: Bool) -> Bool:
    """Return the largest component of a mask; of equally large ones the first in C order."""
    largest = np.zeros(mask.shape, dtype=bool)
    box = bounding_box(mask)
    if box is not None:
        components, _ = label_components(mask[box])
        largest[box] = components == 1 + np.bincount(components.ravel())[1:].argmax()
    return largest


def _remove(part: Array, group: Bool, keeps_largest: bool, min_voxels: float) -> int:
    """Set the unwanted components of `group` to 0 in `part`, in place.

    Return the number of their voxels.
    """
    components, count = label_components(group)
    sizes = np.bincount(components.ravel(), minlength=count + 1)
    # A component of exactly the smallest size stays, whatever the rounding of the division by the
    # voxel's volume.
    keep = sizes >= min_voxels * (1.0 - 1e-9)
    if keeps_largest and count:
        # Components are numbered by their first voxel in C order, so the first of equally large
        # ones is taken.
        keep &= np.arange(len(sizes)) == 1 + int(sizes[1:].argmax())
    keep[0] = True  # Number 0 is not a component.
    if not keep.all():
        part[~keep[components]] = 0
    return int(sizes[~keep].sum())


def fill_holes(label_map: Array, labels: Collection[int], *, any_hole: bool = False) -> int:
    """Fill holes of (*grid) labels in place, and return the number of voxels filled."""
    # A hole is a region of background, connected over faces, that touches no border of axes of
    # several voxels. It gets the label that it touches with the most faces, the lowest of a tie.
    # Unless `any_hole`, it must touch a single label, which is in `labels`.
    from scipy import ndimage

    box = bounding_box(label_map != 0)
    axes = [axis for axis, extent in enumerate(label_map.shape) if extent > 1]
    if box is None or not axes:
        return 0
    part = label_map[box]
    regions, count = ndimage.label(part == 0)
    is_hole = np.arange(int(count) + 1) > 0
    for axis in axes:
        # A region that reaches the end of the box is at the grid's border, or continues outside the
        # box, where all is background.
        for end in (0, -1):
            is_hole[regions.take(end, axis=axis)] = False
    voxels = np.flatnonzero(is_hole[regions])
    if not voxels.size:
        return 0
    flat = part.ravel()
    base = int(part.max()) + 1
    numbers = regions.ravel()[voxels].astype(np.int64)
    faces = []  # the hole times base plus the label, of each face between a hole and a label
    for axis in axes:
        stride = int(np.prod(part.shape[axis + 1 :], dtype=np.int64))
        for step in (-stride, stride):
            touched = flat[voxels + step]
            faces.append(numbers[touched != 0] * base + touched[touched != 0])
    pairs, num_faces = np.unique(np.concatenate(faces), return_counts=True)
    hole, label = np.divmod(pairs, base)
    order = np.lexsort((label, -num_faces, hole))
    holes, first = np.unique(hole[order], return_index=True)
    best = label[order][first]
    if any_hole:
        is_filled = np.full(best.shape, True)
    else:
        is_filled = (np.bincount(hole)[holes] == 1) & np.isin(best, list(labels))
    filling = np.zeros(len(is_hole), part.dtype)
    filling[holes[is_filled]] = best[is_filled]
    values = filling[numbers]
    part[np.unravel_index(voxels[values != 0], part.shape)] = values[values != 0]
    return int(np.count_nonzero(values))


MAX_LOSS = 0.1  # share of a structure's voxels that rules may remove without permission
REMOVED = "structures that rules of [postprocess] removed"  # begins the note on them
_MAX_NAMED = 50


def describe_losses(
    lost: Mapping[int, tuple[int, int]],
    rules: PostprocessParameters,
    names: Mapping[int, str],
    voxel_ml: float | None,
    *,
    allowed: bool,
) -> tuple[str, ...]:
    """Return a note on the structures that lost more than MAX_LOSS of their voxels to rules.

    Raise ConfigError if that is not allowed.
    """
    # `lost` is that of `Cleaned`; `voxel_ml` is None on grids that do not have three axes.
    texts = []
    for label, (before, after) in sorted(lost.items()):
        if before - after > MAX_LOSS * before:
            if voxel_ml is None:
                volumes = ""
            else:
                volumes = f" ({before * voxel_ml:.3g} → {after * voxel_ml:.3g} ml)"
            texts.append(
                f"{names.get(label, f'label {label}')} {before:,} → {after:,} voxels{volumes}"
            )
    if not texts:
        return ()
    rule = " and ".join(f"{key} = {shorten_value(value)}" for key, value in rules.removing.items())
    structures = listed(texts, _MAX_NAMED)
    if allowed:
        return (f"{REMOVED}, in whole or by more than {MAX_LOSS:.0%}, by {rule}: {structures}",)
    off = " and ".join(
        f"{key} = {'0' if key.endswith('_ml') else 'none'}" for key in rules.removing
    )
    raise ConfigError(
        f"{rule} would remove more than {MAX_LOSS:.0%} of {counted(len(texts), 'structure')}: {structures}\n"
        f"  Switch it off ({off}), or allow it: --allow-vanishing, in Python allow_vanishing=True."
    )
