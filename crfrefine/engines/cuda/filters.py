"""The common part of the GPU engine's filters, and its direct sums."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from crfrefine.base.numerics import RADIUS_MARGIN, TRUNCATION_RADIUS
from crfrefine.engines.cuda.cupy_device import CupyDevice
from crfrefine.engines.cuda.launches import Arguments
from crfrefine.engines.cuda.rows import MAX_WIDTH, upload_float32
from crfrefine.engines.cuda.voxels import CONSTANTS, BilateralInput, Voxels, strides_of
from crfrefine.errors import CapacityError

_MAX_OFFSETS = 1 << 27  # voxels in the box around a window
_HALF_LOG2E = 0.5 * math.log2(math.e)  # exp(-d^2 / 2) = 2^-(d^2 times this)


class Filter(ABC):
    """A symmetric kernel that can be applied to rows of channels at the voxels.

    Attributes:
        description: how it is computed.
        scale: (voxel) factor of received values; None means ones.
        sent_scale: (voxel) factor of sent values: equal to `scale` if the normalization is
            symmetric, else None.
        ones: (voxel) normalized message of all ones; None without a normalization.
    """

    description: str
    scale: Any = None
    sent_scale: Any = None
    ones: Any = None

    def __init__(self, device: CupyDevice) -> None:
        self.device = device

    @cached_property
    def _ones(self) -> Any:
        """A channel weight of 1 for rows of any width."""
        return self.device.xp.ones(MAX_WIDTH, dtype=np.float32)

    def filter_until_last(self, group: Any, channel_weight: Any) -> Arguments | None:
        """Filter a group of channels, (voxel, width), up to a last launch that `update` can do.

        The results are normalized, and multiplied by the weights of the channels, (width). Returns
        those arguments of `update` (kernels/cuda/mean_field.cu) that stand for this launch; the
        arrays stay until the filter is applied again. None means that `update` cannot end the
        filter, and nothing was launched.
        """
        return None

    def apply(
        self,
        values: Any,
        sent: Any,
        out: Any,
        *,
        received: Any = None,
        weights: Any = None,
        adds: bool = False,
        transposed: bool = False,
    ) -> None:
        """Replace `out` by weights * received * K (sent * values), or with `adds` add to it.

        The transpose of K differs only for the lattice. All arrays are float32 on the device.

        Args:
            values: (group, voxel, width).
            sent: (voxel) factors of the values; None means ones.
            out: (group, voxel, width).
            received: (voxel) factors of the results; None means ones.
            weights: (group, width) factors of the results; None means ones.
            adds: whether the results are added to `out`.
            transposed: whether to apply the transpose of K.
        """
        if weights is None:
            weights = [self._ones] * len(values)
        for group, weight, result in zip(values, weights, out, strict=True):
            output = {"received": received, "channel_weight": weight, "sum": result, "adds": adds}
            self.filter_group(group, sent, output, transposed=transposed)

    def normalize(self, voxels: Voxels, normalization: str) -> None:
        """Compute the normalization, "symmetric", "after" or "none"; only callers apply it."""
        if normalization == "none":
            return
        is_symmetric = normalization == "symmetric"
        self.scale, self.ones = self.normalization(voxels, is_symmetric=is_symmetric)
        if is_symmetric:
            self.sent_scale = self.scale
        else:
            self.ones = voxels.ones.reshape(-1)  # D^-1 K 1 = 1

    def normalization(self, voxels: Voxels, *, is_symmetric: bool) -> tuple[Any, Any]:
        """Return the factors of received values, and the message of all ones if it is symmetric.

        Both are (voxel). The factors are D^-1/2, or else D^-1, of the row sums D.
        """
        scale = self.device.xp.empty_like(voxels.ones)
        self.apply(voxels.ones, None, scale)
        scale = scale.reshape(-1)
        voxels.launch(
            "voxels",
            "find_scale",
            CONSTANTS,
            row_sum=scale,
            is_symmetric=is_symmetric,
            scale=scale,
        )
        if not is_symmetric:
            return scale, None
        message = self.device.xp.empty_like(voxels.ones)
        self.apply(voxels.ones, scale, message, received=scale)
        return scale, message.reshape(-1)

    @abstractmethod
    def filter_group(
        self, group: Any, sent: Any, output: Arguments, *, transposed: bool = False
    ) -> None:
        """Filter a group of channels, (voxel, width).

        The output are arguments that the last kernel of each filter has: the `sum`, (voxel, width),
        becomes channel_weight * received * K (sent * group), or with `adds` this is added to it.
        """


class FeatureSource(Protocol):
    """Points with features over their bandwidths, such as the voxels of an image."""

    device: CupyDevice
    num_points: int
    num_features: int
    features: Any  # (feature, point) float32 on the device
    spans: list[float]  # the largest value of each feature; the smallest one is 0


class DirectFilter(Filter):
    """Sums over the pairs of each point, by a kernel of kernels/cuda/direct.cu; see `Filter`."""

    def __init__(
        self, device: CupyDevice, kernel: str, features: Any, description: str, **pairs: Any
    ) -> None:
        """Take the (feature, point) features over their bandwidths.

        The pairs are those arguments of the kernel that say which points are one.
        """
        super().__init__(device)
        self.description = description
        self._kernel = kernel
        self._features = features * math.sqrt(_HALF_LOG2E)
        self._pairs = pairs

    def filter_group(
        self, group: Any, sent: Any, output: Arguments, *, transposed: bool = False
    ) -> None:
        """Sum over the pairs."""
        num_points = len(group)
        self.device.launch(
            "direct",
            self._kernel,
            {"CRF_WIDTH": group.shape[1], "CRF_FEATURES": len(self._features)},
            num_points,
            features=self._features,
            num_voxels=num_points,
            values=group,
            sent=sent,
            **self._pairs,
            **output,
        )


def exact_filter(source: FeatureSource) -> DirectFilter:
    """Return the sums over all pairs of voxels, or of other points."""
    description = f"exact (all {source.num_points} x N pairs)"
    return DirectFilter(source.device, "filter_all_pairs", source.features, description)


def window_radius(bilateral: BilateralInput) -> list[int]:
    """Return the voxels on either side along each box axis in the window of truncated sums."""
    voxels = bilateral.voxels
    reach = TRUNCATION_RADIUS * np.array(bilateral.theta_position) / voxels.spacing
    # Compared as floating point, since a huge bandwidth overflows any integer.
    radius = np.minimum(reach * (1.0 + RADIUS_MARGIN), np.subtract(voxels.box_shape, 1))
    return [int(steps) for steps in radius]


def truncated_filter(bilateral: BilateralInput) -> DirectFilter:
    """Return the sums over the pairs of voxels up to three theta_alpha apart.

    Voxels are numbered in a box with padding. Raises CapacityError if the window is too large.
    """
    voxels = bilateral.voxels
    radius = window_radius(bilateral)
    num_offsets = math.prod(2 * steps + 1 for steps in radius)
    if num_offsets > _MAX_OFFSETS:
        raise CapacityError(
            f"a truncated sum with theta_alpha {bilateral.theta_position} visits up to "
            f"{num_offsets:.2g} neighbors of each voxel; use smaller bandwidths, or "
            "mean_field.filter = lattice"
        )
    # Padding as wide as the window's radius follows each row, plane, ...: it also precedes the
    # next one.
    padded = np.add(voxels.box_shape, radius).tolist()
    strides = strides_of(padded)
    padding_before = int(np.dot(radius, strides))

    device = voxels.device
    index = voxels.linear_index(padded) + padding_before
    offsets, squared = _window(bilateral, radius, strides)
    exponents = _HALF_LOG2E * squared  # minus log2 of the weights
    return DirectFilter(
        device,
        "filter_window",
        bilateral.features[: len(bilateral.theta_intensity)],
        f"truncated ({len(offsets) // 2} pairs per voxel)",
        number=voxels.numbers_at(index, math.prod(padded) + 2 * padding_before),
        index=index,
        offset=device.upload(offsets),
        distance=upload_float32(device, exponents),
        num_offsets=len(offsets),
    )


def _window(
    bilateral: BilateralInput, radius: Sequence[int], strides: Sequence[int]
) -> tuple[Any, Any]:
    """Return the offsets of a window's voxels, ascending, and squared distances in bandwidths.

    The voxel itself is in the window.
    """
    squared: Any = np.zeros(())
    offsets: Any = np.zeros((), dtype=np.int64)
    thetas = zip(bilateral.theta_position, bilateral.voxels.spacing, strict=True)
    for (theta, step), reach, stride in zip(thetas, radius, strides, strict=True):
        distance = np.arange(-reach, reach + 1)
        in_bandwidths = distance * (step / theta)
        squared = squared[..., None] + in_bandwidths**2
        offsets = offsets[..., None] + distance * stride
    inside = squared <= TRUNCATION_RADIUS**2 * (1.0 + RADIUS_MARGIN)
    return offsets[inside], squared[inside]
