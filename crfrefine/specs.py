"""The model as engines take it: the kernels that are built for an image, and the mean field that runs on them.

`CrfParameters.resolve` makes it for a case and the trainable layer makes it of its tensors; every engine takes it, and the structs of
kernels/cpu/kernel_set.h and mean_field.h mirror it. It stands below all of them, so that none has to import another. Nothing is checked
here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from crfrefine.axes import StorageOrder


@dataclass(frozen=True)
class KernelSpec:
    """A Gaussian kernel of position, or of position and intensity.

    Attributes:
        theta_position: bandwidth along each grid axis: theta_alpha of an appearance kernel, theta_gamma of the spatial one.
        theta_intensity: bandwidth of each modality, theta_beta; None: the spatial kernel, which does not look at the image.
    """

    theta_position: tuple[float, ...]
    theta_intensity: tuple[float, ...] | None = None

    @property
    def is_spatial(self) -> bool:
        """Whether the kernel looks at positions alone."""
        return self.theta_intensity is None


@dataclass(frozen=True)
class KernelSetSpec:
    """The kernels of a model, as they are built and normalized for one image.

    Attributes:
        kernels: the appearance kernels, then the spatial one if there is one.
        normalization: "symmetric", "after" or "none".
        filter: how messages of appearance kernels are computed: "auto", "exact", "truncated", "lattice" or "grid" (float32 only).
        num_labels: L of the logits to come.
        num_iterations: steps that "auto" chooses a filter for.
        positions: "mm", or "voxels": bandwidths count voxels, and the spacing is not used.
    """

    kernels: tuple[KernelSpec, ...]
    normalization: str
    filter: str
    num_labels: int
    num_iterations: int
    positions: str = "mm"

    @property
    def bilateral(self) -> tuple[KernelSpec, ...]:
        """The appearance kernels."""
        return tuple(kernel for kernel in self.kernels if not kernel.is_spatial)

    @property
    def spatial(self) -> KernelSpec | None:
        """The spatial kernel; None: there is none."""
        return next((kernel for kernel in self.kernels if kernel.is_spatial), None)

    @property
    def watches_energy(self) -> bool:
        """Whether a rise of the energy shortens the steps: D^-1 K is not symmetric, so that a rise says nothing there."""
        return self.normalization != "after"

    def distances(self, spacing: Sequence[float]) -> tuple[float, ...]:
        """Return the distance between neighboring voxels along each axis in the unit of the bandwidths: the spacing in mm, or 1."""
        return tuple(float(step) for step in spacing) if self.positions == "mm" else (1.0,) * len(spacing)

    def in_storage(self, order: StorageOrder) -> KernelSetSpec:
        """Return the kernels for a grid whose axes are in storage order."""
        kernels = (dataclasses.replace(kernel, theta_position=order.axes_to_storage(kernel.theta_position)) for kernel in self.kernels)
        return dataclasses.replace(self, kernels=tuple(kernels))


@dataclass(frozen=True, eq=False)
class MeanFieldSpec:
    """A run of the mean field on kernels that are built.

    Attributes:
        weights: (kernels, L) in the order of the kernels.
        compatibility: (L, L) penalty; row: label of the neighbor, column: own label; zero diagonal.
        num_iterations: steps, at most.
        temperature: divides the logits.
        tolerance: mean KL in nats per voxel that counts as converged; 0: all steps are taken.
        damping: share of the old log-marginals in a step.
    """

    weights: NDArray[np.floating[Any]]
    compatibility: NDArray[np.floating[Any]]
    num_iterations: int
    temperature: float = 1.0
    tolerance: float = 0.0
    damping: float = 0.0

    @property
    def num_labels(self) -> int:
        """L."""
        return len(self.compatibility)

    @cached_property
    def is_potts(self) -> bool:
        """Whether the penalty of any two different labels is 1."""
        import numpy as np

        return bool(np.array_equal(self.compatibility, 1.0 - np.eye(self.num_labels)))

    @cached_property
    def num_channels(self) -> int:
        """Of the marginals that are filtered.

        With one weight for all labels the last label's message follows from the others', as marginals sum to 1.
        """
        return self.num_labels - 1 if bool((self.weights == self.weights[:, :1]).all()) else self.num_labels

    def rounded(self, dtype: Any) -> MeanFieldSpec:
        """Return it with weights of the precision of a run, which decide `num_channels`."""
        return dataclasses.replace(self, weights=self.weights.astype(dtype))


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """The whole model for a case of given labels, modalities and axes: its kernels and its run."""

    kernels: KernelSetSpec
    mean_field: MeanFieldSpec
