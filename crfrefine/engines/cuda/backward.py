"""The backward pass of the mean field on the device (docs/reference/math.md; kernels/cuda/mean_field_backward.cu has the names).

The host decides on the launches, and waits once, for the sums of all steps; with a volume term twice per step more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.array_types import Float64
from crfrefine.engines.cuda.device import num_row_groups, row_width
from crfrefine.engines.cuda.kernel_set import Kernel
from crfrefine.engines.cuda.moments import FeatureColumns, Moments
from crfrefine.engines.cuda.sums import Products, Sums
from crfrefine.engines.cuda.volume import VolumeBackward
from crfrefine.engines.cuda.voxels import Voxels

if TYPE_CHECKING:
    from crfrefine.parameters.specs import MeanFieldSpec


@dataclass
class Gradients:
    """Gradients of a loss; arrays on the device, sums on the host in float64."""

    logits: Any  # (label, *grid)
    weights: Float64  # (kernel, label)
    compatibility: Float64  # (label, label), including the diagonal
    temperature: float  # number
    bias: Float64  # (label)
    theta: list[Float64]  # (feature) per kernel, intensities first, box axes last; zeros unless asked for


class Backward:
    """One backward pass."""

    def __init__(
        self,
        voxels: Voxels,
        kernels: Sequence[Kernel],
        features: Sequence[FeatureColumns],
        spec: MeanFieldSpec,
        dtype: Any,
        *,
        wants_theta: bool,
        by_image: Any,
    ) -> None:
        """Take the model of the forward pass, and allocate the memory of the steps; see `memory.backward_bytes`.

        `by_image`, (modality, *grid) zeros on the device, becomes the gradient with respect to the image; None if it is not asked for.
        """
        self._voxels, self._kernels, self._features, self._spec = voxels, kernels, features, spec
        self._device, self._dtype = voxels.device, np.dtype(dtype)
        xp, num_voxels, num_labels = voxels.device.xp, voxels.num_voxels, spec.num_labels
        num_sent = num_labels - 1
        width, num_groups = row_width(num_sent), num_row_groups(num_sent)
        self._constants = {"CRF_WIDTH": width}
        self._weights = self._device.upload(np.asarray(spec.weights, dtype=dtype))
        self._compatibility = self._device.upload(np.asarray(spec.compatibility, dtype=dtype))
        self._sums = Sums(voxels.device)
        self._products = [Products(self._sums, num_labels, num_labels, num_voxels) for _ in kernels]
        self._by_image = by_image
        self._by_voxels = None if by_image is None else xp.zeros((len(by_image), num_voxels), dtype=dtype)
        self._is_differentiated = [wants_theta or (by_image is not None and of_kernel.num_modalities > 0) for of_kernel in features]
        self._wants_theta = wants_theta
        # Rows of the marginals, and of the gradients with respect to messages and marginals; filtered values of the first two.
        shape = (num_groups, num_voxels, width)
        self._marginals, self._by_message, self._by_marginals = (xp.zeros(shape, dtype=dtype) for _ in range(3))
        self._filtered, self._filtered_back = (xp.empty(shape, dtype=dtype) for _ in range(2))
        scratch = self._filtered.reshape(-1)
        self._moments = [
            Moments(kernel, voxels, of_kernel, num_sent, dtype, self._sums, scratch, wants_theta=wants_theta, by_image=self._by_voxels)
            if wanted
            else None
            for kernel, of_kernel, wanted in zip(kernels, features, self._is_differentiated, strict=True)
        ]
        self._by_x, self._by_start, self._messages = (xp.empty((num_labels, num_voxels), dtype=dtype) for _ in range(3))
        self._unit = xp.ones((num_groups, width), dtype=dtype)

    def run(self, record: Any, by_out: Any, logits: Any, volume: VolumeBackward | None = None) -> Gradients:
        """Run the steps backward; once per object, whose memory the results take over.

        From the (step, channel, voxel) record of the marginals at the start of each step, the (label, *grid) gradient `by_out` with respect
        to the refined logits, and the (label, *grid) logits that the run was given.
        """
        voxels, num_labels = self._voxels, self._spec.num_labels
        for of_voxels, of_grid in zip(self._by_x, by_out.reshape(num_labels, -1), strict=True):
            of_voxels[...] = of_grid[voxels.grid_index]
        self._by_start[...] = 0.0
        for t in reversed(range(self._spec.num_iterations)):
            if volume is not None:
                volume.step_back(t, self._by_x)
            self._load_marginals(record[t])
            for m in range(len(self._kernels)):
                self._kernel_back(m)
            given = (num_labels, record.shape[1], voxels.num_voxels, record[t])
            self._launch("end_step_back", *given, self._by_marginals, self._by_x, self._by_start)
        del self._marginals, self._by_message, self._by_marginals, self._filtered_back, self._messages
        if any(self._is_differentiated):
            self._normalizations_back()
        del self._moments, self._filtered
        self._image_back()
        by_logits = self._logits_back(by_out, logits)
        return self._gradients(by_logits, self._sums.totals())

    def _load_marginals(self, record: Any) -> None:
        """Put (channel, voxel) marginals into rows, all but the last label's."""
        width = self._marginals.shape[2]
        for g, rows in enumerate(self._marginals):
            channels = record[g * width : min((g + 1) * width, self._spec.num_labels - 1)]
            rows[:, : len(channels)] = channels.T

    def _kernel_back(self, m: int) -> None:
        """Take one kernel's part of a step back."""
        kernel, moments, num_labels, num_voxels = self._kernels[m], self._moments[m], self._spec.num_labels, self._voxels.num_voxels
        scale, sent_scale = kernel.scale, kernel.scale if kernel.scales_sent else None
        self._launch("send_back", *self._penalty(m), num_labels, self._by_x, num_voxels, self._by_message)
        if moments is not None:
            moments.add_step(self._marginals, self._by_message)  # first: it computes in the memory of the filter below
        kernel.filter.accumulate(self._marginals, sent_scale, None, self._unit, self._filtered, adds=False)
        kernel.filter.accumulate(self._by_message, scale, None, self._unit, self._filtered_back, transposed=True, adds=False)
        filtered = (self._marginals, self._by_message, self._filtered, self._filtered_back, scale, sent_scale, kernel.ones)
        factors = (None, None) if moments is None else (moments.by_received, moments.by_sent)
        self._launch("take_messages", num_labels, num_voxels, *filtered, *factors, self._by_marginals, int(m > 0), self._messages)
        self._products[m].add(self._messages, self._by_x)

    def _normalizations_back(self) -> None:
        """Add the normalizations' part of the gradients of bandwidths and image."""
        xp, num_voxels = self._device.xp, self._voxels.num_voxels
        unit = xp.ones((1, num_voxels, 1), dtype=self._dtype)
        by_ones, filtered_back = (xp.empty_like(unit) for _ in range(2))
        for m, moments in enumerate(self._moments):
            if moments is not None:
                arguments = (*self._penalty(m), self._spec.num_labels, self._by_start, num_voxels, by_ones)
                self._launch("differentiate_ones", *arguments)
                moments.finish(unit, by_ones, filtered_back)

    def _logits_back(self, by_out: Any, logits: Any) -> Any:
        """Return the gradient with respect to the logits, and keep its sums."""
        num_labels, xp = self._spec.num_labels, self._device.xp
        inverse = self._dtype.type(1.0) / self._dtype.type(self._spec.temperature)
        self._by_start += self._by_x
        self._by_start *= inverse
        Products(self._sums, num_labels, 1, self._voxels.num_voxels).add(self._by_start, None)
        by_logits = by_out * inverse
        for of_grid, of_voxels in zip(by_logits.reshape(num_labels, -1), self._by_start, strict=True):
            of_grid[self._voxels.grid_index] = of_voxels
        # A logit of minus infinity has no gradient except for rounding, and is left out.
        finite = xp.where(xp.isfinite(logits), logits, self._dtype.type(0.0))
        Products(self._sums, 1, 1, by_out.size).add(by_logits.reshape(1, -1), finite.reshape(1, -1))
        return by_logits

    def _image_back(self) -> None:
        """Put the gradient with respect to the image at its places, if it is asked for."""
        if self._by_image is not None and self._by_voxels is not None:
            for of_voxels, of_grid in zip(self._by_voxels, self._by_image.reshape(len(self._by_image), -1), strict=True):
                of_grid[self._voxels.grid_index] = of_voxels

    def _gradients(self, by_logits: Any, totals: list[Float64]) -> Gradients:
        """Put the results together from the totals of the sums, in the order in which they were reserved."""
        spec, num_labels, found = self._spec, self._spec.num_labels, iter(totals)
        products = np.array([next(found) for _ in self._kernels]).reshape(-1, num_labels, num_labels)
        compatibility, weights = np.asarray(spec.compatibility, dtype=np.float64), spec.weights.astype(np.float64)
        of_features = [next(found) if wanted else None for wanted in self._is_differentiated]
        theta = [
            total / np.array(features.thetas) if total is not None and self._wants_theta else np.zeros(len(features))
            for total, features in zip(of_features, self._features, strict=True)
        ]
        by_bias, by_temperature = next(found), float(next(found)[0])
        if spec.bias is not None:
            by_temperature += float((by_bias * spec.bias).sum())
        return Gradients(
            logits=by_logits,
            weights=-(products * compatibility).sum(axis=2),
            compatibility=-(products * weights[:, :, None]).sum(axis=0),
            temperature=-by_temperature / spec.temperature,
            bias=by_bias,
            theta=theta,
        )

    def _penalty(self, m: int) -> tuple[Any, Any, int]:
        """A kernel's weights, the compatibility, and whether it is Potts."""
        return self._weights[m], self._compatibility, int(self._spec.is_potts)

    def _launch(self, kernel: str, *arguments: Any) -> None:
        """Run a kernel with a thread for each voxel."""
        self._device.launch("mean_field_backward", kernel, self._constants, self._voxels.num_voxels, *arguments)
