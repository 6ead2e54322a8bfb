"""The backward pass of the mean field on the device (docs/reference/math.md; kernels/cuda/mean_field_backward.cu has the names).

The host decides on the launches, and waits once, for the sums of all steps; with a volume term twice per step more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.engines.base import MeanFieldGradients
from crfrefine.engines.cuda.kernel_set import Kernel
from crfrefine.engines.cuda.moments import Moments
from crfrefine.engines.cuda.rows import num_row_groups, row_width
from crfrefine.engines.cuda.sums import Products, Sums
from crfrefine.engines.cuda.volume import VolumeBackward
from crfrefine.engines.cuda.voxels import Voxels

if TYPE_CHECKING:
    from crfrefine.parameters.specs import KernelSetSpec, MeanFieldSpec


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
        self._voxels, self._kernels, (self._set, self._spec), self._device = voxels, kernels, specs, voxels.device
        spec, xp, num_voxels, num_labels = self._spec, voxels.device.xp, voxels.num_voxels, self._spec.num_labels
        num_sent = num_labels - 1
        width, num_groups = row_width(num_sent), num_row_groups(num_sent)
        self._constants = {"CRF_WIDTH": width}
        self._weights, self._compatibility = (
            self._device.upload(np.asarray(values, dtype=np.float32)) for values in (spec.weights, spec.compatibility)
        )
        self._sums, self._wants_theta = Sums(voxels.device), wants_theta
        self._products = [Products(self._sums, num_labels, num_labels, num_voxels) for _ in kernels]
        self._num_modalities = len(image)
        self._by_image = xp.zeros_like(image) if wants_image else None
        self._by_intensity = xp.zeros((len(image), num_voxels), dtype=np.float32) if wants_image else None
        # Rows of the marginals, and of the gradients with respect to messages and marginals; filtered values of the first two.
        shape = (num_groups, num_voxels, width)
        self._marginals, self._by_message, self._by_marginals = (xp.zeros(shape, dtype=np.float32) for _ in range(3))
        self._filtered, self._filtered_back = (xp.empty(shape, dtype=np.float32) for _ in range(2))
        self._moments: list[Moments | None] = []
        for kernel, own in zip(kernels, self._set.kernels, strict=True):
            given = (kernel, own, voxels, image, self._sums, self._filtered.reshape(-1))
            is_wanted = wants_theta or (wants_image and own.theta_intensity is not None)
            self._moments.append(Moments(*given, wants_theta=wants_theta, by_image=self._by_intensity) if is_wanted else None)
        self._by_x, self._by_start, self._messages = (xp.empty((num_labels, num_voxels), dtype=np.float32) for _ in range(3))
        self._unit = xp.ones((num_groups, width), dtype=np.float32)

    def run(self, record: Any, by_out: Any, logits: Any, volume: VolumeBackward | None = None) -> MeanFieldGradients:
        """Run the steps backward; once per object, whose memory the results take over. Arrays stay on the device.

        Args:
            record: (step, channel, voxel) marginals at the start of each step.
            by_out: (label, *grid) gradient with respect to the refined logits.
            logits: (label, *grid) that the run was given.
            volume: the volume term; None without it.
        """
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
        del self._marginals, self._by_message, self._by_marginals, self._filtered_back, self._messages
        for m, moments in enumerate(self._moments):
            if moments is not None:
                unit = self._device.xp.ones((1, num_voxels, 1), dtype=np.float32)
                by_ones, filtered_back = (self._device.xp.empty_like(unit) for _ in range(2))
                self._launch("differentiate_ones", *self._penalty(m), num_labels, self._by_start, num_voxels, by_ones)
                moments.finish(unit, by_ones, filtered_back)
        thetas = [None if moments is None else moments.thetas for moments in self._moments]
        del self._moments, self._filtered
        if self._by_image is not None:
            self._voxels.scatter(self._by_intensity, self._by_image)
        by_logits = self._logits_back(by_out, logits)
        return self._gradients(by_logits, thetas, volume)

    def _kernel_back(self, m: int) -> None:
        """Take one kernel's part of a step back."""
        kernel, moments, num_labels, num_voxels = self._kernels[m], self._moments[m], self._spec.num_labels, self._voxels.num_voxels
        self._launch("send_back", *self._penalty(m), num_labels, self._by_x, num_voxels, self._by_message)
        if moments is not None:
            moments.add_step(self._marginals, self._by_message)  # first: it computes in the memory of the filter below
        kernel.filter.accumulate(self._marginals, kernel.sent_scale, None, self._unit, self._filtered, adds=False)
        kernel.filter.accumulate(self._by_message, kernel.scale, None, self._unit, self._filtered_back, transposed=True, adds=False)
        filtered = (self._marginals, self._by_message, self._filtered, self._filtered_back, kernel.scale, kernel.sent_scale, kernel.ones)
        factors = (None, None) if moments is None else (moments.by_received, moments.by_sent)
        self._launch("take_messages", num_labels, num_voxels, *filtered, *factors, self._by_marginals, int(m > 0), self._messages)
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

    def _gradients(self, by_logits: Any, thetas: list[Any], volume: VolumeBackward | None) -> MeanFieldGradients:
        """Put the results together from the totals of the sums, in the order in which they were reserved."""
        spec, num_labels, totals = self._spec, self._spec.num_labels, iter(self._sums.totals())
        products = np.array([next(totals) for _ in self._kernels]).reshape(-1, num_labels, num_labels)
        compatibility, weights = np.asarray(spec.compatibility, dtype=np.float64), spec.weights.astype(np.float64)
        num_bilateral, num_axes = len(self._set.bilateral), len(self._voxels.grid_shape)
        by_intensity = np.zeros((len(self._kernels), self._num_modalities))
        by_position = np.zeros((len(self._kernels), num_axes))
        for m, theta in enumerate(thetas):
            total = None if theta is None else next(totals) / theta
            if total is not None and self._wants_theta:
                num_intensities = len(self._set.kernels[m].theta_intensity or ())
                by_intensity[m, :num_intensities] = total[:num_intensities]
                by_position[m] = self._voxels.to_grid_axes(total[num_intensities:])
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
        self._device.launch("mean_field_backward", kernel, self._constants, self._voxels.num_voxels, *arguments)
