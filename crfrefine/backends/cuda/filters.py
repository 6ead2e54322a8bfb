"""What the GPU engine's filters have in common, and its direct sums: all pairs, or the pairs of a window."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np

from crfrefine.backends.cuda.device import Device, check_memory, precision, row_constants
from crfrefine.backends.cuda.voxels import BilateralInput, Voxels
from crfrefine.errors import CapacityError

TRUNCATION_RADIUS = 3.0
"""Standard deviations of the spatial part of the kernel."""
_ROUNDING = 1e-6  # relative: voxels on the window's surface belong to it
_MOST_OFFSETS = 1 << 27
_LOG2E = 1.4426950408889634  # exp(x) = 2^(x log2 e)
_HALF_EXPONENT = math.sqrt(0.5 * _LOG2E)  # exp(-d^2 / 2) = 2^-(d * this)^2


class Filter(Protocol):
    """A symmetric kernel that can be applied to rows of channels at the voxels."""

    description: str

    def accumulate(self, values: Any, sent: Any, received: Any, channel_weight: Any, total: Any, *, transposed: bool = False) -> None:
        """Total += channel_weight * received * K (sent * values).

        Args:
            values: (group, voxel, width), on the device, as all arrays, and all of one type: float32 or float64.
            sent: (voxel) factors, or None for ones.
            received: the same.
            channel_weight: (group, width).
            total: as `values`; added to.
            transposed: apply the transpose of K, which differs only for the lattice.
        """
        ...


class ExactFilter:
    """All pairs of voxels; see `Filter`."""

    def __init__(self, bilateral: BilateralInput) -> None:
        """Take the features."""
        self._device = bilateral.voxels.device
        self._features = bilateral.features * _HALF_EXPONENT
        self._constants = {"CRF_FEATURES": bilateral.num_features}
        self.description = f"exact (all {bilateral.voxels.num_voxels} x N pairs)"

    def accumulate(self, values: Any, sent: Any, received: Any, channel_weight: Any, total: Any, *, transposed: bool = False) -> None:
        """Add a filtering; see `Filter.accumulate`."""
        num_voxels = values.shape[1]
        for group, weight, out in zip(values, channel_weight, total, strict=True):
            self._device.launch(
                "direct",
                "filter_all_pairs",
                {**self._constants, **row_constants(values)},
                num_voxels,
                self._features,
                num_voxels,
                group,
                sent,
                received,
                weight,
                out,
            )


def window_radius(bilateral: BilateralInput) -> list[int]:
    """Voxels on either side along each box axis; compared as floating point, since a huge bandwidth fits into no integer."""
    voxels = bilateral.voxels
    return [
        int(min(TRUNCATION_RADIUS * theta / step * (1.0 + _ROUNDING), extent - 1))
        for theta, step, extent in zip(bilateral.theta_alpha, voxels.spacing, voxels.box_shape, strict=True)
    ]


class TruncatedFilter:
    """The pairs of voxels up to three theta_alpha apart; see `Filter`."""

    def __init__(self, bilateral: BilateralInput) -> None:
        """List the window and pad the intensities.

        Raises:
            CapacityError: the window or the padded box is too large.
        """
        voxels = bilateral.voxels
        self._device: Device = voxels.device
        radius = window_radius(bilateral)
        num_offsets = math.prod(2 * r + 1 for r in radius)
        if num_offsets > _MOST_OFFSETS:
            raise CapacityError(
                f"a truncated sum with theta_alpha {bilateral.theta_alpha} visits up to {num_offsets:.2g} neighbors of each voxel; "
                "use smaller bandwidths, or mean_field.filter = lattice"
            )
        # Behind each row, plane, ... lies padding as wide as the window's radius: it is in front of the next one too.
        padded = [extent + r for extent, r in zip(voxels.box_shape, radius, strict=True)]
        strides = [math.prod(padded[a + 1 :]) for a in range(len(padded))]
        lead = sum(r * stride for r, stride in zip(radius, strides, strict=True))
        self._size = math.prod(padded) + 2 * lead
        num_modalities = len(bilateral.theta_beta)
        dtype = bilateral.features.dtype
        check_memory(self._device, float(dtype.itemsize) * self._size * (num_modalities + 8), "the padded box of a truncated sum")
        offsets, exponents = _window(bilateral, radius, strides)
        self._num_offsets = len(offsets)
        self._offsets, self._exponents = self._device.upload(offsets), self._device.upload(exponents)
        self._index = voxels.linear_index(padded) + lead
        self._intensity = self._device.xp.zeros((num_modalities, self._size), dtype=dtype)
        self._constants = {"CRF_FEATURES": num_modalities}
        self._device.launch(
            "direct",
            "pad_intensities",
            {**self._constants, "CRF_WIDTH": 1, **precision(dtype)},
            voxels.num_voxels,
            bilateral.features,
            voxels.num_voxels,
            self._index,
            self._size,
            _HALF_EXPONENT,
            self._intensity,
        )
        self._padded: dict[int, Any] = {}
        self.description = f"truncated ({self._num_offsets // 2} pairs a voxel)"

    def accumulate(self, values: Any, sent: Any, received: Any, channel_weight: Any, total: Any, *, transposed: bool = False) -> None:
        """Add a filtering; see `Filter.accumulate`."""
        _, num_voxels, width = values.shape
        constants = {**self._constants, **row_constants(values)}
        if width not in self._padded:
            self._padded[width] = self._device.xp.zeros((self._size, width), dtype=values.dtype)
        padded = self._padded[width]
        for group, weight, out in zip(values, channel_weight, total, strict=True):
            self._device.launch("direct", "pad_values", constants, num_voxels, group, sent, num_voxels, self._index, padded)
            self._device.launch(
                "direct",
                "filter_window",
                constants,
                num_voxels,
                self._intensity,
                self._size,
                self._index,
                num_voxels,
                self._offsets,
                self._exponents,
                self._num_offsets,
                padded,
                received,
                weight,
                out,
            )


def _window(bilateral: BilateralInput, radius: list[int], strides: list[int]) -> tuple[Any, Any]:
    """Linear distances of the window's voxels in ascending order, the voxel itself among them, and the logarithms of their weights."""
    squared: Any = np.zeros(())
    linear: Any = np.zeros((), dtype=np.int64)
    steps = [step / theta for step, theta in zip(bilateral.voxels.spacing, bilateral.theta_alpha, strict=True)]
    for r, stride, step in zip(radius, strides, steps, strict=True):
        distance = np.arange(-r, r + 1)
        squared = squared[..., None] + (distance * step) ** 2
        linear = linear[..., None] + distance * stride
    inside = squared <= TRUNCATION_RADIUS**2 * (1.0 + _ROUNDING)
    return linear[inside], (-0.5 * _LOG2E * squared[inside]).astype(bilateral.features.dtype)


class SpatialFilter:
    """The spatial kernel, axis by axis, cut at four standard deviations; see `Filter`."""

    RADIUS = 4.0
    """Standard deviations; the kernel is 3e-4 there."""

    def __init__(self, voxels: Voxels, theta_gamma: list[float], dtype: Any = np.float32) -> None:
        """Compute the taps, in the precision of the values."""
        self._voxels, self._device = voxels, voxels.device
        self._axes: list[tuple[int, int, Any, int]] = []
        for a, (theta, step, extent) in enumerate(zip(theta_gamma, voxels.spacing, voxels.box_shape, strict=True)):
            sigma = theta / step
            radius = int(min(math.ceil(min(self.RADIUS * sigma, 1e18)), extent - 1))
            taps = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2).astype(dtype)
            self._axes.append((math.prod(voxels.box_shape[a + 1 :]), extent, self._device.upload(taps), radius))
        self._boxes: dict[int, Any] = {}
        self.description = "separable"

    def accumulate(self, values: Any, sent: Any, received: Any, channel_weight: Any, total: Any, *, transposed: bool = False) -> None:
        """Add a filtering; see `Filter.accumulate`."""
        voxels, launch = self._voxels, self._device.launch
        _, num_voxels, width = values.shape
        constants = row_constants(values)
        if width not in self._boxes:
            num_bytes = 2.0 * values.dtype.itemsize * width * voxels.box_size
            check_memory(self._device, num_bytes, "the mask's bounding box of a spatial kernel")
            self._boxes[width] = self._device.xp.zeros((2, voxels.box_size, width), dtype=values.dtype)
        box, other = self._boxes[width]
        for group, weight, out in zip(values, channel_weight, total, strict=True):
            if num_voxels < voxels.box_size:
                launch("spatial", "clear_box", constants, voxels.box_size, box, voxels.box_size)
            launch("spatial", "scatter_to_box", constants, num_voxels, group, sent, num_voxels, voxels.box_index, box)
            for stride, extent, taps, radius in reversed(self._axes):
                launch("spatial", "filter_axis", constants, voxels.box_size, box, voxels.box_size, stride, extent, taps, radius, other)
                box, other = other, box
            launch("spatial", "gather_from_box", constants, num_voxels, box, voxels.box_index, num_voxels, received, weight, out)
