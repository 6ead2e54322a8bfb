"""Estimate the memory of a run of the CPU engine before anything is allocated.

The sizes are those of the engine's arrays (`kernels/cpu/`), in the order in which they live; tests compare them with measured peaks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from crfrefine.engines.cpu import PlannedFilter
from crfrefine.specs import KernelSpec, ModelSpec
from crfrefine.tiles.filter_memory import HUGE_PAGE, FilterMemory, Problem, filter_memory, in_buffer, left_in_heap

_FLOAT = 4
_RUN = 32 * 3
"""Bytes per run of voxels along a row; its list grows by doubling, and is copied then."""
_BLOCK_SUMS = 48 / 1024
_FIXED = 1 << 22
"""Stacks of threads, and small arrays."""
_MORE_VERTICES = 1.3
_MARGIN = 1.04
"""For blocks that are kept for reuse although somewhat too large."""
_ROWS_A_LABEL = 3 * 1024
_FEW_BYTES = 1 << 24
"""Runs whose marginals take less do not ask the heap for what was freed, kFewBytes."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a run of the CPU engine in float32, by part.

    Attributes:
        image: (M, *grid), an input.
        logits: (L, *grid), an input.
        mask: (*grid) booleans, an input; 0 without one.
        refined: (L, *grid), the result.
        marginals: (channels, voxels).
        messages: (channels, voxels), and the message of ones.
        kernels: normalization, and what filters other than the lattice hold: padded copies, the grid, values on their way.
        lattice: lattices, and the rows of values at their vertices.
        record: marginals of the recorded steps, for a backward pass.
        other: lists of voxels, blocks of labels per thread.
        build: what building the kernels takes, before the steps' arrays exist.
        beyond_inputs: the most that is alive at the same time, without the inputs. Less than the sum: building ends before the steps begin.
    """

    image: int
    logits: int
    mask: int
    refined: int
    marginals: int
    messages: int
    kernels: int
    lattice: int
    record: int
    other: int
    build: int
    beyond_inputs: int

    @property
    def inputs(self) -> int:
        """Bytes of the inputs."""
        return self.image + self.logits + self.mask

    @property
    def total(self) -> int:
        """Bytes of inputs and run together, at their peak."""
        return self.inputs + self.beyond_inputs

    def by_part(self) -> dict[str, int]:
        """Return the parts by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "beyond_inputs"}


def estimate_dense(
    model: ModelSpec,
    grid_shape: Sequence[int],
    spacing: Sequence[float],
    num_modalities: int,
    *,
    num_voxels: int | None = None,
    box_shape: Sequence[int] | None = None,
    filters: Sequence[PlannedFilter] | None = None,
    filter_name: str | None = None,
    vertices_per_voxel: float | None = None,
    intensity_ranges: Sequence[tuple[float, float]] | None = None,
    num_recorded: int = 0,
    threads: int = 1,
) -> MemoryEstimate:
    """Estimate the memory that one run of the CPU engine takes, from sizes alone.

    It is between 1.0 and 1.5 times the measured peak for peaks over 30 MB; below, a constant of 4 MB and buffers per thread count more.
    Neither the choice of "auto", nor the lattice's vertices, nor the grid's range of intensities are known before the image is: then "auto"
    counts as the largest of the filters that it may choose, and bounds are used that exceed the peak up to eight times. With the image,
    `filters` tells.

    Args:
        model: number of labels and filtered channels, kernels, and the stopping rule.
        grid_shape: voxels along each axis, in memory order: the last axis is contiguous.
        spacing: mm along each axis.
        num_modalities: M.
        num_voxels: voxels inside the mask; None: there is no mask.
        box_shape: extent of the mask's bounding box; None: the whole grid.
        filters: of the appearance kernels, from `CpuBackend.plan_filters`; the next three arguments are not used then.
        filter_name: filter of the appearance kernels; None: that of `model`.
        vertices_per_voxel: vertices of the lattice per voxel, counted anew in each of its tiles of 4096 voxels (about 1.1 to 2 times those
            of the whole lattice); None: as many as a voxel has corners, features + 1, which no image exceeds. Images have 0.05 to 3, and up
            to the bound where bandwidths are small.
        intensity_ranges: lowest and highest normalized intensity of each modality; None: -0.5 to 1.5.
        num_recorded: steps whose marginals are kept for a backward pass; 0: none are, and the kernels are given up in the last step.
        threads: CPU threads.
    """
    grid_size = math.prod(grid_shape)
    kernels, run = model.kernels, model.mean_field
    voxels = grid_size if num_voxels is None else num_voxels
    box = tuple(grid_shape if box_shape is None else box_shape)
    distances = kernels.distances(spacing)
    problem = Problem(voxels, box, distances, num_modalities, tuple(intensity_ranges or ()), vertices_per_voxel, None, threads)
    is_implied = run.num_channels < run.num_labels
    rows = _FLOAT * run.num_channels * voxels
    per_voxel = _FLOAT * voxels

    if filters is None:
        held = [_largest(problem, kernel, filter_name or kernels.filter, run.num_channels) for kernel in kernels.kernels]
    else:
        of_bilateral = [
            filter_memory(planned.name, _as_planned(problem, planned), kernel, run.num_channels)
            for planned, kernel in zip(filters, kernels.bilateral, strict=True)
        ]
        held = of_bilateral + [filter_memory("spatial", problem, kernel, run.num_channels) for kernel in (kernels.spatial,) if kernel]
    # The last run has no array of what is a product over the axes: the factors of the spatial kernel where there is no mask.
    is_product = kernels.spatial is not None and voxels == math.prod(box) and not num_recorded
    num_factors = len(held) - is_product if kernels.normalization != "none" else 0
    factors = per_voxel * num_factors
    from_filters = sum(own.kept for own in held if not own.is_lattice) + max([own.working for own in held if not own.is_lattice], default=0)
    lattices = sum(own.kept for own in held if own.is_lattice)
    working = max([own.working for own in held if own.is_lattice], default=0)
    in_steps = factors + from_filters + lattices + max(working - max([o.working for o in held if not o.is_lattice], default=0), 0)

    num_runs = voxels / box[-1] * (1 if voxels == math.prod(box) else 2)
    other = int(_RUN * num_runs + _BLOCK_SUMS * voxels) + _FIXED + threads * _FLOAT * _ROWS_A_LABEL * run.num_labels
    refined = in_buffer(_FLOAT * run.num_labels * grid_size)
    # Of the result, while the kernels exist: the planes that the mask reaches, in whole pages.
    planes = _FLOAT * grid_size * box[0] / grid_shape[0] + 2 * HUGE_PAGE
    reached = min(refined, int(run.num_labels * planes))
    marginals = 0 if num_recorded else rows
    messages = rows + (per_voxel if is_implied else 0)
    record = _FLOAT * num_recorded * run.num_channels * voxels

    # Building one kernel beside those that are built, with their factors and messages of ones; normalizing takes two more.
    build = max(
        (
            sum(own.kept + 2 * per_voxel for own in held[:number]) + max(own.building, own.kept + 3 * per_voxel + own.normalizing)
            for number, own in enumerate(held)
        ),
        default=0,
    )
    arrays = marginals + messages + record
    # A run that may stop keeps every step's logits; others write them in the last step, after the kernels have been given up.
    keeps = run.tolerance > 0 or run.damping > 0 or (kernels.watches_energy and not (run.is_potts and is_implied))
    is_small = _FLOAT * run.num_labels * voxels < _FEW_BYTES
    freed_by_kernels = is_small * (num_factors * left_in_heap(per_voxel) + sum(own.in_heap for own in held))
    freed_by_building = is_small * 2 * left_in_heap(per_voxel)
    steps = arrays + in_steps + freed_by_building + (reached if keeps or num_recorded else 0)
    return MemoryEstimate(
        image=_FLOAT * num_modalities * grid_size,
        logits=_FLOAT * run.num_labels * grid_size,
        mask=0 if num_voxels is None else grid_size,
        refined=refined,
        marginals=marginals,
        messages=messages,
        kernels=factors + from_filters,
        lattice=lattices + working,
        record=record,
        other=other,
        build=build,
        beyond_inputs=other + int(_MARGIN * max(build, steps, arrays + freed_by_kernels + refined)),
    )


def _as_planned(problem: Problem, planned: PlannedFilter) -> Problem:
    """Return the sizes with those of a planned filter; eight tiles may have fewer vertices than the others."""
    return replace(problem, vertices_per_voxel=_MORE_VERTICES * planned.vertices_per_voxel, num_cells=planned.num_cells or None)


def _largest(problem: Problem, kernel: KernelSpec, filter_name: str, num_channels: int) -> FilterMemory:
    """Return the memory of a kernel's filter, the largest of those that "auto" may choose."""
    if kernel.is_spatial:
        names = ["spatial"]
    elif filter_name == "auto":
        names = ["truncated", "lattice", *(["grid"] if problem.num_modalities <= 2 else [])]
    else:
        names = [filter_name]
    return max((filter_memory(name, problem, kernel, num_channels) for name in names), key=lambda found: found.kept + found.working)
