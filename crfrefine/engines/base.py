"""The interface of every backend: the kernels of a model on one image, the mean field on them, and a single filtering for checks.

Methods take arrays and a spec (`crfrefine.parameters.specs`). The arrays are plain numpy, channel first, C-ordered; callers bring axes into
storage order beforehand (`crfrefine.refine` does).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from crfrefine.base.array_types import Array, Bool, Float32, Float64, Labels
    from crfrefine.engines.grid_image import GridImage
    from crfrefine.parameters.specs import KernelSetSpec, MeanFieldSpec, ModelSpec

Progress = Callable[[str, int, int], None]
"""Called as progress(stage, step, num_steps) between stages of the computation; may raise to stop it."""


def of_part(progress: Progress | None, number: int, count: int, what: str = "") -> Progress | None:
    """Return a callback for a part of the work, which counts the steps of all parts, and names the part in its stages."""
    if progress is None:
        return None
    name = f", {what} {number + 1} of {count}" if what else ""

    def tell(stage: str, step: int, num_steps: int) -> None:
        progress(stage + name, number * num_steps + step, count * num_steps)

    return tell


Range = tuple[float, float]
"""Smallest and largest value."""


@dataclass(frozen=True)
class RunContext:
    """How a run is made.

    Attributes:
        threads: CPU threads; None: the cores this process may use.
        progress: called between stages; may raise to stop.
        num_bytes: called before a run on tiles of logits that are not in memory: the bytes that the run may add; None means any
            amount.
    """

    threads: int | None = None
    progress: Progress | None = None
    num_bytes: Callable[[], int | None] | None = None


NO_CONTEXT = RunContext()


@dataclass(frozen=True)
class MeanFieldReport:
    """Report of a mean-field run: one object from the engine to the user.

    Attributes:
        num_iterations: steps taken; 0 if the network is so certain everywhere that no step could change a label.
        converged: whether the stopping rule was met before the last allowed step.
        energy: variational free energy of the marginals at the start of each step, one value per step; without one, the network's.
        filters: how each kernel's messages were computed, one line per kernel.
    """

    num_iterations: int
    converged: bool
    energy: tuple[float, ...]
    filters: tuple[str, ...] = ()


class Reported:
    """Exposes the fields of a report as its own."""

    report: MeanFieldReport

    @property
    def num_iterations(self) -> int:
        """Mean-field steps taken."""
        return self.report.num_iterations

    @property
    def converged(self) -> bool:
        """Whether the stopping rule was met."""
        return self.report.converged

    @property
    def energy(self) -> tuple[float, ...]:
        """Variational free energy of the marginals at the start of each step, one value per step."""
        return self.report.energy

    @property
    def filters(self) -> tuple[str, ...]:
        """How each kernel's messages were computed, one line per kernel."""
        return self.report.filters


@dataclass(frozen=True)
class MeanFieldResult(Reported):
    """Result of a mean-field run.

    Attributes:
        logits: (L, *grid) float32, x of the last step; softmax(logits) are the marginals. Outside the mask: the input divided by the
            temperature.
        report: steps, energy and filters.
        timings: seconds of each stage.
        marginals: the same shape, where the engine has them left over from its last step; None: they are to be computed.
    """

    logits: Float32
    report: MeanFieldReport
    timings: dict[str, float] = field(default_factory=dict)
    marginals: Float32 | None = None


@dataclass(frozen=True)
class Tape:
    """State of a mean-field run, saved for the backward pass.

    Attributes:
        logits: (L, *grid), x of the last step; outside the mask the input divided by the temperature.
        record: (steps, channels, voxels), marginals at the start of each step at the masked voxels; the channel of the last label is
            omitted where it follows from the others. With a volume term (steps + 1, ...): those after the last step, too.
        spec: the model of the run.
        volume_biases: (steps, L) float64, biases of the volume term; None without the term.
        volume_part: (voxels,), voxels on which the volume term acts; None means all masked voxels, or no term.
    """

    logits: Array
    record: Array
    spec: MeanFieldSpec
    volume_biases: Float64 | None = field(default=None, kw_only=True)
    volume_part: Bool | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class MeanFieldGradients:
    """Gradients of a loss with respect to the inputs of a mean-field run.

    Attributes:
        logits: (L, *grid).
        weights: (kernels, L) float64, the spatial kernel last.
        compatibility: (L, L) float64, including the diagonal.
        temperature: number.
        bias: (L,) float64, also where the run had none.
        theta_position: (bilateral kernels, axes) float64; zeros unless asked for.
        theta_intensity: (bilateral kernels, M) float64; zeros unless asked for.
        theta_gamma: (axes,) float64; None without a spatial kernel.
        image: (M, *grid), zero outside the mask; None unless asked for.
        volume_weight: number; None without a volume term.
    """

    logits: Array
    weights: Float64
    compatibility: Float64
    temperature: float
    bias: Float64
    theta_position: Float64
    theta_intensity: Float64
    theta_gamma: Float64 | None
    image: Array | None
    volume_weight: float | None = None


class RecordingKernels(Protocol):
    """What gradients need of the kernels of a model on one image, built and normalized once.

    Arrays have the precision of the image they were built for, float32 or float64. Calls are served one at a time; others wait.
    """

    filters: tuple[str, ...]
    """How each kernel's messages are computed, one line per kernel."""
    num_kernels: int
    """The bilateral kernels, then the spatial one."""
    num_voxels: int
    """Inside the mask."""
    image_shape: tuple[int, ...]
    """(M, *grid), shape of the image they were built for."""
    dtype: str
    """"float32" or "float64": precision of that image and of all arrays."""

    def forward(self, logits: Array, spec: MeanFieldSpec) -> Tape:
        """Run the mean field on (L, *grid) logits and save the data of the backward pass; all steps are taken, the tolerance is ignored."""
        ...

    def backward(
        self, tape: Tape, logits: Array, gradient: Array, *, wants_theta: bool = True, wants_image: bool = False
    ) -> MeanFieldGradients:
        """Return the gradients of a loss with respect to all inputs of `forward` and to the bandwidths and image of the kernels.

        Args:
            tape: returned by `forward` for these logits and this run.
            logits: (L, *grid), the same as in `forward`.
            gradient: (L, *grid), gradient of the loss with respect to the tape's logits.
            spec: the run.
            wants_theta: whether to compute the gradients with respect to the bandwidths, which cost several filterings per step.
            wants_image: whether to compute the gradient with respect to the image.
        """
        ...


class Kernels(RecordingKernels, Protocol):
    """The kernels of a model on one image, built and normalized once, for any number of runs with different weights."""

    def run(self, logits: Array, spec: MeanFieldSpec, *, progress: Progress | None = None, is_last: bool = False) -> MeanFieldResult:
        """Run the mean field on (L, *grid) logits until its stopping rule is met.

        After the last run the kernels cannot be used: their memory may be free before the refined logits are written, so that both need
        not fit into memory together.
        """
        ...


class Backend(Protocol):
    """One way to compute the model; all backends agree to within the accuracy of their filters."""

    name: str

    def kernels(self, image: GridImage, spec: KernelSetSpec, context: RunContext = NO_CONTEXT) -> Kernels:
        """Build the kernels of a model on one image, which must not change while they are in use."""
        ...

    def mean_field(self, logits: Float32, image: GridImage, spec: ModelSpec, context: RunContext = NO_CONTEXT) -> MeanFieldResult:
        """Build the kernels of a model for one case and run the mean field on them: `kernels`, then their only run.

        Args:
            logits: (L, *grid), higher is better.
            image: of the case. It is released before the first step if no filter reads it again.
            spec: the model for the case's labels, modalities and axes.
            context: of the run.
        """
        ...

    def message(self, values: Float32, image: GridImage, spec: KernelSetSpec, *, threads: int | None = None) -> Float32:
        """Filter (V, *grid) values once with the only kernel of a set.

        Voxels outside the mask neither send nor receive: the result there is 0.
        """
        ...

    def label_map(self, logits: Float32, *, threads: int | None = None) -> Labels:
        """Return the label of the largest of (L, *grid) logits at each voxel, the lowest label on ties, in the smallest unsigned type."""
        ...

    def softmax(self, logits: Float32, *, threads: int | None = None, out: Float32 | None = None) -> Float32:
        """Return the softmax over labels of (L, *grid) logits, in `out` if it is given; it may be the logits."""
        ...

    def channel_ranges(self, channels: Float32, *, threads: int | None = None) -> list[Range]:
        """Return the smallest and largest value of each channel; both are NaN for a channel with a value that is not finite."""
        ...
