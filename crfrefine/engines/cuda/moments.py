"""Gradients of a filter's sums with respect to its bandwidths and the image, in moment form (docs/reference/math.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.engines.cuda.filters import Filter, SpatialFilter
from crfrefine.engines.cuda.kernel_set import Kernel
from crfrefine.engines.cuda.rows import row_constants
from crfrefine.engines.cuda.sums import Sums, sum_threads
from crfrefine.engines.cuda.voxels import Voxels

if TYPE_CHECKING:
    from crfrefine.parameters.specs import KernelSpec


class Moments:
    """The sums of one kernel over the steps of a backward pass: S = sum_c <u_c, K v_c> for pairs u, v, differentiated.

    Attributes:
        thetas: bandwidth of each feature: intensities first, box axes last.
        by_received, by_sent: (voxel) gradients with respect to the factors of the normalization, for `take_messages` to add to. by_sent is
            None if their sum is all that counts; both are if nothing depends on them.
    """

    def __init__(
        self, kernel: Kernel, spec: KernelSpec, voxels: Voxels, image: Any, sums: Sums, rows: Any, *, wants_theta: bool, by_image: Any
    ) -> None:
        """Allocate the sums; `rows` are numbers to compute in, as many as a pair of a step has.

        `by_image`, (modality, voxel), is the gradient with respect to the image, which is added to; None if it is not asked for.
        """
        self._kernel, self._voxels, self._device = kernel, voxels, voxels.device
        xp, self._num_modalities = voxels.device.xp, len(spec.theta_intensity or ())
        self.thetas = np.array([*(spec.theta_intensity or ()), *voxels.of_box_axes(spec.theta_position)])
        self._wants_theta, self._rows = wants_theta, rows
        self._by_image = by_image if self._num_modalities > 0 else None
        self._num_threads = sum_threads(voxels.num_voxels)
        self._partial = sums.reserve(len(self.thetas), self._num_threads)
        plain, scale = kernel.filter, kernel.scale
        # The taps of the spatial kernel are differentiated themselves, including where they fade.
        self._slopes = plain.slopes() if isinstance(plain, SpatialFilter) else []
        self._columns = None if self._slopes else self._centered_features(image)
        self.by_received = None if self._columns is None and scale is None else xp.zeros(voxels.num_voxels, dtype=np.float32)
        is_one_sum = scale is None or kernel.sent_scale is not None
        self.by_sent = None if is_one_sum else xp.zeros(voxels.num_voxels, dtype=np.float32)

    def _centered_features(self, image: Any) -> Any:
        """Return (feature, voxel) columns."""
        voxels = self._voxels
        columns = self._device.xp.empty((len(self.thetas), voxels.num_voxels), dtype=np.float32)
        for column, modality, theta in zip(columns, image[: self._num_modalities], self.thetas, strict=False):
            values = modality.reshape(-1)[voxels.grid_index].astype(np.float64)
            column[...] = (values - values.mean()) * (1.0 / theta)
        for a, (coordinate, extent) in enumerate(zip(voxels.coordinates, voxels.box_shape, strict=True), self._num_modalities):
            step = voxels.spacing[a - self._num_modalities] / self.thetas[a]
            columns[a] = (coordinate - 0.5 * (extent - 1.0)) * step
        return columns

    def add_step(self, marginals: Any, by_message: Any) -> None:
        """Add the pair of a step, v = the scaled marginals and u = the scaled gradient with respect to the messages, as rows."""
        self._add_pair(marginals, self._kernel.sent_scale, by_message, self._kernel.scale)

    def finish(self, unit: Any, by_ones: Any, filtered_back: Any) -> None:
        """Add the gradient through the row sums D, which normalize the messages and depend on bandwidths and image too.

        With the gradient for the message of all ones, summed over the steps, and that for D, which takes its place, there are two more
        sums of the form <u, K v>. All are (1, voxel, 1): ones, that gradient, and memory for the filtered values.
        """
        kernel, num_voxels, num_features = self._kernel, self._voxels.num_voxels, len(self.thetas)
        scale = kernel.scale
        self._filter(kernel.filter, by_ones, scale, filtered_back, transposed=True)
        self._add_pair(unit, kernel.sent_scale, by_ones, scale)
        by_degree = None if scale is None else by_ones
        squares = None if self._columns is None else self.by_received  # in its place
        arguments = (scale, int(kernel.sent_scale is not None), kernel.ones, by_ones, filtered_back, self.by_received, self.by_sent)
        self._launch("differentiate_scale", num_voxels, *arguments, num_voxels, by_degree, squares)
        if by_degree is not None:
            self._add_pair(unit, None, by_degree, None)
        if squares is None:
            return
        if by_degree is not None:
            self._filter(kernel.filter, by_degree, None, filtered_back, transposed=True)
        also = None if by_degree is None else filtered_back
        given = (squares, also, self._columns, num_voxels, num_features, self._num_threads, self._partial)
        by_image = (self._num_modalities, self._device.upload(1.0 / self.thetas), self._by_image)
        self._launch("add_squares", num_features * self._num_threads, *given, *by_image)

    def _add_pair(self, values: Any, sent: Any, other: Any, received: Any) -> None:
        """Add the pair v = sent * values, u = received * other, given as rows: one filtering for each feature."""
        plain, rows = self._kernel.filter, self._rows[: values.size].reshape(values.shape)
        for axis, slope in enumerate(self._slopes):
            self._filter(slope, values, sent, rows)
            self._add(rows, other, received, None, 1.0, self._partial[axis], None)
        for f, column in enumerate(() if self._columns is None else self._columns):
            by_image = self._by_image[f] if self._by_image is not None and f < self._num_modalities else None
            if not self._wants_theta and by_image is None:
                continue
            inverse = 1.0 / self.thetas[f]
            self._filter(plain, values, column if sent is None else sent * column, rows)
            self._add(rows, other, received, column, -2.0, self._partial[f], by_image, inverse)
            if by_image is not None:
                self._filter(plain, other, column if received is None else received * column, rows, transposed=True)
                self._add(rows, values, sent, None, 0.0, None, by_image, inverse)

    def _filter(self, plain: Filter, values: Any, sent: Any, out: Any, *, transposed: bool = False) -> None:
        unit = self._device.xp.ones((len(values), values.shape[2]), dtype=np.float32)
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
