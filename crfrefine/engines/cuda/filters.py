"""What the GPU engine's filters have in common, and its direct sums: all pairs, or the pairs of a window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from crfrefine.engines.cuda.device import Room, check_memory, row_constants
from crfrefine.engines.cuda.sources import padded_count
from crfrefine.engines.cuda.truncated import HALF_EXPONENT, PlainWindow, TiledWindow
from crfrefine.engines.cuda.voxels import BilateralInput, Voxels
from crfrefine.engines.cuda.window import LANES, ROUNDING, SHARED_BYTES, TRUNCATION_RADIUS, cut_into_planes, is_worth_tiling, sender_bytes
from crfrefine.errors import CapacityError

_MOST_OFFSETS = 1 << 27
_EXACT_THREADS = 128
_TAPS_PADDING = 7  # kPadding of spatial.cu
_MOST_SENDERS = 512  # senders that are summed separately before they join the total: limits rounding


class Filter(Protocol):
    """A symmetric kernel that can be applied to rows of channels at the voxels."""

    description: str

    def accumulate(
        self, values: Any, sent: Any, received: Any, channel_weight: Any, total: Any, *, transposed: bool = False, adds: bool = True
    ) -> None:
        """Total += channel_weight * received * K (sent * values).

        Args:
            values: (group, voxel, width), on the device, like all arrays, which have one type: float32 or float64.
            sent: (voxel) factors, or None for ones.
            received: likewise.
            channel_weight: (group, width).
            total: like `values`; the result is added to it.
            adds: False: the result takes the place of what is in `total`.
            transposed: apply the transpose of K, which differs from K only for the lattice.
        """
        ...


class ExactFilter:
    """All pairs of voxels; see `Filter`."""

    def __init__(self, bilateral: BilateralInput, *, tiled: bool = True) -> None:
        """Take the features.

        Args:
            bilateral: the features.
            tiled: share loads among the threads of a block, if a row fits into shared memory.
        """
        self._device = bilateral.voxels.device
        self._features = bilateral.features * HALF_EXPONENT
        self._num_features, self._tiled = bilateral.num_features, tiled
        self.description = f"exact (all {bilateral.voxels.num_voxels} x N pairs)"

    def accumulate(
        self, values: Any, sent: Any, received: Any, channel_weight: Any, total: Any, *, transposed: bool = False, adds: bool = True
    ) -> None:
        """Add a filtering; see `Filter.accumulate`."""
        _, num_voxels, width = values.shape
        constants = {"CRF_FEATURES": self._num_features, **row_constants(values)}
        senders = min(_MOST_SENDERS, SHARED_BYTES // sender_bytes(self._num_features, width, values.dtype.itemsize))
        for group, weight, out in zip(values, channel_weight, total, strict=True):
            arguments = (self._features, num_voxels, group, sent, received, weight, out, int(adds))
            if self._tiled and senders > 0:
                tile = {**constants, "CRF_THREADS": _EXACT_THREADS, "CRF_SENDERS": senders}
                self._device.launch_blocks("exact_tiles", "filter_all_tiles", tile, -(-num_voxels // _EXACT_THREADS), *arguments)
            else:
                self._device.launch("direct", "filter_all_pairs", constants, num_voxels, *arguments)


def window_radius(bilateral: BilateralInput) -> list[int]:
    """Voxels on either side along each box axis; compared as floating point, since a huge bandwidth overflows any integer."""
    voxels = bilateral.voxels
    return [
        int(min(TRUNCATION_RADIUS * theta / step * (1.0 + ROUNDING), extent - 1))
        for theta, step, extent in zip(bilateral.theta_alpha, voxels.spacing, voxels.box_shape, strict=True)
    ]


class TruncatedFilter:
    """The pairs of voxels up to three theta_alpha apart; see `Filter`."""

    def __init__(self, bilateral: BilateralInput, *, tiled: bool | None = None) -> None:
        """Compute the window and put the intensities into a box.

        Args:
            bilateral: the features.
            tiled: share loads among the threads of a block; None: where that pays off.

        Raises:
            CapacityError: the window or the box is too large.
        """
        voxels = bilateral.voxels
        radius = window_radius(bilateral)
        num_offsets = math.prod(2 * r + 1 for r in radius)
        if num_offsets > _MOST_OFFSETS:
            raise CapacityError(
                f"a truncated sum with theta_alpha {bilateral.theta_alpha} visits up to {num_offsets:.2g} neighbors of each voxel; "
                "use smaller bandwidths, or mean_field.filter = lattice"
            )
        num_modalities = len(bilateral.theta_beta)
        num_bytes = float(bilateral.features.dtype.itemsize) * voxels.box_size * (padded_count(num_modalities) + 9)
        check_memory(voxels.device, num_bytes, "the box of a truncated sum")
        planes = cut_into_planes(bilateral, radius)
        if is_worth_tiling(bilateral, planes) if tiled is None else tiled:
            self._sum: TiledWindow | PlainWindow = TiledWindow(bilateral, planes)
        else:
            self._sum = PlainWindow(bilateral, radius)
        num_pairs = int((2 * planes.half_height.astype(np.int64) + 1).clip(min=0).sum())
        self.description = f"truncated ({num_pairs // 2} pairs per voxel)"

    def accumulate(
        self, values: Any, sent: Any, received: Any, channel_weight: Any, total: Any, *, transposed: bool = False, adds: bool = True
    ) -> None:
        """Add a filtering; see `Filter.accumulate`."""
        window = self._sum
        for group, weight, out in zip(values, channel_weight, total, strict=True):
            window.add(window.box.place(group, sent), received, weight, out, adds=adds)


SPATIAL_RADIUS = {np.dtype(np.float32): 4.0, np.dtype(np.float64): 8.0}
"""Standard deviations up to which a tap of the spatial kernel counts in full, by the precision of the values."""


def spatial_taps(sigma: float, extent: int, radius: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights of the spatial kernel at distance 0, 1, ... along an axis, and theta_gamma times their derivatives with respect to it.

    Within one voxel beyond `radius` the Gaussian fades to zero, so that no weight jumps when another voxel comes within reach
    (docs/reference/math.md).

    Args:
        sigma: standard deviation in voxels.
        extent: voxels of the box along the axis.
        radius: standard deviations.
    """
    reach = min(radius * sigma, 1e18)
    distance = np.arange(int(min(math.ceil(reach), extent - 1)) + 1)
    squared = (distance / sigma) ** 2
    gaussian = np.exp(-0.5 * squared)
    x = np.clip(reach + 1.0 - distance, 0.0, 1.0)
    fade = x * x * (3.0 - 2.0 * x)
    return gaussian * fade, gaussian * (squared * fade + 6.0 * x * (1.0 - x) * reach)


class SpatialFilter:
    """The spatial kernel, axis by axis; see `Filter`."""

    def __init__(self, voxels: Voxels, theta_gamma: Sequence[float], dtype: Any = np.float32, *, differentiated: int | None = None) -> None:
        """Compute the taps, in the precision of the values.

        Args:
            voxels: the voxels to filter.
            theta_gamma: one per box axis.
            dtype: type of the values.
            differentiated: the axis whose weights are replaced by their slopes; None: the kernel itself.
        """
        self._voxels, self._device = voxels, voxels.device
        self._theta_gamma, self._dtype = theta_gamma, np.dtype(dtype)
        self._axes: list[tuple[int, int, Any, int]] = []
        for a, (theta, step, extent) in enumerate(zip(theta_gamma, voxels.spacing, voxels.box_shape, strict=True)):
            weights, slopes = spatial_taps(theta / step, extent, SPATIAL_RADIUS[self._dtype])
            taps = slopes if a == differentiated else weights
            both_sides = np.concatenate([taps[:0:-1], taps]).astype(dtype)
            padded = self._device.upload(np.pad(both_sides, _TAPS_PADDING))
            self._axes.append((math.prod(voxels.box_shape[a + 1 :]), extent, padded, len(taps) - 1))
        self._boxes = Room(self._device, "the mask's bounding box of a spatial kernel")
        self.description = "separable"

    def slope(self, axis: int) -> SpatialFilter:
        """The filter of theta_gamma times the kernel's derivative with respect to one axis's theta_gamma."""
        slope = SpatialFilter(self._voxels, self._theta_gamma, self._dtype, differentiated=axis)
        slope._boxes = self._boxes  # only one filter uses them at a time
        return slope

    def accumulate(
        self, values: Any, sent: Any, received: Any, channel_weight: Any, total: Any, *, transposed: bool = False, adds: bool = True
    ) -> None:
        """Add a filtering; see `Filter.accumulate`."""
        voxels, launch = self._voxels, self._device.launch
        _, num_voxels, width = values.shape
        outputs = 8 if width * values.dtype.itemsize <= 16 else 4  # as many as registers hold
        constants = {**row_constants(values), "CRF_OUTPUTS": outputs}
        box, other = self._boxes.array((2, voxels.box_size, width), values.dtype)
        box_size, number = voxels.box_size, voxels.number
        index = None if number is None else voxels.box_index
        first, *others = reversed(self._axes)
        for group, weight, out in zip(values, channel_weight, total, strict=True):
            _, extent, taps, radius = first
            launch(
                "spatial", "filter_values", constants, box_size, group, sent, number, box_size, extent, _centered(taps, radius), radius, box
            )
            to_voxels = received, weight, out, int(adds)
            for place, (stride, extent, taps, radius) in enumerate(others, start=1):
                is_last = place == len(others)
                num_threads = box_size // extent * -(-extent // outputs)
                near = stride, extent, _centered(taps, radius), radius
                far = num_threads, stride, extent, taps, radius
                if stride < LANES and is_last:
                    launch("spatial", "filter_near_axis_to_voxels", constants, num_voxels, box, index, num_voxels, *near, *to_voxels)
                elif stride < LANES:
                    launch("spatial", "filter_near_axis", constants, box_size, box, box_size, *near, other)
                elif is_last:
                    launch("spatial", "filter_far_axis_to_voxels", constants, num_threads, box, number, *far, *to_voxels)
                else:
                    launch("spatial", "filter_far_axis", constants, num_threads, box, *far, other)
                box, other = other, box
            if not others:
                launch("spatial", "gather_from_box", constants, num_voxels, box, index, num_voxels, *to_voxels)


def _centered(taps: Any, radius: int) -> Any:
    """The weights from distance 0 on."""
    return taps[radius + _TAPS_PADDING :]
