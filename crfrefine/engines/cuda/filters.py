"""The common part of the GPU engine's filters; its direct sums, over all pairs or the pairs of a window; and its spatial kernel."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from crfrefine.base.array_types import Float64
from crfrefine.engines.cuda.rows import Room, row_constants
from crfrefine.engines.cuda.voxels import BilateralInput, Voxels
from crfrefine.errors import CapacityError

TRUNCATION_RADIUS, SPATIAL_RADIUS = 3.0, 4.0  # standard deviations: of a window, and up to which a spatial tap counts in full
ROUNDING = 1e-6  # relative tolerance: voxels on the window's surface belong to it
_MAX_OFFSETS = 1 << 27
_HALF_LOG2E = 0.5 * math.log2(math.e)  # exp(-d^2 / 2) = 2^-(d^2 times this)


class Filter(ABC):
    """A symmetric kernel that can be applied to rows of channels at the voxels."""

    description: str

    def accumulate(
        self, values: Any, sent: Any, received: Any, channel_weight: Any, total: Any, *, transposed: bool = False, adds: bool = True
    ) -> None:
        """Total += channel_weight * received * K (sent * values).

        Args:
            values: (group, voxel, width), float32, on the device, like all arrays.
            sent: (voxel) factors, or None for ones.
            received: likewise.
            channel_weight: (group, width).
            total: like `values`; the result is added to it.
            adds: False: the result replaces the content of `total`.
            transposed: apply the transpose of K, which differs from K only for the lattice.
        """
        for group, weight, out in zip(values, channel_weight, total, strict=True):
            self._add(group, sent, (received, weight, out, int(adds)), transposed=transposed)

    @abstractmethod
    def _add(self, group: Any, sent: Any, to: tuple[Any, ...], *, transposed: bool) -> None:
        """Filter a group of channels, (voxel, width); `to` has a kernel's last arguments: received, channel_weight, total, adds."""


class ExactFilter(Filter):
    """All pairs of voxels; see `Filter`."""

    def __init__(self, bilateral: BilateralInput) -> None:
        """Take the features."""
        self._device = bilateral.voxels.device
        self._features = bilateral.features * math.sqrt(_HALF_LOG2E)
        self.description = f"exact (all {bilateral.voxels.num_voxels} x N pairs)"

    def _add(self, group: Any, sent: Any, to: tuple[Any, ...], *, transposed: bool) -> None:
        constants = {"CRF_FEATURES": len(self._features), **row_constants(group)}
        self._device.launch("direct", "filter_all_pairs", constants, len(group), self._features, len(group), group, sent, *to)


def window_radius(bilateral: BilateralInput) -> list[int]:
    """Voxels on either side along each box axis; compared as floating point, since a huge bandwidth overflows any integer."""
    voxels = bilateral.voxels
    return [
        int(min(TRUNCATION_RADIUS * theta / step * (1.0 + ROUNDING), extent - 1))
        for theta, step, extent in zip(bilateral.theta_position, voxels.spacing, voxels.box_shape, strict=True)
    ]


class TruncatedFilter(Filter):
    """The pairs of voxels up to three theta_alpha apart; see `Filter`."""

    def __init__(self, bilateral: BilateralInput) -> None:
        """List the window, and number the voxels in a box with padding to look beyond its faces.

        Raises:
            CapacityError: the window is too large.
        """
        voxels, radius = bilateral.voxels, window_radius(bilateral)
        num_offsets = math.prod(2 * r + 1 for r in radius)
        if num_offsets > _MAX_OFFSETS:
            raise CapacityError(
                f"a truncated sum with theta_alpha {bilateral.theta_position} visits up to {num_offsets:.2g} neighbors of each voxel; "
                "use smaller bandwidths, or mean_field.filter = lattice"
            )
        # Padding as wide as the window's radius follows each row, plane, ...: it also precedes the next one.
        padded = [extent + r for extent, r in zip(voxels.box_shape, radius, strict=True)]
        strides = [math.prod(padded[a + 1 :]) for a in range(len(padded))]
        lead = sum(r * stride for r, stride in zip(radius, strides, strict=True))
        self._device, xp = voxels.device, voxels.device.xp
        self._features = bilateral.features[: len(bilateral.theta_intensity)] * math.sqrt(_HALF_LOG2E)
        self._index = voxels.linear_index(padded) + lead
        self._number = xp.full(math.prod(padded) + 2 * lead, -1, dtype=np.int32)
        self._number[self._index] = xp.arange(voxels.num_voxels, dtype=np.int32)
        # Linear distances of the window's voxels in ascending order, the voxel itself among them, and minus log2 of their weights.
        squared: Any = np.zeros(())
        linear: Any = np.zeros((), dtype=np.int64)
        for theta, step, r, stride in zip(bilateral.theta_position, voxels.spacing, radius, strides, strict=True):
            distance = np.arange(-r, r + 1)
            squared = squared[..., None] + (distance * (step / theta)) ** 2
            linear = linear[..., None] + distance * stride
        inside = squared <= TRUNCATION_RADIUS**2 * (1.0 + ROUNDING)
        offsets, distances = linear[inside], (_HALF_LOG2E * squared[inside]).astype(np.float32)
        self._neighbors = (self._device.upload(offsets), self._device.upload(distances), len(offsets))
        self.description = f"truncated ({len(offsets) // 2} pairs per voxel)"

    def _add(self, group: Any, sent: Any, to: tuple[Any, ...], *, transposed: bool) -> None:
        constants = {"CRF_FEATURES": len(self._features), **row_constants(group)}
        window = (self._features, len(group), self._number, self._index, *self._neighbors)
        self._device.launch("direct", "filter_window", constants, len(group), *window, group, sent, *to)


def spatial_taps(sigma: float, extent: int, radius: float) -> tuple[Float64, Float64]:
    """Weights of the spatial kernel at distance 0, 1, ... along an axis, and theta_gamma times their derivatives with respect to it.

    Within one voxel beyond `radius` standard deviations the Gaussian fades to zero, so that no weight jumps when another voxel comes
    within reach (docs/reference/math.md). `sigma` is in voxels; the axis has `extent` voxels.
    """
    reach = min(radius * sigma, 1e18)
    distance = np.arange(int(min(math.ceil(reach), extent - 1)) + 1)
    squared = (distance / sigma) ** 2
    gaussian = np.exp(-0.5 * squared)
    x = np.clip(reach + 1.0 - distance, 0.0, 1.0)
    fade = x * x * (3.0 - 2.0 * x)
    return gaussian * fade, gaussian * (squared * fade + 6.0 * x * (1.0 - x) * reach)


class SpatialFilter(Filter):
    """The spatial kernel, axis by axis; see `Filter`."""

    def __init__(self, voxels: Voxels, theta_gamma: Sequence[float], *, slope_of: int | None = None, boxes: Room | None = None) -> None:
        """Compute the taps for one theta_gamma per box axis.

        Along the axis `slope_of`, they are theta_gamma times the derivatives with respect to that axis's theta_gamma. None means
        the kernel itself. `boxes` is memory of another filter, as only one filters at a time.
        """
        self._voxels, self._device, self._theta_gamma = voxels, voxels.device, theta_gamma
        self._axes: list[tuple[int, int, Any, int]] = []
        for a, (theta, step, extent) in enumerate(zip(theta_gamma, voxels.spacing, voxels.box_shape, strict=True)):
            weights, slopes = spatial_taps(theta / step, extent, SPATIAL_RADIUS)
            taps = (slopes if a == slope_of else weights).astype(np.float32)
            self._axes.append((math.prod(voxels.box_shape[a + 1 :]), extent, self._device.upload(taps), len(taps) - 1))
        self._boxes = Room(self._device.xp) if boxes is None else boxes
        self.description = "separable"

    def slopes(self) -> list[SpatialFilter]:
        """Return the filters of the derivatives with respect to theta_gamma of each axis."""
        axes = range(len(self._axes))
        return [SpatialFilter(self._voxels, self._theta_gamma, slope_of=axis, boxes=self._boxes) for axis in axes]

    def _add(self, group: Any, sent: Any, to: tuple[Any, ...], *, transposed: bool) -> None:
        voxels, constants, last = self._voxels, row_constants(group), len(self._axes) - 1
        box, other = self._boxes.array(2, voxels.box_size, group.shape[1])
        for place, axis in enumerate(reversed(self._axes)):
            given = (group, sent, None) if place == 0 else (None, None, box)
            out = (other, None, None, None, 0) if place < last else (None, *to)
            arguments = (voxels.number, voxels.box_size, *given, *axis, *out)
            self._device.launch("spatial", "filter_axis", constants, voxels.box_size, *arguments)
            box, other = other, box
