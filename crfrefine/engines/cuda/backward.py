"""The backward pass of the mean field on the device; kernels/cuda/mean_field_backward.cu has the names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from crfrefine.engines.base import MeanFieldGradients
from crfrefine.engines.cuda.filters import Filter, SpatialFilter
from crfrefine.engines.cuda.kernel_set import Kernel
from crfrefine.engines.cuda.mean_field import VolumeBackward
from crfrefine.engines.cuda.rows import (
    Products,
    Sums,
    num_row_groups,
    row_constants,
    row_width,
    sum_threads,
)
from crfrefine.engines.cuda.voxels import Voxels
from crfrefine.parameters.specs import KernelSetSpec, KernelSpec, MeanFieldSpec


class Moments:
    """The sums of one kernel over the steps of a backward pass: S = sum_c <u_c, K v_c> for pairs u, v, differentiated.

    Attributes:
        thetas: bandwidth of each feature: intensities first, box axes last.
        by_received, by_sent: (voxel) gradients with respect to the factors of the normalization, for `take_messages` to add to; None where
            nothing depends on them, by_sent also if their sum is all that counts.
    """

    def __init__(
        self,
        kernel: Kernel,
        spec: KernelSpec,
        voxels: Voxels,
        image: Any,
        sums: Sums,
        rows: Any,
        *,
        wants_theta: bool,
        by_image: Any,
    ) -> None:
        """Allocate the sums; `rows` are numbers to compute in, `by_image`, (modality, voxel), the gradient that is added to, or None."""
        self._kernel, self._voxels, self._device = kernel, voxels, voxels.device
        xp, self._num_modalities = voxels.device.xp, len(spec.theta_intensity or ())
        self.thetas = np.array(
            [*(spec.theta_intensity or ()), *voxels.of_box_axes(spec.theta_position)]
        )
        self._wants_theta, self._rows = wants_theta, rows
        self._by_image = by_image if self._num_modalities > 0 else None
        self._num_threads = sum_threads(voxels.num_voxels)
        self._partial = sums.reserve(len(self.thetas), self._num_threads)
        plain, scale = kernel.filter, kernel.scale
        # The taps of the spatial kernel are differentiated themselves, including where they fade.
        self._slopes = plain.slopes() if isinstance(plain, SpatialFilter) else []
        self._columns = None if self._slopes else self._centered_features(image)
        self.by_received = (
            None
            if self._columns is None and scale is None
            else xp.zeros(voxels.num_voxels, dtype=np.float32)
        )
        is_one_sum = scale is None or kernel.sent_scale is not None
        self.by_sent = None if is_one_sum else xp.zeros(voxels.num_voxels, dtype=np.float32)

    def _centered_features(self, image: Any) -> Any:
        """Return (feature, voxel) columns."""
        voxels = self._voxels
        columns = self._device.xp.empty((len(self.thetas), voxels.num_voxels), dtype=np.float32)
        for column, modality, theta in zip(
            columns, image[: self._num_modalities], self.thetas, strict=False
        ):
            values = modality.reshape(-1)[voxels.grid_index].astype(np.float64)
            column[...] = (values - values.mean()) * (1.0 / theta)
        for a, (coordinate, extent) in enumerate(
            zip(voxels.coordinates, voxels.box_shape, strict=True), self._num_modalities
        ):
            step = voxels.spacing[a - self._num_modalities] / self.thetas[a]
            columns[a] = (coordinate - 0.5 * (extent - 1.0)) * step
        return columns

    def finish(self, unit: Any, by_ones: Any, filtered_back: Any) -> None:
        """Add the gradient through the row sums D, which normalize the messages and depend on bandwidths and image too.

        With the gradient for the message of all ones, summed over the steps, and that for D, which takes its place, there are two more
        sums of the form <u, K v>. All are (1, voxel, 1): ones, that gradient, and memory for the filtered values.
        """
        kernel, num_voxels, num_features = self._kernel, self._voxels.num_voxels, len(self.thetas)
        scale = kernel.scale
        self._filter(kernel.filter, by_ones, scale, filtered_back, transposed=True)
        self.add_pair(unit, kernel.sent_scale, by_ones, scale)
        by_degree = None if scale is None else by_ones
        squares = None if self._columns is None else self.by_received  # in its place
        arguments = (
            scale,
            int(kernel.sent_scale is not None),
            kernel.ones,
            by_ones,
            filtered_back,
            self.by_received,
            self.by_sent,
        )
        self._launch("differentiate_scale", num_voxels, *arguments, num_voxels, by_degree, squares)
        if by_degree is not None:
            self.add_pair(unit, None, by_degree, None)
        if squares is None:
            return
        if by_degree is not None:
            self._filter(kernel.filter, by_degree, None, filtered_back, transposed=True)
        also = None if by_degree is None else filtered_back
        given = (
            squares,
            also,
            self._columns,
            num_voxels,
            num_features,
            self._num_threads,
            self._partial,
        )
        by_image = (self._num_modalities, self._device.upload(1.0 / self.thetas), self._by_image)
        self._launch("add_squares", num_features * self._num_threads, *given, *by_image)

    def add_pair(self, values: Any, sent: Any, other: Any, received: Any) -> None:
        """Add the pair v = sent * values, u = received * other, given as rows: one filtering for each feature."""
        plain, rows = self._kernel.filter, self._rows[: values.size].reshape(values.shape)
        for axis, slope in enumerate(self._slopes):
            self._filter(slope, values, sent, rows)
            self._add(rows, other, received, None, 1.0, self._partial[axis], None)
        for f, column in enumerate(() if self._columns is None else self._columns):
            by_image = (
                self._by_image[f]
                if self._by_image is not None and f < self._num_modalities
                else None
            )
            if not self._wants_theta and by_image is None:
                continue
            inverse = 1.0 / self.thetas[f]
            self._filter(plain, values, column if sent is None else sent * column, rows)
            self._add(rows, other, received, column, -2.0, self._partial[f], by_image, inverse)
            if by_image is not None:
                self._filter(
                    plain,
                    other,
                    column if received is None else received * column,
                    rows,
                    transposed=True,
                )
                self._add(rows, values, sent, None, 0.0, None, by_image, inverse)

    def _filter(
        self, plain: Filter, values: Any, sent: Any, out: Any, *, transposed: bool = False
    ) -> None:
        unit = self._device.xp.ones((len(values), values.shape[2]), dtype=np.float32)
        plain.accumulate(values, sent, None, unit, out, transposed=transposed, adds=False)

    def _add(
        self,
        rows: Any,
        other: Any,
        factor: Any,
        column: Any,
        coefficient: float,
        partial: Any,
        by_image: Any,
        inverse_theta: float = 0.0,
    ) -> None:
        """Add products of the filtered value and the other value of the pair; see `add_moments` in kernels/cuda/moments.cu."""
        num_voxels, num_threads = self._voxels.num_voxels, self._num_threads
        arguments = (
            rows,
            other,
            len(rows),
            factor,
            column,
            num_voxels,
            coefficient,
            num_threads,
            partial,
            inverse_theta,
            by_image,
        )
        self._device.launch("moments", "add_moments", row_constants(rows), num_threads, *arguments)

    def _launch(self, kernel: str, num_threads: int, *arguments: Any) -> None:
        self._device.launch("moments", kernel, {"CRF_WIDTH": 1}, num_threads, *arguments)


class Backward:
    """One backward pass."""

    def __init__(
        self,
        voxels: Voxels,
        kernels: Sequence[Kernel],
        image: Any,
        specs: tuple[KernelSetSpec, MeanFieldSpec],
        *,
        wants_theta: bool,
        wants_image: bool,
    ) -> None:
        """Take the model of the forward pass and its image, (M, *grid) on the device, and allocate the memory of the steps."""
        self._voxels, self._kernels, (self._set, self._spec), self._device = (
            voxels,
            kernels,
            specs,
            voxels.device,
        )
        spec, xp, num_voxels, num_labels = (
            self._spec,
            voxels.device.xp,
            voxels.num_voxels,
            self._spec.num_labels,
        )
        num_sent = num_labels - 1
        width, num_groups = row_width(num_sent), num_row_groups(num_sent)
        self._constants = {"CRF_WIDTH": width}
        self._weights, self._compatibility = (
            self._device.upload(np.asarray(values, dtype=np.float32))
            for values in (spec.weights, spec.compatibility)
        )
        self._sums, self._wants_theta = Sums(voxels.device), wants_theta
        self._products = [Products(self._sums, num_labels, num_labels, num_voxels) for _ in kernels]
        self._num_modalities = len(image)
        self._by_image = xp.zeros_like(image) if wants_image else None
        self._by_intensity = (
            xp.zeros((len(image), num_voxels), dtype=np.float32) if wants_image else None
        )
        # Rows of the marginals, and of the gradients with respect to messages and marginals; filtered values of the first two.
        shape = (num_groups, num_voxels, width)
        self._marginals, self._by_message, self._by_marginals = (
            xp.zeros(shape, dtype=np.float32) for _ in range(3)
        )
        self._filtered, self._filtered_back = (xp.empty(shape, dtype=np.float32) for _ in range(2))
        self._moments: list[Moments | None] = []
        for kernel, own in zip(kernels, self._set.kernels, strict=True):
            given = (kernel, own, voxels, image, self._sums, self._filtered.reshape(-1))
            is_wanted = wants_theta or (wants_image and own.theta_intensity is not None)
            self._moments.append(
                Moments(*given, wants_theta=wants_theta, by_image=self._by_intensity)
                if is_wanted
                else None
            )
        self._by_x, self._by_start, self._messages = (
            xp.empty((num_labels, num_voxels), dtype=np.float32) for _ in range(3)
        )
        self._unit = xp.ones((num_groups, width), dtype=np.float32)

    def run(
        self, record: Any, by_out: Any, logits: Any, volume: VolumeBackward | None = None
    ) -> MeanFieldGradients:
        """Run the steps backward; once per object. `record` is that of a `Tape`, `by_out`, (label, *grid), the gradient of its logits."""
        num_labels, num_voxels = self._spec.num_labels, self._voxels.num_voxels
        self._voxels.gather(by_out, self._by_x)
        self._by_start[...] = 0.0
        width = self._marginals.shape[2]
        for t in reversed(range(self._spec.num_iterations)):
            if volume is not None:
                volume.step_back(t, self._by_x)
            for g, rows in enumerate(self._marginals):  # those of all labels but the last
                channels = record[t][g * width : min((g + 1) * width, num_labels - 1)]
                rows[:, : len(channels)] = channels.T
            for m in range(len(self._kernels)):
                self._kernel_back(m)
            given = (num_labels, record.shape[1], num_voxels, record[t])
            self._launch("end_step_back", *given, self._by_marginals, self._by_x, self._by_start)
        del (
            self._marginals,
            self._by_message,
            self._by_marginals,
            self._filtered_back,
            self._messages,
        )
        for m, moments in enumerate(self._moments):
            if moments is not None:
                unit = self._device.xp.ones((1, num_voxels, 1), dtype=np.float32)
                by_ones, filtered_back = (self._device.xp.empty_like(unit) for _ in range(2))
                self._launch(
                    "differentiate_ones",
                    *self._penalty(m),
                    num_labels,
                    self._by_start,
                    num_voxels,
                    by_ones,
                )
                moments.finish(unit, by_ones, filtered_back)
        thetas = [None if moments is None else moments.thetas for moments in self._moments]
        del self._moments, self._filtered
        if self._by_image is not None:
            self._voxels.scatter(self._by_intensity, self._by_image)
        by_logits = self._logits_back(by_out, logits)
        return self._gradients(by_logits, thetas, volume)

    def _kernel_back(self, m: int) -> None:
        """Take one kernel's part of a step back."""
        kernel, moments, num_labels, num_voxels = (
            self._kernels[m],
            self._moments[m],
            self._spec.num_labels,
            self._voxels.num_voxels,
        )
        self._launch(
            "send_back", *self._penalty(m), num_labels, self._by_x, num_voxels, self._by_message
        )
        if moments is not None:
            # First: it computes in the memory of the filter below.
            moments.add_pair(self._marginals, kernel.sent_scale, self._by_message, kernel.scale)
        kernel.filter.accumulate(
            self._marginals, kernel.sent_scale, None, self._unit, self._filtered, adds=False
        )
        kernel.filter.accumulate(
            self._by_message,
            kernel.scale,
            None,
            self._unit,
            self._filtered_back,
            transposed=True,
            adds=False,
        )
        filtered = (
            self._marginals,
            self._by_message,
            self._filtered,
            self._filtered_back,
            kernel.scale,
            kernel.sent_scale,
            kernel.ones,
        )
        factors = (None, None) if moments is None else (moments.by_received, moments.by_sent)
        self._launch(
            "take_messages",
            num_labels,
            num_voxels,
            *filtered,
            *factors,
            self._by_marginals,
            int(m > 0),
            self._messages,
        )
        self._products[m].add(self._messages, self._by_x)

    def _logits_back(self, by_out: Any, logits: Any) -> Any:
        """Return the gradient with respect to the logits, and keep its sums."""
        num_labels, xp = self._spec.num_labels, self._device.xp
        inverse = np.float32(1.0) / np.float32(self._spec.temperature)
        self._by_start += self._by_x
        self._by_start *= inverse
        Products(self._sums, num_labels, 1, self._voxels.num_voxels).add(self._by_start, None)
        by_logits = by_out * inverse
        self._voxels.scatter(self._by_start, by_logits)
        # A logit of minus infinity has no gradient except for rounding, and is left out.
        finite = xp.where(xp.isfinite(logits), logits, np.float32(0.0))
        Products(self._sums, 1, 1, by_out.size).add(by_logits.reshape(1, -1), finite.reshape(1, -1))
        return by_logits

    def _gradients(
        self, by_logits: Any, thetas: list[Any], volume: VolumeBackward | None
    ) -> MeanFieldGradients:
        """Put the results together from the totals of the sums, in the order in which they were reserved."""
        spec, num_labels, totals = self._spec, self._spec.num_labels, iter(self._sums.totals())
        products = np.array([next(totals) for _ in self._kernels]).reshape(
            -1, num_labels, num_labels
        )
        compatibility, weights = (
            np.asarray(spec.compatibility, dtype=np.float64),
            spec.weights.astype(np.float64),
        )
        num_bilateral, num_axes = len(self._set.bilateral), len(self._voxels.grid_shape)
        by_intensity = np.zeros((len(self._kernels), self._num_modalities))
        by_position = np.zeros((len(self._kernels), num_axes))
        for m, theta in enumerate(thetas):
            total = None if theta is None else next(totals) / theta
            if total is not None and self._wants_theta:
                num_intensities = len(self._set.kernels[m].theta_intensity or ())
                by_intensity[m, :num_intensities] = total[:num_intensities]
                by_position[m, self._voxels.source_axis] = total[num_intensities:]
        by_bias, by_temperature = next(totals), float(next(totals)[0])
        if spec.bias is not None:
            by_temperature += float((by_bias * spec.bias).sum())
        return MeanFieldGradients(
            logits=by_logits,
            weights=-(products * compatibility).sum(axis=2),
            compatibility=-(products * weights[:, :, None]).sum(axis=0),
            temperature=-by_temperature / spec.temperature,
            bias=by_bias,
            theta_position=by_position[:num_bilateral],
            theta_intensity=by_intensity[:num_bilateral],
            theta_gamma=by_position[-1] if len(self._kernels) > num_bilateral else None,
            image=self._by_image,
            volume_weight=None if volume is None else spec.volume_weight_gradient(volume.by_slack),
        )

    def _penalty(self, m: int) -> tuple[Any, Any, int]:
        """A kernel's weights, the compatibility, and whether it is Potts."""
        return self._weights[m], self._compatibility, int(self._spec.is_potts)

    def _launch(self, kernel: str, *arguments: Any) -> None:
        """Run a kernel with a thread for each voxel."""
        self._device.launch(
            "mean_field_backward", kernel, self._constants, self._voxels.num_voxels, *arguments
        )
