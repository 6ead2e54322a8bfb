"""Padding: ties, voxels where all labels are equal, about which a network said nothing.

Ties of labels have exactly the same logit, those of regions log-odds of 0. Undoing a crop pads
logits with a constant. To the CRF such voxels look undecided, and their neighbors' labels would
spread over them; they are left out, other ties take part.

A network's output has such voxels where it said nothing: around the field of view that a crop left,
or where a sliding window did not look. Votes that are split, and scores in half precision that
happen to meet, look the same voxel by voxel, but are results. Their shape tells them apart.

The complement of a convex field of view, cut out of a grid, is a union of half-spaces. Each of them
holds a corner of the grid, and is a union of blocks that may reach beyond the grid. So the part
that the network did not see is thick everywhere, and each piece of it holds a corner.
Ties lie between labels, as sheets a voxel or two thick, or where votes on a whole organ are split.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from crfrefine.arrays.label_maps import Box, bounding_box
from crfrefine.arrays.probabilities import are_equal, plane_blocks
from crfrefine.base.array_types import Array, Bool, Float32
from crfrefine.base.notes import NoteKind, Notes
from crfrefine.base.numerics import MIN_PROBABILITY
from crfrefine.errors import InputError

# Voxels along each axis of the blocks that padding consists of; sheets of ties are thinner.
THICK = 3
# Voxels along each axis of a block of fill that counts as padding even inside the field of view. It
# is smaller than a sliding window, and larger than one tie of a coarse grid with repeated voxels.
HOLE = 8
MAX_SCORE = 1e4  # well above any logit of a network; larger ties are padding anywhere
# Largest relative error of a share 1 / L: more than that of bfloat16 or 8 bits.
SHARE_TOLERANCE = 0.05
MAX_SHARE = 0.999  # largest share of padding in the mask
ENOUGH_VOXELS = 1000  # voxels without padding that are enough, as of a small organ in a large scan


# The common text of notes on padding.
EQUAL_LOGITS = "logits are equal for all labels"


def find_ties(channels: Array, *, are_regions: bool = False) -> Bool | None:
    """Return (*grid), True where all labels of (L, *grid) have exactly the same value.

    Without ties, None is returned. The search is fastest in C order.

    Ties of regions are where all log-odds are exactly 0, which says nothing about any region. Any
    other constant says something, unlike in a softmax: probabilities of 0 in all channels are
    certain background.
    """
    ties: Bool = np.empty(channels.shape[1:], np.bool_)
    for planes in plane_blocks(channels):
        block = channels[:, planes]
        ties[planes] = ~block.any(axis=0) if are_regions else are_equal(block)
    return ties if ties.any() else None


def find_padding(
    channels: Array,
    *,
    are_regions: bool = False,
    is_probability: bool = False,
) -> Bool | None:
    """Return (*grid), True where logits, probabilities or log-odds, (L, *grid), are padding.

    None means nowhere.
    """
    ties = find_ties(channels, are_regions=are_regions)
    if ties is None:
        return None
    if are_regions:  # Any tie may be a probability of one half.
        return padding_among(ties, None, len(channels))
    logits = channels[0]
    if is_probability:
        # As in `take_logarithms`; only ties matter.
        logits = np.clip(logits, MIN_PROBABILITY, 1.0)
        np.log(logits, out=logits, where=ties)
    return padding_among(ties, logits, len(channels))


def leave_out(
    padding: Bool | None, mask: Bool | None, what: str, *, are_regions: bool = False
) -> tuple[Bool | None, int, Notes]:
    """Return a mask without the padding, the number of voxels removed from it, and notes.

    Args:
        padding: (*grid), True at padding; None means no padding.
        mask: (*grid); None means everywhere.
        what: a name for the padded channels, in the errors of `check_share`.
        are_regions: whether the padding is that of regions.
    """
    if padding is None:
        return mask, 0, ()
    inside = ~padding
    padded = padding
    if mask is not None:
        inside &= mask
        padded = padding & mask
    num_padded = int(np.count_nonzero(padded))
    if not num_padded:
        return inside, 0, ()
    check_share(num_padded, num_padded + int(np.count_nonzero(inside)), what)
    notes = notes_on_padding(padding, padded, are_regions=are_regions)
    return inside, num_padded, notes


def check_share(num_padded: int, num_voxels: int, what: str) -> None:
    """Raise InputError if almost all voxels are padding and fewer than ENOUGH_VOXELS are not."""
    is_most = num_padded > MAX_SHARE * num_voxels
    if is_most and num_voxels - num_padded < ENOUGH_VOXELS:
        raise InputError(
            f"{what}: all labels have the same value at {num_padded} of {num_voxels} voxels, so "
            "the labels there are unknown\n"
            "  Expected the network's output on this image. Is this a cropped output with mostly "
            "padding, or a placeholder file?"
        )


def notes_on_padding(padding: Bool, inside: Bool, *, are_regions: bool = False) -> Notes:
    """Return notes on padding around the field of view, and on holes, (*grid), inside a mask.

    `inside` is the padding in the mask.
    """
    holes, num_holes = find_holes(padding)
    num_in_holes = int(np.count_nonzero(holes & inside))
    num_around = int(np.count_nonzero(inside)) - num_in_holes
    what = EQUAL_LOGITS
    if are_regions:
        what = "log-odds are 0 for all regions"
    size = padding.size
    notes: Notes = ()
    if num_around:
        share = num_around / size
        notes += (NoteKind.PADDING(what=what, padding=num_around, voxels=size, share=share),)
    if num_in_holes:
        note = NoteKind.HOLES(
            what=what,
            inside=num_in_holes,
            voxels=size,
            share=num_in_holes / size,
            holes=num_holes,
        )
        notes += (note,)
    return notes


def find_holes(padding: Bool) -> tuple[Bool, int]:
    """Return the padding inside the field of view, (*grid), and how many holes it consists of.

    A hole is a part of the padding in the smallest box around all other voxels, connected over
    faces. It neither goes on beyond the box nor holds a corner of it, or it is a block as large as
    a window: no convex field of view leaves a block in its box.
    """
    holes = np.zeros(padding.shape, np.bool_)
    box = bounding_box(~padding)
    if box is None or not padding[box].any():
        return holes, 0
    from scipy import ndimage

    parts, count = ndimage.label(padding[box])
    is_around = np.zeros(count + 1, np.bool_)
    is_around[0] = True  # Number 0 is no padding.
    is_around[parts[np.ix_(*((0, -1) for _ in box))]] = True
    for axis, (along, extent) in enumerate(zip(box, padding.shape, strict=True)):
        if along.start > 0:
            is_around[parts.take(0, axis)] = True
        if along.stop < extent:
            is_around[parts.take(-1, axis)] = True
    for number, part in enumerate(ndimage.find_objects(parts), start=1):
        is_part = parts[part] == number
        if is_part.all() and np.greater_equal(is_part.shape, np.minimum(HOLE, parts.shape)).all():
            is_around[number] = False
    holes[box] = ~is_around[parts]
    return holes, int(np.count_nonzero(~is_around))


def write_background(probabilities: Float32, unseen: Bool, *, are_regions: bool) -> None:
    """Write certain background where a network saw nothing, in place.

    Args:
        probabilities: (L, *grid) of labels, or (R, *grid) of regions.
        unseen: (*grid), True where the network saw nothing.
        are_regions: whether the channels are regions, without one for the background.
    """
    for label, channel in enumerate(probabilities):
        channel[unseen] = label == 0 and not are_regions


def padding_among(ties: Bool, logits: Array | None, num_labels: int) -> Bool | None:
    """Return (*grid), True at the ties that are padding; None without padding.

    Args:
        ties: (*grid), True where all labels are equal; it may be returned itself.
        logits: (*grid), the common value, which matters at ties only. None means that every value
            may be a vote, as the log-odds 0 of regions.
        num_labels: L, the number of labels that are equal.
    """
    decided = bounding_box(~ties)
    if decided is None:
        return ties
    # A cropped output fills a box, and all voxels around that box are ties.
    if not ties[decided].any():
        if ties.any():
            return ties
        return None
    padding = np.ones(ties.shape, np.bool_)
    # In the box, padding is what holds a corner of it and is thick, where ties go on beyond it. A
    # single tie at a corner is no block that reaches beyond the box.
    part = ties[decided]
    margin = THICK - 1
    wider = np.pad(part, margin, constant_values=True)
    inner = (slice(margin, -margin),) * part.ndim
    thick = _blocks(wider, [THICK] * part.ndim)[inner]
    corners = np.ix_(*((0, extent - 1) for extent in part.shape))
    block = math.prod(min(THICK, extent) for extent in part.shape)
    padding[decided] = _regions_with(thick, corners, block)
    if logits is not None:
        fill = ties & ~padding
        # Logarithms of equal probabilities, whose sum is 1, may be votes.
        with np.errstate(over="ignore"):
            sums = np.exp(logits[fill].astype(np.float32)) * num_labels
        fill[fill] = ~(np.abs(sums - 1.0) <= SHARE_TOLERANCE)
        _add_fill(padding, fill, logits, decided)
    if padding.any():
        return padding
    return None


def _add_fill(padding: Bool, fill: Bool, logits: Array, box: Box) -> None:
    """Add fill to the padding, in place: if huge, a large block, or equal to padding beside it.

    The box, of the decided voxels, holds all fill.
    """
    if not fill.any():
        return
    sides = [min(HOLE, extent) for extent in fill.shape]
    padding[box] |= _blocks(fill[box], sides)
    # For few voxels several times faster than `np.nonzero`.
    voxels = np.unravel_index(np.flatnonzero(fill), fill.shape)
    padding[voxels] |= np.abs(logits[voxels]) > MAX_SCORE
    is_left = ~padding[voxels]
    voxels = tuple(along[is_left] for along in voxels)
    values = logits[voxels]
    touches = np.zeros(len(values), np.bool_)  # Shares a face with padding of its value.
    for axis, extent in enumerate(padding.shape):
        for step in (-1, 1):
            neighbors = list(voxels)
            # A voxel at the border of the grid is its own neighbor, and thus no padding.
            neighbors[axis] = (voxels[axis] + step).clip(0, extent - 1)
            is_padding = padding[tuple(neighbors)]
            touches |= is_padding & (logits[tuple(neighbors)] == values)
    for value in np.unique(values[touches]):
        same = np.zeros(fill.shape, np.bool_)
        same[voxels] = values == value
        beside_padding = touches & (values == value)
        padding |= _regions_with(same, tuple(along[beside_padding] for along in voxels))


def _regions_with(mask: Bool, seeds: Any, min_voxels: int = 1) -> Bool:
    """Return the regions of a mask, connected over faces, that hold some of the seeds.

    `seeds` index the mask; regions have at least so many voxels.
    """
    if not mask[seeds].any():
        return np.zeros(mask.shape, np.bool_)
    from scipy import ndimage

    regions, count = ndimage.label(mask)
    has_seed = np.zeros(count + 1, np.bool_)
    has_seed[regions[seeds]] = True
    has_seed[0] = False  # Number 0 is not a region.
    is_large = np.bincount(regions.ravel()) >= min_voxels
    return (has_seed & is_large)[regions]


def _blocks(mask: Bool, sides: list[int]) -> Bool:
    """Return the union of all blocks in the mask that have `sides` voxels along the axes."""
    if (np.array(mask.shape) < sides).any():
        return np.zeros(mask.shape, np.bool_)
    starts = _eroded(mask, sides)
    if not starts.any():
        return np.zeros(mask.shape, np.bool_)
    # A voxel is in no block if none begins where a block that holds it would.
    widths = [(side - 1, side - 1) for side in sides]
    return ~_eroded(np.pad(~starts, widths, constant_values=True), sides)


def _eroded(mask: Bool, sides: list[int]) -> Bool:
    """Return where blocks of `sides` voxels begin, (extent - side + 1, ...)."""
    for axis, side in enumerate(sides):
        planes = np.moveaxis(mask, axis, 0)
        length = 1
        while length < side:  # Each step about doubles the length.
            step = min(length, side - length)
            planes = planes[:-step] & planes[step:]
            length += step
        mask = np.moveaxis(planes, 0, axis)
    return mask
