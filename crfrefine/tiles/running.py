"""The mean field of the C++ engine on label sets: by direct sums tile by tile, or by the filters of a whole volume."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.engines.base import MeanFieldReport
from crfrefine.engines.cpu import CpuKernels
from crfrefine.engines.origin import default_origin
from crfrefine.tiles.channels import Channels, share_channels
from crfrefine.tiles.grid import TILE
from crfrefine.tiles.label_sets import num_rings, widen

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.engines.base import Backend, Progress
    from crfrefine.specs import KernelSpec
    from crfrefine.tiles.label_sets import LabelSets
    from crfrefine.tiles.problem import TileProblem


_NONE = np.zeros(0, np.int32)


@dataclass(frozen=True)
class Settings:
    """How a run is made.

    Attributes:
        threads: None: the cores this process may use.
        progress: called between stages; may raise to stop.
        num_bytes: called before a run: what it may take beyond what is in memory then; None: any amount.
    """

    threads: int | None = None
    progress: Progress | None = None
    num_bytes: Callable[[], int | None] | None = None


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

    def exceeding(self, problem: TileProblem) -> NDArray[np.bool_] | None:
        """Return (L, *tiles), where a label's marginal was not negligible near the border of its domain; None: nowhere."""
        if not self.exceeds.any():
            return None
        found = np.zeros_like(problem.present)
        for label in np.unique(self.sets.labels[self.exceeds != 0]):
            tiles, entries = self.sets.entries_of(int(label))
            found[label].flat[tiles[self.exceeds[entries] != 0]] = True
        return found


@dataclass(frozen=True, eq=False)
class Packed:
    """The network's logits of label sets.

    Attributes:
        sets: the labels of each tile; at least one is active.
        logits: (entries, voxels of a tile) float32, with the bias of the labels.
        is_open: (active tiles, rows of a tile) uint8, 0 where all voxels of a row are settled.
    """

    sets: LabelSets
    logits: NDArray[np.float32]
    is_open: NDArray[np.uint8]


def pack(problem: TileProblem, sets: LabelSets, threads: int | None) -> Packed:
    """Return the logits of the labels that take part in each tile, with their bias, and the rows that are not settled."""
    tile_engine = problem.grid.engine(threads)
    logits = np.empty((sets.num_entries, math.prod(TILE)), np.float32)
    for label in range(len(problem.present)):
        tiles, entries = sets.entries_of(label)
        if len(tiles):
            problem.source.fill_entries(tile_engine, label, tiles, entries, logits)
    run = problem.spec.mean_field
    if run.bias is not None:
        logits += np.asarray(run.bias, np.float32)[sets.labels][:, None]
    is_open = np.empty((len(sets.tiles), math.prod(TILE) // TILE[-1]), np.uint8)
    sets.engine(problem.mask, threads).open_rows(logits, run.temperature, problem.settled, is_open)
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
    if not is_direct:
        channels = share_channels(sets, num_rings(problem.reach))
        kernels = build_kernels(problem, sets, image, channels.count, backend, settings)
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
        packed.is_open,
        problem.num_voxels,
        settings.progress,
        logits,
        out,
        None if problem.threshold is None else problem.may_matter,
        problem.reach,
        problem.threshold or 0.0,
        exceeds,
    )
    report = MeanFieldReport(outcome["num_iterations"], outcome["converged"], tuple(outcome["energy"]), filters)
    return RefinedTiles(sets, out, exceeds, problem.mask, report, {"build": prepared - started, "steps": time.perf_counter() - prepared})


def build_kernels(
    problem: TileProblem, sets: LabelSets, image: NDArray[np.float32], num_channels: int, backend: Backend, settings: Settings
) -> CpuKernels:
    """Return the kernels of the voxels that matter: those of active tiles, and of settled ones that they receive from.

    A settled tile counts as far as the normalization of those who receive reaches: twice the kernels' reach.
    """
    near = problem.grid.voxels(widen(sets.active, num_rings(problem.reach)))
    if problem.mask is not None:
        near &= problem.mask
    dims = problem.grid.shape[3 - problem.num_dims :]
    spec = dataclasses.replace(problem.spec.kernels, num_labels=num_channels + 1)
    whole = image.reshape(-1, *dims)
    kernels = backend.kernels(
        whole,
        near.reshape(dims),
        problem.spacing,
        spec,
        axes=problem.axes,
        origin=problem.origin or default_origin(whole, None if problem.mask is None else problem.mask.reshape(dims)),
        threads=settings.threads,
        progress=settings.progress,
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
