"""The edits that follow from strokes: what changes around the drawn voxels, and by how much.

They are made in a case that is prepared, in its array of logits or on its tiles.

A drawn voxel is fixed. Around it, the logit of its label rises by `strength * temperature * exp(-d²
/ 2 r² - Δ² / 2 s²)` at a voxel that is d mm away and whose normalized intensities differ by Δ; the
largest rise counts. r is the distance from the drawn voxel to the nearest voxel of its label in the
network's label map, so that a stroke covers the error that it corrects. Where the network has
the label already, nothing rises. A rise depends only on the network, the image and the voxels that
are drawn there. Strokes elsewhere do not matter, and groups, boxes and tiles only save time. See
docs/guide/strokes.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.label_maps import ABSENT_LOGIT, MIN_SHARE, Box, count_labels, dilated
from crfrefine.arrays.region_scheme import MAX_LOG_ODDS
from crfrefine.arrays.softmax import take_logarithms
from crfrefine.base.array_types import Array, Bool, Float32, Integers
from crfrefine.base.geometry import SAME_LENGTH
from crfrefine.engines.results import label_map
from crfrefine.refinement.edits import Edits
from crfrefine.refinement.given import CaseToRefine, Prepared
from crfrefine.refinement.tiles.grid import TILE, LabelSets, box_between
from crfrefine.refinement.tiles.problem import TileProblem

# Rise of the logit at a drawn voxel over the temperature, for a network's scores, a label map, and
# the map of a coarser network: its labels are 2, or at most 7, apart.
STRENGTH = 7.5
STRENGTH_OF_LABELS = 3.0
STRENGTH_OF_SHARES = 8.0
MIN_RADIUS = 1.5  # smallest r in mm
# Largest r over the edge of a cube as large as all voxels of the label in the network's label map,
# which a wrong stroke would take; half of the reach is always allowed.
SHARE_OF_EDGE = 0.25
NUM_RADII = 3.0  # radii after which a rise ends: it is 1 % of the strength there


def draw_strokes(prepared: Prepared, case: CaseToRefine) -> None:
    """Edit the channels, and count the voxels that labels gain if volumes are kept."""
    if prepared.labels is None:
        prepared.labels = case.decode(prepared.logits)
    prepared.logits = np.array(prepared.logits, order="C")
    if prepared.is_probability:
        take_logarithms(prepared.logits)
        prepared.is_probability = False
    are_regions = case.regions is not None
    network: Array = prepared.logits if are_regions else prepared.labels
    edits = plan_edits(case, prepared.mask, prepared.image_in, network)
    if not case.is_label_map:
        temperature = case.model.mean_field.temperature
        prepared.notes += edits.find_ruled_out(
            prepared.logits, temperature, are_regions=are_regions
        )
    if not case.parameters.volume.match_input:  # Only volumes need what labels gain.
        edits.apply(prepared.logits)
        return
    before = _count_voxels(prepared.logits, case)
    edits.apply(prepared.logits)
    prepared.gained = _count_voxels(prepared.logits, case) - before


def _count_voxels(logits: Float32, case: CaseToRefine) -> Integers:
    """Return the number of voxels of each label's largest logits, (L,)."""
    labels = label_map(logits, case.context.threads)
    return np.array(count_labels(labels, len(logits)))


def draw_strokes_on_tiles(problem: TileProblem, prepared: Prepared, case: CaseToRefine) -> None:
    """Edit channels that are not in memory, and count the voxels as `draw_strokes` does."""
    assert prepared.labels is not None
    grid = problem.grid
    network = prepared.labels.reshape(grid.shape)
    edits = plan_edits(case, problem.mask, problem.normalized, network)
    changed = edits.changed_tiles(grid, len(problem.present))
    # Labels take part where their logits rise, too.
    edited = problem.with_presence(problem.present | changed, problem.may_matter | changed)
    edited = replace(edited, edits=edits)
    # The tiles that the edits change, by themselves: labels gain voxels only there.
    is_near = changed.any(axis=0)
    near = replace(edited, sets=LabelSets(grid, edited.sets.domains & is_near))
    if case.parameters.volume.match_input:
        near.source.ensure(near.sets.domains & near.sets.active)
        before = _count_voxels_on_tiles(replace(near, edits=None))
        prepared.gained = _count_voxels_on_tiles(near) - before
    # Without kernels nothing changes elsewhere, unless tiles were to be computed before.
    is_local = not problem.spec.kernels.kernels and not problem.sets.active.any()
    prepared.problem = near if is_local else edited


def _count_voxels_on_tiles(problem: TileProblem) -> Integers:
    """Return the number of voxels of each label's largest logits in active tiles, (L,)."""
    sets = problem.sets
    labels = np.zeros(sets.grid.shape, np.uint16)
    if sets.num_entries:
        sets.engine(problem.mask, 1).decode(problem.logits(1), labels)
    return np.array(count_labels(labels, len(sets.domains)))


def plan_edits(
    case: CaseToRefine,
    mask: Bool | None,
    normalized: Callable[[Box], Float32],
    network: Array,
) -> Edits:
    """Return the edits of a case in storage order, whose grid may have further leading axes.

    Args:
        case: the case, which has strokes.
        mask: (*grid), True where the model applies; None means everywhere.
        normalized: returns the normalized image of a box, (M, *box).
        network: the network's label map, (*grid), or (R, *grid) log-odds of regions: a drawn voxel
            is inside of those that have its label, and outside of others.
    """
    regions = case.regions
    shape = network.shape if regions is None else network.shape[1:]
    assert case.strokes is not None
    strokes = case.strokes.within(mask, len(shape))
    positions = strokes.positions
    members = channels_of_labels(case, strokes.labels)
    if regions is None:
        strokes = replace(strokes, labels=members.argmax(axis=0))
        fixed = np.where(members, 0.0, ABSENT_LOGIT)
    else:
        fixed = np.where(members, MAX_LOG_ODDS, -MAX_LOG_ODDS)

    strength = STRENGTH
    lifted = None
    if case.is_label_map and case.model.kernels.network_spacing is None:
        strength = STRENGTH_OF_LABELS
        lifted = 0.0
    elif case.is_label_map:
        strength = STRENGTH_OF_SHARES
        lifted = math.log(MIN_SHARE)
    rises = []

    def follow(channel: int, is_drawn: Bool, has_label: Bool, sign: int) -> None:
        """Raise a channel, or lower it, around drawn voxels where the network is wrong."""
        # Where the network has the label already, there is no error to follow.
        is_wrong = is_drawn & ~has_label[tuple(positions)]
        if not is_wrong.any():
            return
        num_voxels = strokes.volume_of_label(is_wrong, has_label)
        rise = case.model.mean_field.temperature * strength
        if case.is_label_map and not num_voxels:
            # Where a map lacks a label, its logits are as far below others at any temperature.
            rise = max(rise, strength)
        drawn = positions[:, is_wrong]
        for box, closeness in _closeness(drawn, has_label, num_voxels, case, normalized):
            if mask is not None:
                closeness *= mask[box]
            rises.append((channel, box, closeness * (sign * rise)))

    for channel, is_drawn in enumerate(members):
        if regions is not None:
            is_region = network[channel] > 0
            follow(channel, is_drawn, is_region, 1)
            follow(channel, ~is_drawn, ~is_region, -1)
        elif is_drawn.any():
            follow(channel, is_drawn, network == channel, 1)
    return Edits(strokes, rises, fixed.astype(np.float32), lifted)


def channels_of_labels(case: CaseToRefine, labels: Integers) -> Bool:
    """Return (channels, N), which channels the labels of drawn voxels, (N,), are or belong to."""
    if case.regions is None:
        return labels == np.array(case.channel_labels)[:, None]
    return np.stack([np.isin(labels, region) for region in case.regions.labels])


def _closeness(
    positions: Integers,
    has_label: Bool,
    num_voxels: int,
    case: CaseToRefine,
    normalized: Callable[[Box], Float32],
) -> Iterator[tuple[Box, Float32]]:
    """Yield the largest exp(-d² / 2 r² - Δ² / 2 s²) over drawn voxels, in boxes of whole tiles.

    No voxel has a value above 0 in two of the boxes. `has_label` is True at the voxels of the grid
    where the network has the label of the drawn voxels already, `num_voxels` in the whole case.
    """
    parameters = case.parameters.strokes
    num_dims = len(case.image.spacing)
    spacing = (*(1.0,) * (has_label.ndim - num_dims), *case.image.spacing)
    reach = max(MIN_RADIUS, parameters.reach)
    largest_radius = reach
    if num_voxels:
        volume = num_voxels * math.prod(spacing)
        edge = volume ** (1 / num_dims)
        largest_radius = min(reach, max(MIN_RADIUS, reach / 2, SHARE_OF_EDGE * edge))
    ends = NUM_RADII * reach / np.array(spacing)
    for members, box in _groups(positions, ends, has_label.shape):
        radii = _radii(members, has_label, largest_radius, spacing)
        start = np.array([[along.start] for along in box])
        image = normalized(box) * (1.0 / parameters.likeness)
        closeness = _lowest_distance(members - start, radii, image, spacing)
        closeness *= -0.5
        yield box, np.exp(closeness, out=closeness)


def _groups(
    positions: Integers, ends: NDArray[np.float64], shape: Sequence[int]
) -> Iterator[tuple[Integers, Box]]:
    """Yield groups of drawn voxels, and the box of tiles within `ends` voxels of each group."""
    from scipy.ndimage import label as connect

    num_dims = len(shape)
    tile = np.array(((1,) * num_dims + TILE)[-num_dims:])
    # Voxels of different groups of cells are farther apart than twice the ends along some axis.
    cell = np.ceil(ends).clip(1).astype(np.int64)
    cells = tuple(positions // cell[:, None])
    num_cells = -(-np.array(shape) // cell)
    occupied = np.zeros(num_cells, np.bool_)
    occupied[cells] = True
    neighbors = np.ones((3,) * num_dims)
    around = dilated(occupied, (1,) * num_dims)
    numbers, count = connect(around, neighbors)
    for number in range(1, count + 1):
        members = positions[:, numbers[cells] == number]
        lowest = np.floor(members.min(axis=1) - ends)
        highest = np.ceil(members.max(axis=1) + 1 + ends)
        start = np.maximum(0, lowest).astype(np.int64) // tile * tile
        stop = -(-highest.astype(np.int64) // tile) * tile
        yield members, box_between(start, np.minimum(stop, shape))


def _lowest_distance(
    positions: Integers, radii: Float32, image: Float32, spacing: Sequence[float]
) -> Float32:
    """Return the lowest d² / r² + Δ² / s² over drawn voxels, (*box); the image is divided by s."""
    shape = image.shape[1:]
    lowest = np.full(shape, np.inf, np.float32)
    for radius in np.unique(radii).tolist():
        ends = []
        squares = []  # d² / r² around a drawn voxel, along each axis
        for step, extent in zip(spacing, shape, strict=True):
            reach = math.floor(NUM_RADII * radius / step * (1.0 + SAME_LENGTH))
            end = min(reach, extent - 1)  # farther places are outside of the box
            ends.append(end)
            distance = np.arange(-end, end + 1) * (step / radius)
            squares.append(np.square(distance, dtype=np.float32))
        ball: Float32 = sum(np.ix_(*squares), np.zeros((), np.float32))
        # A voxel at the last radius is near, however its distance was rounded.
        ball[ball > np.float32(NUM_RADII**2 * (1.0 + SAME_LENGTH))] = np.inf
        for position in positions.T[radii == radius].tolist():
            near = []
            inside = []
            for place, end, extent in zip(position, ends, shape, strict=True):
                first = max(0, place - end)
                stop = min(place + end + 1, extent)
                near.append(slice(first, stop))
                inside.append(slice(first - place + end, stop - place + end))
            total = ball[tuple(inside)]
            part = image[(slice(None), *near)]
            for modality, at_stroke in zip(part, image[(slice(None), *position)], strict=True):
                total = total + np.square(modality - at_stroke)
            np.minimum(lowest[tuple(near)], total, out=lowest[tuple(near)])
    return lowest


def _radii(
    positions: Integers, has_label: Bool, largest_radius: float, spacing: Sequence[float]
) -> Float32:
    """Return the mm from drawn voxels to the nearest one of their label, within limits."""
    from scipy.ndimage import binary_erosion
    from scipy.spatial import KDTree

    steps = np.array(spacing)
    ends = np.ceil(largest_radius / steps).astype(np.int64)
    start = np.maximum(0, positions.min(axis=1) - ends)
    stop = positions.max(axis=1) + ends + 1
    near = has_label[box_between(start, stop)]
    distances = np.full(positions.shape[1], np.inf)
    if near.any():
        # Beyond the box counts as inside: the voxel nearest to one in the box is no face of the
        # box.
        surface = np.argwhere(near & ~binary_erosion(near, border_value=1))
        drawn = positions.T - start
        tree = KDTree(surface * steps)
        distances, _ = tree.query(drawn * steps, distance_upper_bound=largest_radius)
    radii = distances.clip(MIN_RADIUS, largest_radius)
    # Of two voxels at the same distance either may be found, and their sums are rounded
    # differently.
    return radii.astype(np.float32)
