"""The model as engines take it, mirrored by structs in kernels/cpu: kernels built for an image, and the mean field."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from crfrefine.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


# Bandwidths at which appearance and spatial kernels end, as in the C++ engine.
REACH, SPATIAL_REACH = 3.0, 4.0
VOLUME_STRENGTH = (
    10.0  # of the volume term at the weight 1/2: most voxels are certain, so masses answer weakly
)


@dataclass(frozen=True)
class KernelSpec:
    """A Gaussian kernel of position, or of position and intensity."""

    theta_position: tuple[float, ...]  # bandwidth along each grid axis: theta_alpha or theta_gamma
    theta_intensity: tuple[float, ...] | None = (
        None  # theta_beta of each modality; None for the spatial kernel
    )


@dataclass(frozen=True)
class KernelSetSpec:
    """The kernels of a model, to be built and normalized for one image."""

    kernels: tuple[KernelSpec, ...]  # the appearance kernels, then the spatial one if there is one
    normalization: str  # "symmetric" or "after"; "none" for messages
    # How messages of appearance kernels are computed: "auto", "exact", "truncated", "lattice" or "grid" (one or two modalities).
    filter: str
    num_labels: int  # L, channels of the logits
    num_iterations: int  # number of steps that "auto" chooses a filter for
    positions: str = "mm"  # unit of the bandwidths: "mm", "voxels" of the grid, or "network": voxels of the network
    network_spacing: tuple[float, ...] | None = (
        None  # mm between voxels of the network along each grid axis; None means unknown
    )

    @property
    def bilateral(self) -> tuple[KernelSpec, ...]:
        """The appearance kernels."""
        return tuple(kernel for kernel in self.kernels if kernel.theta_intensity is not None)

    @property
    def spatial(self) -> KernelSpec | None:
        """The spatial kernel; None without one."""
        return next((kernel for kernel in self.kernels if kernel.theta_intensity is None), None)

    @property
    def names(self) -> tuple[str, ...]:
        """What reports call the kernels."""
        return tuple(
            "spatial" if kernel.theta_intensity is None else f"bilateral.{number}"
            for number, kernel in enumerate(self.kernels)
        )

    def distances(self, spacing: Sequence[float]) -> tuple[float, ...]:
        """Return the distance between neighbors along each axis in the unit of the bandwidths; raise ConfigError if that is unknown."""
        if self.positions == "voxels":
            return (1.0,) * len(spacing)
        if self.positions == "mm":
            return tuple(float(step) for step in spacing)
        if self.network_spacing is None:
            raise ConfigError(
                "mean_field.positions: 'network' counts bandwidths in voxels of the network that made a label map; expected their size: "
                "--input-type labels --network-spacing MM, in Python input_type='labels' and network_spacing=..."
            )
        return tuple(
            float(step) / wide for step, wide in zip(spacing, self.network_spacing, strict=True)
        )

    def reach(self, spacing: Sequence[float], shape: Sequence[int]) -> tuple[int, ...]:
        """Return the voxels along each axis after which every kernel ends, or the grid: nothing is farther, however wide a kernel is."""
        # The shape may begin with further axes, along which nothing is within reach.
        num_further = len(shape) - len(spacing)
        reach = [0] * num_further
        scales = [
            (SPATIAL_REACH if kernel.theta_intensity is None else REACH, kernel.theta_position)
            for kernel in self.kernels
        ]
        for axis, (step, extent) in enumerate(
            zip(self.distances(spacing), shape[num_further:], strict=True)
        ):
            widths = [scale * theta[axis] / step for scale, theta in scales]
            reach.append(math.ceil(min(max(widths, default=0.0), extent - 1)))
        return tuple(reach)


@dataclass(frozen=True, eq=False)
class MeanFieldSpec:
    """A run of the mean field on built kernels."""

    weights: NDArray[np.floating[Any]]  # (kernels, L) in the order of the kernels
    compatibility: NDArray[
        np.floating[Any]
    ]  # (L, L) penalty; row: label of the neighbor, column: own label; zero diagonal
    num_iterations: int  # maximum number of steps
    temperature: float = 1.0  # divides the logits
    tolerance: float = (
        0.0  # mean KL in nats per voxel below which the run has converged; 0: all steps are taken
    )
    bias: NDArray[np.floating[Any]] | None = (
        None  # (L,), added to the logits inside the mask before the temperature divides them
    )
    volume_weight: float = (
        0.0  # from 0, no volume term, to 1, every step keeps the mass of each label
    )

    @property
    def num_labels(self) -> int:
        """L."""
        return len(self.compatibility)

    @property
    def volume_slack(self) -> float:
        """Inverse strength of the volume term: infinity without the term, 0 if masses are kept exactly."""
        return (
            math.inf
            if self.volume_weight == 0.0
            else (1.0 - self.volume_weight) / (VOLUME_STRENGTH * self.volume_weight)
        )

    def volume_weight_gradient(self, by_slack: float) -> float | None:
        """Turn the gradient with respect to the slack into that with respect to the weight; None without the term."""
        return (
            None
            if self.volume_weight == 0.0
            else -by_slack / (VOLUME_STRENGTH * self.volume_weight**2)
        )

    @cached_property
    def is_potts(self) -> bool:
        """Whether the penalty of any two different labels is 1."""
        import numpy as np

        # No second matrix: with thousands of labels it would be large.
        num_labels = len(self.compatibility)
        others = num_labels * (num_labels - 1)
        return (
            not np.diagonal(self.compatibility).any()
            and int(np.count_nonzero(self.compatibility == 1.0)) == others
        )

    @cached_property
    def num_channels(self) -> int:
        """Channels that are filtered: if each kernel has one weight for all labels, the last label's message follows from the others'."""
        return len(self.compatibility) - bool((self.weights == self.weights[:, :1]).all())

    def require_known(self, known: Collection[str], device: str) -> None:
        """Raise ConfigError if a field that the engine of a device does not know has another value than its default."""
        for entry in dataclasses.fields(self):
            if entry.name not in known and getattr(self, entry.name) != entry.default:
                raise ConfigError(
                    f"{entry.name}: --device {device} has {entry.default} only; use --device cpu"
                )

    def rounded(self, dtype: Any) -> MeanFieldSpec:
        """Return the spec with weights in the precision of a run, which determine `num_channels`."""
        return dataclasses.replace(self, weights=self.weights.astype(dtype))


def own_fields(
    spec: type[KernelSetSpec] | type[MeanFieldSpec], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings that go to the fields of the same name: those of `[mean_field]` are for the kernels, for the run, or both."""
    return {
        entry.name: settings[entry.name]
        for entry in dataclasses.fields(spec)
        if entry.name in settings
    }


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """The whole model for a case with given labels, modalities and axes: its kernels and its run."""

    kernels: KernelSetSpec
    mean_field: MeanFieldSpec
