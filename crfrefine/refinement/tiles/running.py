"""The mean field of the C++ engine on label sets: by direct sums tile by tile, or by the filters of a whole volume."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.arrays.label_maps import widen
from crfrefine.engines.base import MeanFieldReport, RunContext
from crfrefine.engines.cpu import CpuKernels
from crfrefine.engines.grid_image import GridImage, default_origin
from crfrefine.refinement.tiles.grid import TILE
from crfrefine.refinement.tiles.label_sets import num_rings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.engines.base import Backend, Progress
    from crfrefine.parameters.specs import KernelSpec
    from crfrefine.refinement.tiles.grid import Extents, TileGrid
    from crfrefine.refinement.tiles.label_sets import LabelSets
    from crfrefine.refinement.tiles.problem import TileProblem


UNSENT = 0.05
"""Share of the threshold of marginals by which those of a row may have changed before it sends them again."""

_NONE = np.zeros(0, np.int32)


@dataclass(frozen=True)
class Settings:
    """How a run is made.

    Attributes:
        threads: None: the cores this process may use.
        progress: called between stages; may raise to stop.
        num_bytes: called before a run: what it may take beyond what is in memory then; None: any amount.
        has_room: whether copies of the whole volume may be made for a while.
    """

    threads: int | None = None
    progress: Progress | None = None
    num_bytes: Callable[[], int | None] | None = None
    has_room: bool = False


@dataclass(frozen=True, eq=False)
class RefinedTiles:
    """Refined logits of label sets.

    Attributes:
        sets: the labels of each tile.
        values: (entries, voxels of a tile) float32.
        exceeds: (entries), 1 where the label's marginal was above the threshold near the border of its domain after any step: a label that
            passes the border may be gone there at the end.
        mask: (*grid), True where the model applies; None: everywhere.
        report: steps, energy and filters.
        timings: seconds of each stage.
    """

    sets: LabelSets
    values: NDArray[np.float32]
    exceeds: NDArray[np.uint8]
    mask: NDArray[np.bool_] | None
    report: MeanFieldReport
    timings: dict[str, float]

    def computed(self) -> NDArray[np.float32]:
        """Return what the engine computed."""
        return self.values[None]

    def decode(self, labels: NDArray[np.unsignedinteger[Any]], threads: int | None) -> None:
        """Write the label of the largest logit at the voxels of active tiles into a label map (*grid), uint8 or uint16."""
        self.sets.engine(self.mask, threads).decode(self.values, labels)

    def entries_of(self, label: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the active tiles where a label takes part, as flat numbers, and its refined logits there, (tiles, voxels of a tile)."""
        tiles, entries = self.sets.entries_of(label)
        return tiles, self.values[entries]

    def exceeding(self) -> NDArray[np.bool_] | None:
        """Return (L, *tiles), where a label's marginal was not negligible near the border of its domain; None: nowhere."""
        return self.sets.flagged(self.exceeds)


@dataclass(frozen=True, eq=False)
class Packed:
    """The network's logits of label sets.

    Attributes:
        sets: the labels of each tile; at least one is active.
        logits: (entries, voxels of a tile) float32, with the bias of the labels.
        open: (active tiles, rows of a tile) uint16, one bit for each voxel of a row, the lowest for the first: 1 where it is not settled.
    """

    sets: LabelSets
    logits: NDArray[np.float32]
    open: NDArray[np.uint16]


def pack(problem: TileProblem, sets: LabelSets, threads: int | None, *, is_direct: bool) -> Packed:
    """Return the logits of the labels that take part in each tile, with their bias, and the voxels that are not settled.

    Only direct sums cost less for single settled voxels: with filters of the whole volume, a row is open if one of its voxels is.

    Args:
        problem: the volume.
        sets: the labels of its tiles.
        threads: None: the cores this process may use.
        is_direct: whether sums are direct.
    """
    tile_engine = problem.grid.engine(threads)
    logits = np.empty((sets.num_entries, math.prod(TILE)), np.float32)
    for label in range(len(problem.present)):
        tiles, entries = sets.entries_of(label)
        if len(tiles):
            problem.source.fill_entries(tile_engine, label, tiles, entries, logits)
    run = problem.spec.mean_field
    if run.bias is not None:
        logits += np.asarray(run.bias, np.float32)[sets.labels][:, None]
    is_open = np.empty((len(sets.tiles), math.prod(TILE) // TILE[-1]), np.uint16)
    sets.engine(problem.mask, threads).open_voxels(logits, run.temperature, problem.settled, not is_direct, is_open)
    return Packed(sets, logits, is_open)


def run_tiles(problem: TileProblem, packed: Packed, backend: Backend, settings: Settings, *, is_direct: bool) -> RefinedTiles:
    """Run the mean field.

    Args:
        problem: the volume.
        packed: the labels of its tiles.
        backend: the CPU engine.
        settings: how.
        is_direct: whether to sum directly; else the filters that the model asks for are built.
    """
    started = time.perf_counter()
    sets, logits = packed.sets, packed.logits
    image = problem.image.planes(0, problem.grid.shape[0])
    built, channels, filters = None, Channels(0, _NONE, _NONE), _describe(problem, sets)
    if not is_direct and packed.open.any():  # Without an open voxel there is nothing to filter.
        channels = share_channels(sets, num_rings(problem.reach))
        kernels = build_kernels(problem, packed, image, channels.count, backend, settings)
        built, filters = kernels.built, kernels.filters
    spec, run = problem.spec.kernels, problem.spec.mean_field
    steps = spec.distances(problem.spacing)
    out = np.empty_like(logits)
    exceeds = np.zeros(sets.num_entries, np.uint8)
    prepared = time.perf_counter()
    outcome = sets.engine(problem.mask, settings.threads).run(
        built,
        channels.count,
        channels.of_entry,
        channels.of_settled,
        image,
        [(_sigma(kernel, steps), list(kernel.theta_intensity or ())) for kernel in spec.bilateral],
        [] if spec.spatial is None else _sigma(spec.spatial, steps),
        spec.normalization,
        run.weights.astype(np.float32).tolist(),
        [float(value) for value in np.asarray(run.compatibility).ravel()],
        run.is_potts,
        run.temperature,
        run.damping,
        run.num_iterations,
        run.tolerance,
        packed.open,
        problem.num_voxels,
        settings.progress,
        logits,
        out,
        None if problem.threshold is None else problem.may_matter,
        problem.reach,
        problem.threshold or 0.0,
        exceeds,
        UNSENT * problem.precision,
        settings.has_room,
    )
    report = MeanFieldReport(outcome["num_iterations"], outcome["converged"], tuple(outcome["energy"]), filters)
    return RefinedTiles(sets, out, exceeds, problem.mask, report, {"build": prepared - started, "steps": time.perf_counter() - prepared})


def rows_near(grid: TileGrid, packed: Packed, reach: Extents) -> NDArray[np.bool_]:
    """Return (*grid), True within twice the reach of a row of a tile with an open voxel; along the last axis in whole tiles.

    Args:
        grid: the tiles.
        packed: which voxels are open.
        reach: voxels along each axis after which every kernel ends.
    """
    is_open = np.zeros((grid.num_tiles, *TILE[:2]), np.bool_)
    is_open[packed.sets.tiles] = packed.open.reshape(-1, *TILE[:2]) != 0
    rows = is_open.reshape(*grid.counts, *TILE[:2]).transpose(0, 3, 1, 4, 2)
    rows = rows.reshape(grid.counts[0] * TILE[0], grid.counts[1] * TILE[1], grid.counts[2])[: grid.shape[0], : grid.shape[1]]
    near = widen(rows, (2 * reach[0], 2 * reach[1], num_rings(reach)[2]))
    return np.repeat(near, TILE[2], axis=2)[:, :, : grid.shape[2]]


def build_kernels(
    problem: TileProblem, packed: Packed, image: NDArray[np.float32], num_channels: int, backend: Backend, settings: Settings
) -> CpuKernels:
    """Return the kernels of the voxels that matter: those of rows with open voxels, and of all that they receive from.

    A row counts as far as the normalization of those who send reaches: twice the kernels' reach.
    """
    near = rows_near(problem.grid, packed, problem.reach)
    if problem.mask is not None:
        near &= problem.mask
    dims = problem.grid.shape[3 - problem.num_dims :]
    spec = dataclasses.replace(problem.spec.kernels, num_labels=num_channels + 1)
    whole = image.reshape(-1, *dims)
    given = GridImage(whole, None if problem.mask is None else problem.mask.reshape(dims), problem.spacing, problem.axes)
    origin = problem.origin or default_origin(given)
    kernels = backend.kernels(
        dataclasses.replace(given, mask=near.reshape(dims), origin=origin), spec, RunContext(settings.threads, settings.progress)
    )
    if not isinstance(kernels, CpuKernels):
        raise TypeError("label sets need the C++ engine")
    return kernels


def _describe(problem: TileProblem, sets: LabelSets) -> tuple[str, ...]:
    """Return how the messages of each kernel are summed directly."""
    how = f"direct in {len(sets.tiles)} of {sets.grid.num_tiles} tiles, {sets.num_entries / len(sets.tiles):.1f} labels each"
    return tuple(
        f"{'spatial' if kernel.is_spatial else f'bilateral.{number}'}: {how}" for number, kernel in enumerate(problem.spec.kernels.kernels)
    )


def _sigma(kernel: KernelSpec, steps: tuple[float, ...]) -> list[float]:
    """Return the standard deviation in voxels along the three axes."""
    return [1.0] * (3 - len(steps)) + [theta / step for theta, step in zip(kernel.theta_position, steps, strict=True)]


# Channels that labels share: for filters that take dense channels of a whole volume.


@dataclass(frozen=True, eq=False)
class Channels:
    """The channel of each label in each tile.

    Attributes:
        count: number of channels.
        of_entry: (entries) int32.
        of_settled: (*tiles) int32, of a settled tile's label; -1: the tile is not settled.
    """

    count: int
    of_entry: NDArray[np.int32]
    of_settled: NDArray[np.int32]


def share_channels(sets: LabelSets, rings: Extents) -> Channels:
    """Spread labels over as few channels as a simple rule finds: labels share one where no message of one can reach the other's domain.

    Parts of a domain that messages can cross between stay together. The parts of all domains, the largest first, each take the first
    channel in which no other label is within reach.

    Args:
        sets: the labels of each tile.
        rings: tiles that messages can cross along each axis.
    """
    from scipy import ndimage

    parts = []
    neighbors = np.ones((3, 3, 3), np.bool_)
    for label, tiles in enumerate(sets.domains):
        numbered, count = ndimage.label(widen(tiles, rings), structure=neighbors)
        for number, box in enumerate(ndimage.find_objects(numbered, count), start=1):
            around = numbered[box] == number
            inside = around & tiles[box]
            parts.append((-int(np.count_nonzero(inside)), label, number, box, around, inside))
    channels: list[NDArray[np.int32]] = []
    for _, label, _, box, around, inside in sorted(parts, key=lambda part: part[:3]):
        for channel in channels:
            held = channel[box][around]
            if ((held < 0) | (held == label)).all():
                break
        else:
            channel = np.full(sets.grid.counts, -1, np.int32)
            channels.append(channel)
        channel[box][inside] = label
    of_entry = np.empty(sets.num_entries, np.int32)
    of_settled = np.full(sets.grid.counts, -1, np.int32)
    for number, channel in enumerate(channels):
        of_settled[(sets.settled >= 0) & (channel == sets.settled)] = number
        for label in np.unique(channel[sets.active & (channel >= 0)]):
            tiles, entries = sets.entries_of(int(label))
            of_entry[entries[channel.flat[tiles] == label]] = number
    return Channels(len(channels), of_entry, of_settled)
