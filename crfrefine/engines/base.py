"""What every backend offers: the mean field of one case, and a single filtering for checks.

The arrays are plain numpy, channel first, C-ordered; callers permute axes beforehand (`crfrefine.refine` does).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from crfrefine.parameters.model import ResolvedParameters

Progress = Callable[[str, int, int], None]
"""Called as progress(stage, step, num_steps) between stages of the computation; may raise to stop it."""

Range = tuple[float, float]
"""Smallest and largest value."""


@dataclass(frozen=True)
class MeanFieldResult:
    """What a mean-field run returns.

    Attributes:
        logits: (L, *grid) float32, x of the last step; softmax(logits) are the marginals. Outside the mask: the input over the temperature.
        num_iterations: steps taken.
        converged: whether the stopping rule was met before the last allowed step.
        energy: the variational free energy of the marginals that each step started from, one value a step.
        filters: how each kernel's messages were computed, one line a kernel.
        timings: seconds of each stage.
    """

    logits: NDArray[np.float32]
    num_iterations: int
    converged: bool
    energy: tuple[float, ...]
    filters: tuple[str, ...] = ()
    timings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Tape:
    """What a mean-field run leaves for the way back.

    Attributes:
        logits: (L, *grid), x of the last step; outside the mask the input over the temperature.
        record: (steps, channels, voxels), the marginals that each step started from at the masked voxels; the last label's channel is left
            out where it follows from the others'.
        steps: the length of each step: 1 - damping, less where the energy rose.
    """

    logits: NDArray[Any]
    record: NDArray[Any]
    steps: tuple[float, ...]


@dataclass(frozen=True)
class MeanFieldGradients:
    """Partial derivatives of a loss by what a mean-field run was given.

    Attributes:
        logits: (L, *grid).
        weights: (kernels, L) float64, the spatial kernel last.
        compatibility: (L, L) float64, the diagonal too.
        temperature: number.
        theta_alpha: (bilateral kernels, axes) float64; zeros unless asked for.
        theta_beta: (bilateral kernels, M) float64; zeros unless asked for.
        theta_gamma: (axes,) float64; None without a spatial kernel.
        image: (M, *grid), zero outside the mask; None unless asked for.
    """

    logits: NDArray[Any]
    weights: NDArray[np.float64]
    compatibility: NDArray[np.float64]
    temperature: float
    theta_alpha: NDArray[np.float64]
    theta_beta: NDArray[np.float64]
    theta_gamma: NDArray[np.float64] | None
    image: NDArray[Any] | None


class Kernels(Protocol):
    """The kernels of a model on one image, built and normalized once, for any number of runs with other weights.

    Arrays have the precision of the image they were built for, float32 or float64. One call at a time is served; others wait.
    """

    filters: tuple[str, ...]
    """How each kernel's messages are computed, one line a kernel."""
    num_kernels: int
    """The bilateral ones, then the spatial one."""
    num_voxels: int
    """Inside the mask."""
    image_shape: tuple[int, ...]
    """(M, *grid) of the image they were built for."""
    dtype: str
    """"float32" or "float64": of that image, and of all arrays."""

    def forward(
        self,
        logits: NDArray[Any],
        *,
        weights: NDArray[Any],
        compatibility: NDArray[Any],
        temperature: float,
        num_iterations: int,
        damping: float = 0.0,
    ) -> Tape:
        """Run the mean field and keep what the way back needs.

        Args:
            logits: (L, *grid), higher is better.
            weights: (kernels, L).
            compatibility: (L, L) penalty, zero diagonal; row: label of the neighbor, column: own label.
            temperature: divides the logits.
            num_iterations: steps, all of which are taken.
            damping: share of the old log-marginals in a step.
        """
        ...

    def backward(
        self,
        tape: Tape,
        logits: NDArray[Any],
        gradient: NDArray[Any],
        *,
        weights: NDArray[Any],
        compatibility: NDArray[Any],
        temperature: float,
        damping: float = 0.0,
        wants_theta: bool = True,
        wants_image: bool = False,
    ) -> MeanFieldGradients:
        """Return the derivatives of a loss by everything that went into `forward`, and by the kernels' bandwidths and image.

        Args:
            tape: what `forward` returned, for these logits, weights, compatibility, temperature and damping.
            logits: (L, *grid), as they were.
            gradient: (L, *grid), derivative of the loss by the tape's logits.
            weights: (kernels, L).
            compatibility: (L, L).
            temperature: divides the logits.
            damping: share of the old log-marginals in a step.
            wants_theta: whether to compute the derivatives by the bandwidths, which cost several filterings a step.
            wants_image: whether to compute that by the image.
        """
        ...


class Backend(Protocol):
    """One way to compute the model; all of them give the same answer to within their filters' accuracy."""

    name: str

    def mean_field(
        self,
        logits: NDArray[np.float32],
        image: NDArray[np.float32],
        mask: NDArray[np.bool_] | None,
        spacing: Sequence[float],
        parameters: ResolvedParameters,
        *,
        axes: Sequence[int] | None = None,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> MeanFieldResult:
        """Run the mean field on one case.

        Args:
            logits: (L, *grid), higher is better.
            image: (M, *grid), normalized intensity.
            mask: (*grid), True where the model applies; None: everywhere.
            spacing: mm, one a grid axis.
            parameters: broadcast to the case's labels, modalities and axes.
            axes: the number that each grid axis has for the user, where the arrays are transposed views of the user's: a lattice's cells
                depend on the order of its features, and must not depend on the order of memory. None: as they are.
            threads: number of threads; None: the cores this process may use.
            progress: called between stages.
        """
        ...

    def message(
        self,
        values: NDArray[np.float32],
        image: NDArray[np.float32] | None,
        mask: NDArray[np.bool_] | None,
        spacing: Sequence[float],
        *,
        theta_alpha: Sequence[float],
        theta_beta: Sequence[float] | None,
        normalization: str = "none",
        filter: str = "exact",  # noqa: A002 - the parameter's name in the configuration
        threads: int | None = None,
    ) -> NDArray[np.float32]:
        """Filter (V, *grid) values once with the bilateral kernel, or with the spatial one where `theta_beta` is None.

        Voxels outside the mask neither send nor receive: the result there is 0.
        """
        ...

    def kernels(
        self,
        image: NDArray[Any],
        mask: NDArray[np.bool_] | None,
        spacing: Sequence[float],
        *,
        bilateral: Sequence[tuple[Sequence[float], Sequence[float]]],
        theta_gamma: Sequence[float] | None,
        normalization: str,
        filter: str,  # noqa: A002 - the parameter's name in the configuration
        num_labels: int,
        num_iterations: int,
        threads: int | None = None,
    ) -> Kernels:
        """Build the kernels of a model on one image, to run forth and back.

        Args:
            image: (M, *grid) float32 or float64, normalized; it decides the precision and must not change while the kernels are in use.
            mask: (*grid), True where the model applies; None: everywhere.
            spacing: distance between neighboring voxels along each axis, in the unit of the bandwidths.
            bilateral: (theta_alpha, theta_beta) of each bilateral kernel: one value a grid axis, one a modality.
            theta_gamma: of the spatial kernel, one value a grid axis; None: no such kernel.
            normalization: "symmetric", "after" or "none".
            filter: "auto", "exact", "truncated", "lattice" or "grid" (float32 only).
            num_labels: labels of the logits to come.
            num_iterations: steps that `auto` chooses a filter for.
            threads: number of threads; None: the cores this process may use.
        """
        ...

    def label_map(self, logits: NDArray[np.float32], *, threads: int | None = None) -> NDArray[np.unsignedinteger[Any]]:
        """Return the label of the largest of (L, *grid) logits at each voxel, the lowest of equals, in the smallest unsigned type."""
        ...

    def softmax(self, logits: NDArray[np.float32], *, threads: int | None = None) -> NDArray[np.float32]:
        """Return the softmax over labels of (L, *grid) logits."""
        ...

    def channel_ranges(self, channels: NDArray[np.float32], *, threads: int | None = None) -> list[Range]:
        """Return the smallest and largest value of each channel; both NaN for a channel that holds a value that is not finite."""
        ...
