"""The model as engines take it: kernels to build for an image, and a run of the mean field.

Structs in kernels/cpu mirror it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from crfrefine.base.axes import Axes
from crfrefine.base.numerics import RADIUS_MARGIN
from crfrefine.errors import ConfigError
from crfrefine.parameters.sections import KERNELS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


# Strength of the volume term at the weight 1/2. Masses react weakly, as most voxels are certain.
VOLUME_STRENGTH = 10.0


class KernelSpec(NamedTuple):
    """A kernel of position, or of position and intensity."""

    kind: str  # the name of its table in a parameter file
    theta_position: tuple[float, ...]  # bandwidth along each grid axis
    theta_intensity: tuple[float, ...] = ()  # of each modality; none in a kernel of position

    @property
    def theta(self) -> tuple[float, ...]:
        """All bandwidths, those of intensity first: the order of the features."""
        return (*self.theta_intensity, *self.theta_position)


def kernel_names(kinds: Sequence[str]) -> tuple[str, ...]:
    """Return the names of kernels in reports: their kinds, and the numbers of appearance kernels.

    There may be several of these, and they are the first ones.
    """
    names = []
    for number, kind in enumerate(kinds):
        names.append(f"bilateral.{number}" if kind == "bilateral" else kind)
    return tuple(names)


@dataclass(frozen=True)
class KernelSetSpec:
    """The kernels of a model, to be built and normalized for one image."""

    kernels: tuple[KernelSpec, ...]  # in the order of their tables in a parameter file
    normalization: str  # "symmetric" or "after"; "none" for messages
    # How messages of appearance kernels are computed: "auto", "exact", "truncated", "lattice" or
    # "grid" (one or two modalities, on a CPU).
    filter: str
    # Numbers of labels and of steps that "auto" chooses a filter for: those of the whole model. A
    # run may have fewer labels.
    num_labels: int
    num_iterations: int
    # Unit of the bandwidths: "mm", "voxels" of the grid, or "network": voxels of the network.
    positions: str = "mm"
    # mm between voxels of the network along each grid axis; None means unknown.
    network_spacing: tuple[float, ...] | None = None

    @property
    def bilateral(self) -> tuple[KernelSpec, ...]:
        """The appearance kernels."""
        return tuple(kernel for kernel in self.kernels if kernel.kind == "bilateral")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the kernels in reports."""
        return kernel_names([kernel.kind for kernel in self.kernels])

    def in_order(self, order: Axes) -> KernelSetSpec:
        """Return the kernels for a grid with its axes in an order."""
        kernels = []
        for kernel in self.kernels:
            kernels.append(kernel._replace(theta_position=order.along(kernel.theta_position)))
        steps = self.network_spacing
        if steps is not None:
            steps = order.along(steps)
        return dataclasses.replace(self, kernels=tuple(kernels), network_spacing=steps)

    def distances(self, spacing: Sequence[float]) -> tuple[float, ...]:
        """Return the distance between neighbors along each axis in the unit of the bandwidths.

        Raises ConfigError if the unit is unknown.
        """
        if self.positions == "voxels":
            return (1.0,) * len(spacing)
        if self.positions == "mm":
            return tuple(float(step) for step in spacing)
        if self.network_spacing is None:
            raise ConfigError(
                "mean_field.positions: 'network' counts bandwidths in voxels of the network that "
                "made a label map; expected their size: --input-type labels --network-spacing MM, "
                "in Python input_type='labels' and network_spacing=..."
            )
        steps = zip(spacing, self.network_spacing, strict=True)
        return tuple(float(step) / network_step for step, network_step in steps)

    def widths(self, spacing: Sequence[float]) -> list[list[float]]:
        """Return the bandwidth of each kernel along each axis in voxels."""
        steps = self.distances(spacing)
        widths = []
        for kernel in self.kernels:
            thetas = zip(kernel.theta_position, steps, strict=True)
            widths.append([theta / step for theta, step in thetas])
        return widths

    def reach(self, spacing: Sequence[float], shape: Sequence[int]) -> tuple[int, ...]:
        """Return the voxels along each axis after which every kernel ends, or the grid does.

        The shape may begin with further axes, along which nothing is within reach.
        """
        num_further = len(shape) - len(spacing)
        reach = [0] * len(shape)
        for kernel, widths in zip(self.kernels, self.widths(spacing), strict=True):
            for axis, width in enumerate(widths, start=num_further):
                # A kernel that ends at a voxel does not reach the next one, however that was
                # rounded.
                end = KERNELS[kernel.kind].reach * width * (1.0 - RADIUS_MARGIN)
                reach[axis] = max(reach[axis], math.ceil(min(end, shape[axis] - 1)))
        return tuple(reach)


@dataclass(frozen=True, eq=False)
class MeanFieldSpec:
    """A run of the mean field on built kernels."""

    weights: NDArray[np.floating[Any]]  # (kernels, L) in the order of the kernels
    # (L, L) penalty; row: label of the neighbor, column: own label; zero diagonal.
    compatibility: NDArray[np.floating[Any]]
    num_iterations: int  # maximum number of steps
    temperature: float = 1.0  # divides the logits
    # Mean KL in nats per voxel below which the run has converged; 0: all steps are taken.
    tolerance: float = 0.0
    # (L,), added to the logits inside the mask before the temperature divides them.
    bias: NDArray[np.floating[Any]] | None = None
    # From 0, no volume term, to 1, every step keeps the mass of each label.
    volume_weight: float = 0.0

    # Values that follow from these fields; engines read it by its name, too.
    num_labels: int = field(init=False)  # L
    is_potts: bool = field(init=False)  # whether the penalty of any two different labels is 1
    # The number of channels that are filtered. If each kernel has one weight for all labels, the
    # last label's message follows from the others', and is not filtered.
    num_channels: int = field(init=False)
    # Inverse strength of the volume term: infinity without it, 0 if it is exact.
    volume_slack: float = field(init=False)

    def __post_init__(self) -> None:
        import numpy as np  # `--help` does without; with arrays it is imported already.

        num_labels = len(self.compatibility)
        # Ones are counted: a matrix to compare with would be large for thousands of labels, and the
        # sum of theirs takes five times as long.
        num_ones = int(np.count_nonzero(self.compatibility == 1.0))
        is_potts = num_ones == num_labels * (num_labels - 1)
        has_equal_weights = bool((self.weights == self.weights[:, :1]).all())
        volume_slack = math.inf
        if self.volume_weight != 0.0:
            volume_slack = (1.0 - self.volume_weight) / (VOLUME_STRENGTH * self.volume_weight)
        object.__setattr__(self, "num_labels", num_labels)
        object.__setattr__(self, "is_potts", is_potts and not self.compatibility.diagonal().any())
        object.__setattr__(self, "num_channels", num_labels - has_equal_weights)
        object.__setattr__(self, "volume_slack", volume_slack)

    def volume_weight_gradient(self, by_slack: float) -> float | None:
        """Return the gradient by the volume weight from that by `volume_slack`; None without it."""
        if self.volume_weight == 0.0:
            return None
        return -by_slack / (VOLUME_STRENGTH * self.volume_weight**2)

    @property
    def num_recorded(self) -> int:
        """Sets of marginals on a tape: one per step, and with a volume term those at the end."""
        return self.num_iterations + int(self.volume_weight > 0.0)

    def require_known(self, known: Collection[str], device: str) -> None:
        """Raise ConfigError if a field has another value than its default, unless it is `known`.

        `known` are the names of the fields that the engine of the device supports.
        """
        for entry in dataclasses.fields(self):
            is_asked = entry.init and entry.name not in known
            if is_asked and getattr(self, entry.name) != entry.default:
                raise ConfigError(
                    f"{entry.name}: --device {device} has {entry.default} only; use --device cpu"
                )

    def rounded(self, dtype: Any) -> MeanFieldSpec:
        """Return the spec with weights rounded as in a run: `num_channels` compares them."""
        return dataclasses.replace(self, weights=self.weights.astype(dtype))


def own_fields(
    spec: type[KernelSetSpec] | type[MeanFieldSpec], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings that are fields of a spec; some of `[mean_field]` are for both specs."""
    names = {entry.name for entry in dataclasses.fields(spec)}
    return {name: value for name, value in settings.items() if name in names}


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """The whole model of a case with its labels, modalities and axes: kernels and run."""

    kernels: KernelSetSpec
    mean_field: MeanFieldSpec  # of labels, or of the first region
    # The run of each region, on the same kernels; empty if channels are labels.
    regions: tuple[MeanFieldSpec, ...] = ()
