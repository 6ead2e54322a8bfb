"""Gradients of a filter's sums with respect to its bandwidths and the image, in moment form (docs/reference/math.md)."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from crfrefine.engines.cuda.device import padded_channels, row_constants
from crfrefine.engines.cuda.filters import Filter, SpatialFilter
from crfrefine.engines.cuda.kernel_set import Kernel
from crfrefine.engines.cuda.memory import sum_threads
from crfrefine.engines.cuda.sums import Sums
from crfrefine.engines.cuda.voxels import Voxels


class FeatureColumns:
    """The centered features of one kernel: intensities first, box axes last.

    Attributes:
        thetas: bandwidth of each feature.
        num_modalities: number of features that are intensities.
    """

    def __init__(self, voxels: Voxels, theta_position: list[float], theta_beta: list[float], image: Any) -> None:
        """Take bandwidths per box axis and per modality, none for a spatial kernel, and the image, (M, *grid) on the device."""
        self._voxels, self._image, self._theta_position = voxels, image, theta_position
        self.thetas = [*theta_beta, *theta_position]
        self.num_modalities = len(theta_beta)

    def __len__(self) -> int:
        return len(self.thetas)

    @cached_property
    def inverse_thetas(self) -> Any:
        """(feature) float64 on the device."""
        return self._voxels.device.upload(1.0 / np.array(self.thetas, dtype=np.float64))

    def columns(self) -> Any:
        """(feature, voxel), in the image's precision."""
        voxels = self._voxels
        columns = voxels.device.xp.empty((len(self), voxels.num_voxels), dtype=self._image.dtype)
        for column, modality, theta in zip(columns, self._image, self.thetas, strict=False):
            values = modality.reshape(-1)[voxels.grid_index].astype(np.float64)
            column[...] = (values - values.mean()) * (1.0 / theta)
        for a, (coordinate, extent) in enumerate(zip(voxels.coordinates, voxels.box_shape, strict=True)):
            step = voxels.spacing[a] / self._theta_position[a]
            columns[self.num_modalities + a] = (coordinate - 0.5 * (extent - 1.0)) * step
        return columns


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
        rows: Any,
        *,
        wants_theta: bool,
        by_image: Any,
    ) -> None:
        """Allocate the sums; `rows` are numbers to compute in, as many as a pair of a step has.

        `by_image`, (modality, voxel), is the gradient with respect to the image, which is added to; None if it is not asked for.
        """
        self._kernel, self._voxels, self._features = kernel, voxels, features
        self._dtype, self._wants_theta = np.dtype(dtype), wants_theta
        self._device, xp = voxels.device, voxels.device.xp
        self._by_image = by_image if features.num_modalities > 0 else None
        self._num_threads = sum_threads(voxels.num_voxels)
        self._partial = sums.reserve(len(features), self._num_threads)
        self._rows = rows
        self._unit = xp.ones(padded_channels(num_channels), dtype=dtype)
        plain, scale = kernel.filter, kernel.scale
        # The taps of the spatial kernel are differentiated themselves, including where they fade.
        is_spatial = isinstance(plain, SpatialFilter)
        self._slopes = [plain.slope(axis) for axis in range(len(features))] if isinstance(plain, SpatialFilter) else []
        self._columns = None if is_spatial else features.columns()
        self.by_received = xp.zeros(voxels.num_voxels, dtype=dtype) if scale is not None or not is_spatial else None
        is_one_sum = scale is None or kernel.scales_sent
        self.by_sent = None if is_one_sum else xp.zeros(voxels.num_voxels, dtype=dtype)

    @property
    def _sent_scale(self) -> Any:
        return self._kernel.scale if self._kernel.scales_sent else None

    def add_step(self, marginals: Any, by_message: Any) -> None:
        """Add the pair of a step, v = the scaled marginals and u = the scaled gradient with respect to the messages, as rows."""
        self._add_pair(marginals, self._sent_scale, by_message, self._kernel.scale)

    def finish(self, unit: Any, by_ones: Any, filtered_back: Any) -> None:
        """Add the gradient through the row sums D, which normalize the messages and depend on bandwidths and image too.

        With the gradient for the message of all ones, summed over the steps, and that for D, which takes its place, there are two more
        sums of the form <u, K v>. All are (1, voxel, 1): ones, that gradient, and memory for the filtered values.
        """
        kernel, features, num_voxels = self._kernel, self._features, self._voxels.num_voxels
        scale = kernel.scale
        self._filter(kernel.filter, by_ones, scale, filtered_back, transposed=True)
        self._add_pair(unit, self._sent_scale, by_ones, scale)
        by_degree = None if scale is None else by_ones
        squares = None if self._columns is None else self.by_received  # in its place
        arguments = (scale, int(kernel.scales_sent), kernel.ones, by_ones, filtered_back, self.by_received, self.by_sent)
        self._launch("differentiate_scale", num_voxels, *arguments, num_voxels, by_degree, squares)
        if by_degree is not None:
            self._add_pair(unit, None, by_degree, None)
        if squares is None:
            return
        if by_degree is not None:
            self._filter(kernel.filter, by_degree, None, filtered_back, transposed=True)
        also, num_features = None if by_degree is None else filtered_back, len(features)
        given = (squares, also, self._columns, num_voxels, num_features, self._num_threads, self._partial)
        by_image = (features.num_modalities, features.inverse_thetas, self._by_image)
        self._launch("add_squares", num_features * self._num_threads, *given, *by_image)

    def _add_pair(self, values: Any, sent: Any, other: Any, received: Any) -> None:
        """Add the pair v = sent * values, u = received * other, given as rows: one filtering for each feature."""
        if self._columns is None:
            rows = self._rows_for(values)
            for axis, slope in enumerate(self._slopes):
                self._filter(slope, values, sent, rows)
                self._add(rows, other, received, None, 1.0, self._partial[axis], None)
            return
        plain, rows, inverse = self._kernel.filter, self._rows_for(values), 1.0 / np.array(self._features.thetas)
        for f, column in enumerate(self._columns):
            by_image = self._by_image[f] if self._by_image is not None and f < self._features.num_modalities else None
            if not self._wants_theta and by_image is None:
                continue
            self._filter(plain, values, column if sent is None else sent * column, rows)
            self._add(rows, other, received, column, -2.0, self._partial[f], by_image, inverse[f])
            if by_image is not None:
                self._filter(plain, other, column if received is None else received * column, rows, transposed=True)
                self._add(rows, values, sent, None, 0.0, None, by_image, inverse[f])

    def _rows_for(self, values: Any) -> Any:
        """Return memory for the filtered values of these rows; valid until the next call."""
        return self._rows[: values.size].reshape(values.shape)

    def _filter(self, plain: Filter, values: Any, sent: Any, out: Any, *, transposed: bool = False) -> None:
        unit = self._unit[: len(values) * values.shape[2]].reshape(len(values), -1)
        plain.accumulate(values, sent, None, unit, out, transposed=transposed, adds=False)

    def _add(
        self, rows: Any, other: Any, factor: Any, column: Any, coefficient: float, partial: Any, by_image: Any, inverse_theta: float = 0.0
    ) -> None:
        """Add products of the filtered value and the other value of the pair; see `add_moments` in kernels/cuda/moments.cu."""
        num_voxels, num_threads = self._voxels.num_voxels, self._num_threads
        arguments = (rows, other, len(rows), factor, column, num_voxels, coefficient, num_threads, partial, inverse_theta, by_image)
        self._device.launch("moments", "add_moments", row_constants(rows), num_threads, *arguments)

    def _launch(self, kernel: str, num_threads: int, *arguments: Any) -> None:
        self._device.launch("moments", kernel, {"CRF_WIDTH": 1}, num_threads, *arguments)
