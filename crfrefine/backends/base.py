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

    from crfrefine.config import ResolvedParameters

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

    def label_map(self, logits: NDArray[np.float32], *, threads: int | None = None) -> NDArray[np.unsignedinteger[Any]]:
        """Return the label of the largest of (L, *grid) logits at each voxel, the lowest of equals, in the smallest unsigned type."""
        ...

    def softmax(self, logits: NDArray[np.float32], *, threads: int | None = None) -> NDArray[np.float32]:
        """Return the softmax over labels of (L, *grid) logits."""
        ...

    def channel_ranges(self, channels: NDArray[np.float32], *, threads: int | None = None) -> list[Range]:
        """Return the smallest and largest value of each channel; both NaN for a channel that holds a value that is not finite."""
        ...
