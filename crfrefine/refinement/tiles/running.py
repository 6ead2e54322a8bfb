"""The mean field of the C++ engine on label sets.

Messages are direct sums, tile by tile, or come from the filters of a whole volume.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.label_maps import count_inside, dilated
from crfrefine.base.array_types import Bool, Float32, Shape
from crfrefine.base.numerics import CHANNEL_GROUP
from crfrefine.engines.base import (
    MeanFieldReport,
    MeanFieldResult,
    RunContext,
    default_origin,
)
from crfrefine.engines.cpu import CpuBackend
from crfrefine.refinement.tiles.grid import MAX_DIMS, TILE, LabelSets, num_rings
from crfrefine.refinement.tiles.problem import TileProblem

# Share of the threshold by which marginals of a row may have changed before it sends them again.
UNSENT = 0.05


def run_tiles(
    problem: TileProblem, context: RunContext
) -> tuple[MeanFieldResult, NDArray[np.uint8]]:
    """Run the mean field on tiles, at least one of them active.

    Beside the result return (entries), 1 where the label's marginal was above the threshold near
    its domain's border after a step.
    """
    sets = problem.sets
    kernels = problem.spec.kernels
    mean_field = problem.spec.mean_field
    engine = sets.engine(problem.mask, context.threads)
    logits = problem.logits(context.threads)
    exceeds = np.zeros(sets.num_entries, np.uint8)
    if mean_field.bias is not None:
        bias = np.asarray(mean_field.bias, np.float32)
        logits += bias[sets.labels][:, None]
    if not kernels.kernels:  # No message changes the logits.
        logits /= mean_field.temperature
        return MeanFieldResult(logits, MeanFieldReport(0, True, ())), exceeds

    # (active tiles, rows), a bit for each voxel, or filtered row, that is not settled
    is_open = np.empty((len(sets.tiles), math.prod(TILE[:2])), np.uint16)
    are_filtered = not problem.is_direct
    engine.open_voxels(
        logits, mean_field.temperature, problem.thresholds.may_matter, are_filtered, is_open
    )
    started = time.perf_counter()
    image = problem.normalized()
    messages, filters = _messages(problem, image, is_open, context)
    # Of each kernel, in voxels along three axes, and those of intensity.
    bandwidths = []
    leading = [1.0] * (MAX_DIMS - len(problem.image.spacing))
    for kernel, widths in zip(kernels.kernels, kernels.widths(problem.image.spacing), strict=True):
        bandwidths.append((leading + widths, kernel.theta_intensity))
    out = np.empty_like(logits)
    prepared = time.perf_counter()

    outcome = engine.run(
        **messages,
        image=image,
        bandwidths=bandwidths,
        normalization=kernels.normalization,
        model=mean_field,
        open=is_open,
        num_voxels=count_inside(problem.mask, problem.grid.shape),
        progress=context.progress,
        logits=logits,
        out=out,
        may_matter=problem.may_matter if problem.checks_borders else None,
        reach=problem.reach,
        threshold=problem.threshold,
        exceeds=exceeds,
        unsent=UNSENT * problem.threshold,
    )
    timings = {"build": prepared - started, "steps": time.perf_counter() - prepared}
    energy = tuple(outcome["energy"])
    report = MeanFieldReport(outcome["num_iterations"], outcome["converged"], energy, filters)
    return MeanFieldResult(out, report, timings), exceeds


def _messages(
    problem: TileProblem,
    image: Float32,
    is_open: NDArray[np.uint16],
    context: RunContext,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return how messages are computed: arguments of the engine's run, and a line for each kernel.

    They are direct sums, or filters of the normalized image, (M, *grid), whose channels labels
    share: these take the rows with open voxels, and all voxels that they receive from.
    """
    sets = problem.sets
    kernels = problem.spec.kernels
    # Without an open voxel there is nothing to filter.
    if problem.is_direct or not is_open.any():
        tiles = f"{len(sets.tiles)} of {sets.grid.num_tiles} tiles"
        labels = f"{sets.num_entries / len(sets.tiles):.1f} labels each"
        filters = tuple(f"{name}: direct in {tiles}, {labels}" for name in kernels.names)
        none = np.zeros(0, np.int32)
        return {"kernels": None, "num_channels": 0, "of_entry": none, "of_settled": none}, filters

    num_channels, of_entry, of_settled = share_channels(sets, num_rings(problem.reach))
    near = rows_near(problem, is_open)
    if problem.mask is not None:
        near &= problem.mask
    shape = problem.grid.shape[MAX_DIMS - len(problem.image.spacing) :]
    guide = replace(problem.image, values=image.reshape(-1, *shape))
    origin = guide.origin or default_origin(guide)
    guide = replace(guide, mask=near.reshape(shape), origin=origin)
    # The last channel is for what takes part in no other.
    whole = CpuBackend().kernels(guide, replace(kernels, num_labels=num_channels + 1), context)
    shared = {"num_channels": num_channels, "of_entry": of_entry, "of_settled": of_settled}
    return {"kernels": whole.built, **shared}, whole.filters


def rows_near(problem: TileProblem, is_open: NDArray[np.uint16]) -> Bool:
    """Return (*grid), True within twice the reach of a row of a tile with an open voxel."""
    grid = problem.grid
    along_z, along_y, along_x = problem.reach
    shape_of_tile = (*TILE[:2], 1)  # one value for each row
    by_tile = np.zeros((grid.num_tiles, *shape_of_tile), np.bool_)
    by_tile[problem.sets.tiles] = is_open.reshape(-1, *shape_of_tile) != 0
    near = dilated(grid.joined(by_tile), (2 * along_z, 2 * along_y, 0))
    near = np.repeat(near, TILE[2], axis=-1)[..., : grid.shape[2]]
    return np.ascontiguousarray(dilated(near, (0, 0, 2 * along_x)))


# ---- Channels that labels share


def share_channels(
    sets: LabelSets, rings: Shape
) -> tuple[int, NDArray[np.int32], NDArray[np.int32]]:
    """Spread labels over as few channels as a simple rule finds.

    Return the number of channels, the channel of each entry, and that of the label of each settled
    tile, (*tiles), or -1.

    Labels share a channel where no message of one, over so many rings of tiles, can reach the
    other's domain. The labels, the largest first, each take the first channel without one.
    """
    num_labels = len(sets.domains)
    domains = sets.domains.reshape(num_labels, -1).astype(np.float32)
    reached = [dilated(domain, rings).ravel() for domain in sets.domains]
    conflicts = np.stack(reached).astype(np.float32) @ domains.T > 0  # (label, label)
    sizes = domains.sum(axis=1)
    channels: list[list[int]] = []  # labels of each
    for label in np.argsort(-sizes, kind="stable").tolist():
        if sizes[label] == 0:
            break
        for members in channels:
            if not conflicts[label, members].any():
                members.append(label)
                break
        else:
            channels.append([label])

    # Channels of a group are filtered together, wherever one of their labels is: the labels of a
    # group should be in the same tiles. The last channel, which takes part in all groups, stays:
    # few tiles have it.
    active = domains[:, sets.tiles] > 0
    last = channels.pop()
    tiles_of = [active[members].any(axis=0) for members in channels]
    grouped: list[list[int]] = []
    while channels:
        if len(grouped) % CHANNEL_GROUP == 0:  # A group begins.
            in_group = np.zeros(len(sets.tiles), np.bool_)
        best = int(np.argmax([np.count_nonzero(in_group & tiles) for tiles in tiles_of]))
        in_group |= tiles_of.pop(best)
        grouped.append(channels.pop(best))

    grouped.append(last)
    of_label = np.zeros(num_labels, np.int32)
    for channel, members in enumerate(grouped):
        of_label[members] = channel
    of_settled = np.where(sets.settled < 0, np.int32(-1), of_label[sets.settled])
    return len(grouped), of_label[sets.labels], of_settled
