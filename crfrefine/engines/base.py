"""The interface of a backend: kernels on one image, and the mean field on them.

Arrays carry no metadata; their grid axes are in storage order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from crfrefine.arrays.label_maps import Box, bounding_box
from crfrefine.base.array_types import Array, Bool, Float32, Float64, Shape
from crfrefine.errors import InputError
from crfrefine.parameters.specs import KernelSetSpec, MeanFieldSpec, ModelSpec

# The point that the features of appearance kernels count from: the index of a voxel along each grid
# axis, which may lie outside the grid, and one normalized intensity per modality. Parts of a volume
# that share an origin share the points of a lattice and the cells of a grid, so their messages
# agree away from the cut.
FeatureOrigin = tuple[tuple[int, ...], tuple[float, ...]]


@dataclass(frozen=True, eq=False)
class GridImage:
    """The image of a case, or a part of one, and where the model applies; axes in storage order."""

    # (M, *grid). Engines take normalized intensities, float32 or float64, which set the precision.
    values: Array
    mask: Bool | None  # (*grid), True where the model applies; None means everywhere
    spacing: Sequence[float]  # mm, one per grid axis
    # The user's number of each grid axis, since a lattice depends on the order of its features.
    # None means that the axes are in the user's order.
    axes: Sequence[int] | None = None
    # The origin of a part of a volume, for the C++ engine; None means `default_origin`.
    origin: FeatureOrigin | None = None
    # Data that an engine may keep for further kernels on this image, such as arrays on a GPU. None
    # means nothing.
    kept: dict[Hashable, Any] | None = field(default=None, repr=False)


def default_origin(image: GridImage) -> FeatureOrigin:
    """Return the first corner of the mask's bounding box and the lowest intensities in the mask.

    Raises InputError if the mask is empty.
    """
    where = True if image.mask is None else image.mask
    lowest = [float(values.min(where=where, initial=np.inf)) for values in image.values]
    return first_inside(image.mask, image.values.shape[1:]), tuple(lowest)


def first_inside(mask: Bool | None, shape: Shape) -> tuple[int, ...]:
    """Return the first corner of `box_inside`."""
    return tuple(side.start for side in box_inside(mask, shape))


def box_inside(mask: Bool | None, shape: Shape) -> Box:
    """Return the bounding box of a mask, (*grid), or without one the whole grid.

    Raises InputError if the mask is empty.
    """
    if mask is None:
        return tuple(slice(0, extent) for extent in shape)
    box = bounding_box(mask)
    if box is None:
        raise InputError("the mask is empty")
    return box


# A callback, called as progress(stage, step, num_steps) before each step of each stage, where
# steps count from 0. It may raise an exception to stop the computation.
Progress = Callable[[str, int, int], None]


def of_part(progress: Progress | None, number: int, count: int, what: str = "") -> Progress | None:
    """Return the callback for one part of the work, numbered from 0.

    It counts the steps of all parts, and adds `what`, such as "slab", with its number to stages.
    """
    if progress is None:
        return None
    suffix = f", {what} {number + 1} of {count}" if what else ""

    def tell(stage: str, step: int, num_steps: int) -> None:
        steps_before = number * num_steps
        progress(stage + suffix, steps_before + step, count * num_steps)

    return tell


def _add_any(num_bytes: int) -> None:
    """Let a run add any number of bytes."""


class RunContext(NamedTuple):
    """Limits on threads and memory for a run, and its callback."""

    threads: int | None = None  # CPU threads; None means the cores this process may use
    progress: Progress | None = None  # called between stages; may raise to stop
    # Bytes that a run may add to its input; None means any amount. Results depend on it where a run
    # has to do with less, and so it is not what happens to be free.
    num_bytes: int | None = None
    # Told how many bytes a run is about to add to its input, in all; may raise to stop.
    take: Callable[[int], object] = _add_any


NO_CONTEXT = RunContext()


class MeanFieldReport(NamedTuple):
    """Report of a mean-field run: one object from the engine to the user."""

    # Steps taken; 0 if the network is so certain everywhere that no step could change a label.
    num_iterations: int
    converged: bool  # True if the stopping rule was met before the last allowed step
    # Variational free energy of the marginals at the start of each step, one value per step. If
    # no step was taken, the one value is the energy of the network's probabilities.
    energy: tuple[float, ...]
    filters: tuple[str, ...] = ()  # how each kernel's messages were computed, one line per kernel


class Reported:
    """A result with a report, whose fields it offers as its own."""

    report: MeanFieldReport

    @property
    def num_iterations(self) -> int:
        """Mean-field steps taken."""
        return self.report.num_iterations

    @property
    def converged(self) -> bool:
        """True if the stopping rule was met."""
        return self.report.converged

    @property
    def energy(self) -> tuple[float, ...]:
        """Variational free energy of the marginals at the start of each step."""
        return self.report.energy

    @property
    def filters(self) -> tuple[str, ...]:
        """How each kernel's messages were computed, one line per kernel."""
        return self.report.filters


@dataclass(frozen=True)
class MeanFieldResult(Reported):
    """Result of a mean-field run."""

    # (L, *grid) float32, x of the last step; softmax(logits) are the marginals. Outside the mask
    # they are the input divided by the temperature. Of label sets: (entries, voxels of a tile).
    logits: Float32
    report: MeanFieldReport
    timings: dict[str, float] = field(default_factory=dict)  # seconds of each stage
    # (L, *grid); None unless the engine has them left over from its last step.
    marginals: Float32 | None = None


class Tape(NamedTuple):
    """State of a mean-field run, saved for the backward pass."""

    # (L, *grid), x of the last step; outside the mask the input divided by the temperature.
    logits: Array
    # (steps, channels, voxels), marginals at the start of each step; the last label's are omitted
    # where they follow from the others. With a volume term it is (steps + 1, ...), as the marginals
    # after the last step are also saved.
    record: Array
    spec: MeanFieldSpec  # the model of the run
    # (steps, L), biases of the volume term; empty without the term, or where the backward pass does
    # not read them.
    volume_biases: Sequence[Sequence[float] | Float64] = ()
    # (voxels,), True where the volume term acts; None means all masked voxels, or no term.
    volume_part: Bool | None = None


class MeanFieldGradients(NamedTuple):
    """Gradients of a loss with respect to the inputs of a mean-field run.

    Those with respect to bandwidths are zeros unless asked for. Those with respect to
    parameters may be arrays on a GPU; see `Kernels.backward`. In the engines, a name `by_x` is the
    gradient of the loss with respect to x.
    """

    logits: Array  # (L, *grid)
    image: Array | None  # (M, *grid), zero outside the mask; None unless asked for
    weights: Float64  # (kernels, L)
    theta: Float64  # `KernelSpec.theta` of each kernel, one after the other
    compatibility: Float64  # (L, L), including the diagonal
    temperature: float
    bias: Float64  # (L,), also where the run had none
    volume_weight: float | None = None  # None without a volume term


class Kernels(Protocol):
    """The kernels of a model on one image, built once, for any number of runs on them.

    Weights may differ between runs. Arrays have the precision of the image that the kernels were
    built for, float32 or float64. Calls are served one at a time; others wait.
    """

    filters: tuple[str, ...]  # how each kernel's messages are computed, one line per kernel
    spec: KernelSetSpec  # the model that they were built from
    num_voxels: int  # voxels inside the mask
    image_shape: Shape  # (M, *grid) of the image that they were built for
    dtype: str  # "float32" or "float64": precision of all arrays

    def run(
        self,
        logits: Array,
        spec: MeanFieldSpec,
        *,
        progress: Progress | None = None,
        is_last: bool = False,
    ) -> MeanFieldResult:
        """Run the mean field on (L, *grid) logits until its stopping rule is met.

        `is_last` frees the kernels before the end of the run.
        """

    def forward(self, logits: Array, spec: MeanFieldSpec) -> Tape:
        """Run all steps on (L, *grid) logits, and save the data of the backward pass."""

    def backward(
        self,
        tape: Tape,
        logits: Array,
        gradient: Array,
        *,
        wants_theta: bool = True,
        wants_image: bool = False,
        stays: bool = False,
    ) -> MeanFieldGradients:
        """Return the gradients of a loss with respect to all inputs of `forward`.

        Those with respect to bandwidths and image are computed if they are wanted. The tape is
        that of `forward` for these (L, *grid) logits; `gradient` is that of the loss with respect
        to the tape's logits. With `stays` the gradients of parameters are arrays on the device of
        the logits, for which the host does not wait; on a CPU it changes nothing. The gradient with
        respect to the volume term's weight is always a number: its steps wait anyway.
        """


class Backend(ABC):
    """One way to compute the model; all ways agree to within the accuracy of their filters."""

    name: str

    @abstractmethod
    def kernels(
        self, image: GridImage, spec: KernelSetSpec, context: RunContext = NO_CONTEXT
    ) -> Kernels:
        """Build the kernels of a model on one image, which must not change while in use."""

    def mean_field(
        self, logits: Float32, image: GridImage, model: ModelSpec, context: RunContext = NO_CONTEXT
    ) -> MeanFieldResult:
        """Build the kernels of a model for one case, and run the mean field; see `run_model`."""
        return run_model(self.kernels(image, model.kernels, context), logits, model, context)


def run_model(
    kernels: Kernels,
    logits: Float32,
    model: ModelSpec,
    context: RunContext,
    *,
    frees_kernels: bool = False,
) -> MeanFieldResult:
    """Run the mean field of a model's labels, or the binary one of each of its regions.

    The logits are (L, *grid), or the log-odds (R, *grid) of regions, whose logits are 0 outside and
    the log-odds inside. With `frees_kernels` the last run frees the kernels before its end.
    """
    if not model.regions:
        return kernels.run(
            logits, model.mean_field, progress=context.progress, is_last=frees_kernels
        )
    refined = np.empty(logits.shape, dtype=np.float32)
    binary = np.zeros((2, *logits.shape[1:]), dtype=np.float32)
    reports: list[MeanFieldReport] = []
    timings: dict[str, float] = {}
    for region, run_of_region in enumerate(model.regions):
        binary[1] = logits[region]
        progress = of_part(context.progress, region, len(model.regions))
        is_last = frees_kernels and region == len(model.regions) - 1
        outcome = kernels.run(binary, run_of_region, progress=progress, is_last=is_last)
        outside, inside = outcome.logits
        np.subtract(inside, outside, out=refined[region])
        reports.append(outcome.report)
        for stage, seconds in outcome.timings.items():
            # The kernels were built once, and each run reports that.
            earlier = 0.0 if stage == "build" else timings.get(stage, 0.0)
            timings[stage] = earlier + seconds
    # The most steps of a region, and the sum of energies, the last one where steps ended.
    num_iterations = max(report.num_iterations for report in reports)
    energies = []
    for report in reports:
        missing = num_iterations - len(report.energy)
        energies.append(report.energy + report.energy[-1:] * missing)
    energy = tuple(sum(of_step) for of_step in zip(*energies, strict=False))
    converged = all(report.converged for report in reports)
    report = MeanFieldReport(num_iterations, converged, energy, reports[0].filters)
    return MeanFieldResult(refined, report, timings)
