"""Gradients of a filter's sums with respect to its bandwidths and the image, in moment form (docs/reference/math.md)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from crfrefine.engines.cuda.device import num_row_groups, padded_channels, precision, row_width
from crfrefine.engines.cuda.feature_columns import FeatureColumns
from crfrefine.engines.cuda.filters import Filter, SpatialFilter
from crfrefine.engines.cuda.kernel_set import Kernel
from crfrefine.engines.cuda.lattice import LatticeFilter
from crfrefine.engines.cuda.memory import sum_threads
from crfrefine.engines.cuda.sums import Sums
from crfrefine.engines.cuda.voxels import Voxels

_MOST_TOGETHER, _FINE_TOGETHER = 8, 4
"""Features that are filtered together have at most so many channels in all, those of one row; the second one on a lattice with more
vertices than voxels, where rows take most of the memory and wider ones save little."""


class Scratch:
    """Memory for two arrays of rows, in which the moments of all kernels are computed in turn."""

    def __init__(self, voxels: Voxels, num_channels: int, dtype: Any) -> None:
        """Allocate it for pairs of so many channels."""
        self._num_voxels = voxels.num_voxels
        self._rows = voxels.device.xp.empty(2 * max(_MOST_TOGETHER, padded_channels(num_channels)) * self._num_voxels, dtype=dtype)

    def rows(self, num_channels: int) -> tuple[Any, Any]:
        """Return rows for what is filtered, and for the result; until the next call."""
        shape = (num_row_groups(num_channels), self._num_voxels, row_width(num_channels))
        size, half = math.prod(shape), len(self._rows) // 2
        # A multiple of 8 numbers from the start of the memory: wide loads can begin there.
        return self._rows[:size].reshape(shape), self._rows[half : half + size].reshape(shape)


class Singles:
    """Single channels for the normalization of one kernel after the other.

    Attributes:
        unit: (1, voxel, 1) ones.
        by_ones: (1, voxel, 1) gradient with respect to the message of all ones, summed over the steps.
        filtered_back: (1, voxel, 1), for what is filtered.
    """

    def __init__(self, voxels: Voxels, dtype: Any) -> None:
        """Allocate them."""
        xp, shape = voxels.device.xp, (1, voxels.num_voxels, 1)
        self.unit, self.by_ones, self.filtered_back = (
            xp.ones(shape, dtype=dtype),
            xp.empty(shape, dtype=dtype),
            xp.empty(shape, dtype=dtype),
        )


class Moments:
    """The sums of one kernel over the steps of a backward pass: S = sum_c <u_c, K v_c> for pairs u, v, differentiated.

    Attributes:
        by_received, by_sent: (voxel) gradients with respect to the factors of the normalization, for `take_messages` to add to. by_sent is
            None if their sum is all that counts; both are if nothing depends on them.
    """

    def __init__(
        self,
        kernel: Kernel,
        voxels: Voxels,
        features: FeatureColumns,
        num_channels: int,
        dtype: Any,
        sums: Sums,
        scratch: Scratch,
        *,
        wants_theta: bool,
        by_image: Any,
    ) -> None:
        """Allocate the sums.

        Args:
            kernel: K with its normalization.
            voxels: the voxels.
            features: features of K.
            num_channels: channels of the pairs of a step.
            dtype: type of the values.
            sums: where totals are kept.
            scratch: what it computes in.
            wants_theta: whether to differentiate with respect to the bandwidths.
            by_image: (modality, voxel) gradient with respect to the image, which is added to; None: not asked for.
        """
        self._kernel, self._voxels, self._features, self._num_channels = kernel, voxels, features, num_channels
        self._dtype, self._wants_theta = np.dtype(dtype), wants_theta
        self._device, xp = voxels.device, voxels.device.xp
        self._by_image = by_image if features.num_modalities > 0 else None
        self._num_threads = sum_threads(voxels.num_voxels)
        self._partial = sums.reserve(len(features), self._num_threads)
        self._scratch = scratch
        self._unit = xp.ones(max(_MOST_TOGETHER, padded_channels(num_channels)), dtype=dtype)
        plain, scale = kernel.filter, kernel.scale
        # The taps of the spatial kernel are differentiated themselves, including where they fade.
        is_spatial = isinstance(plain, SpatialFilter)
        self._slopes = [plain.slope(axis) for axis in range(len(features))] if isinstance(plain, SpatialFilter) else []
        is_fine = isinstance(plain, LatticeFilter) and plain.lattice.num_vertices > voxels.num_voxels
        self._most_together = _FINE_TOGETHER if is_fine else _MOST_TOGETHER
        self._columns = None if is_spatial else features.columns()
        self.by_received = xp.zeros(voxels.num_voxels, dtype=dtype) if scale is not None or not is_spatial else None
        is_one_sum = scale is None or kernel.scales_sent
        self.by_sent = None if is_one_sum else xp.zeros(voxels.num_voxels, dtype=dtype)

    @property
    def _sent_scale(self) -> Any:
        return self._kernel.scale if self._kernel.scales_sent else None

    def add_step(self, marginals: Any, by_message: Any) -> None:
        """Add the pair of a step, v = the scaled marginals and u = the scaled gradient with respect to the messages, as rows."""
        self._add_pair(marginals, self._sent_scale, by_message, self._kernel.scale, self._num_channels)

    def finish(self, singles: Singles) -> None:
        """Add what the row sums D pass on, which normalize the messages and depend on bandwidths and image too.

        With the gradient for the message of all ones, in `singles`, and that for D, which takes its place, there are two more sums of the
        form <u, K v>.
        """
        kernel, features, num_voxels = self._kernel, self._features, self._voxels.num_voxels
        scale, unit, by_ones, filtered_back = kernel.scale, singles.unit, singles.by_ones, singles.filtered_back
        self._filter(kernel.filter, by_ones, scale, filtered_back, transposed=True)
        self._add_pair(unit, self._sent_scale, by_ones, scale, 1)
        by_degree = None if scale is None else by_ones
        squares = None if self._columns is None else self.by_received  # in its place
        arguments = (scale, int(kernel.scales_sent), kernel.ones, by_ones, filtered_back, self.by_received, self.by_sent)
        self._launch("differentiate_scale", 1, 1, num_voxels, *arguments, num_voxels, by_degree, squares)
        if by_degree is not None:
            self._add_pair(unit, None, by_degree, None, 1)
        if squares is None:
            return
        if by_degree is not None:
            self._filter(kernel.filter, by_degree, None, filtered_back, transposed=True)
        self._launch(
            "add_squares",
            1,
            1,
            len(features) * self._num_threads,
            squares,
            None if by_degree is None else filtered_back,
            self._columns,
            num_voxels,
            len(features),
            self._num_threads,
            self._partial,
            features.num_modalities,
            features.inverse_thetas,
            self._by_image,
        )

    def _add_pair(self, values: Any, sent: Any, other: Any, received: Any, num_channels: int) -> None:
        """Add the pair v = sent * values, u = received * other, given as rows."""
        if self._columns is None:
            _, rows = self._scratch.rows(num_channels)
            for axis, slope in enumerate(self._slopes):
                self._filter(slope, values, sent, rows)
                found = (rows, other, received, None, 1.0, self._partial[axis : axis + 1], None, None)
                self._add(num_channels, 1, *found)
            return
        plain, num_voxels = self._kernel.filter, self._voxels.num_voxels
        for first, end in self._chunks(num_channels):
            together, columns = end - first, self._columns[first:end]
            placed, rows = self._scratch.rows(together * num_channels)
            inverse, partial = self._features.inverse_thetas[first:end], self._partial[first:end]
            by_image = self._by_image[first:end] if self._by_image is not None and end <= self._features.num_modalities else None
            self._launch("place_moments", num_channels, together, num_voxels, values, sent, columns, num_voxels, placed)
            self._filter(plain, placed, None, rows)
            self._add(num_channels, together, rows, other, received, columns, -2.0, partial, inverse, by_image)
            if by_image is None:
                continue
            self._launch("place_moments", num_channels, together, num_voxels, other, received, columns, num_voxels, placed)
            self._filter(plain, placed, None, rows, transposed=True)
            self._add(num_channels, together, rows, values, sent, None, 0.0, None, inverse, by_image)

    def _chunks(self, num_channels: int) -> Iterator[tuple[int, int]]:
        """First and end of the features that are filtered together; intensities by themselves if the image's gradient is asked for."""
        together = max(1, self._most_together // num_channels)
        ends = [len(self._features)] if self._wants_theta else []
        if self._by_image is not None:
            ends.insert(0, self._features.num_modalities)
        begin = 0
        for end in ends:
            for first in range(begin, end, together):
                yield first, min(first + together, end)
            begin = end

    def _filter(self, plain: Filter, values: Any, sent: Any, out: Any, *, transposed: bool = False) -> None:
        num_groups, _, width = values.shape
        unit = self._unit[: num_groups * width].reshape(num_groups, width)
        plain.accumulate(values, sent, None, unit, out, transposed=transposed, adds=False)

    def _add(self, num_channels: int, together: int, rows: Any, other: Any, factor: Any, columns: Any, *into: Any) -> None:
        coefficient, partial, inverse, by_image = into
        num_threads = self._num_threads
        arguments = (rows, other, factor, columns, self._voxels.num_voxels, coefficient, num_threads, partial, inverse, by_image)
        self._launch("add_moments", num_channels, together, num_threads, *arguments)

    def _launch(self, kernel: str, num_channels: int, together: int, num_threads: int, *arguments: Any) -> None:
        self._device.launch("moments", kernel, _constants(num_channels, together, self._dtype), num_threads, *arguments)


def _constants(num_channels: int, together: int, dtype: Any) -> dict[str, int]:
    return {
        "CRF_CHANNELS": num_channels,
        "CRF_WIDTH": row_width(num_channels),
        "CRF_TOGETHER": together,
        "CRF_MOMENTS": row_width(together * num_channels),
        **precision(dtype),
    }
