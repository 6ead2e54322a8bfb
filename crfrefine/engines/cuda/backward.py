"""The backward pass of the mean field on the device (docs/reference/math.md; structured as kernels/cpu/mean_field_backward.cpp).

Names: `y` is the gradient with respect to what a step adds, z = compatibility y, and -weight z the gradient with respect to a kernel's
message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.engines.cuda.kernel_set import Kernel
from crfrefine.engines.cuda.moments import FeatureColumns, add_moments, filtered
from crfrefine.engines.cuda.volume_backward import VolumeBackward, all_marginals
from crfrefine.engines.cuda.voxels import Voxels

if TYPE_CHECKING:
    from crfrefine.specs import MeanFieldSpec


@dataclass
class Gradients:
    """Gradients of a loss; arrays of voxels on the device, sums on the host in float64.

    Attributes:
        scores: (label, voxel), with respect to the logits divided by the temperature.
        weights: (kernel, label).
        compatibility: (label, label), including the diagonal.
        theta: (feature) per kernel, intensities first, box axes last; zeros unless asked for.
        image: (modality, voxel); None unless asked for.
    """

    scores: Any
    weights: NDArray[np.float64]
    compatibility: NDArray[np.float64]
    theta: list[NDArray[np.float64]]
    image: Any


class Backward:
    """One backward pass."""

    def __init__(
        self,
        voxels: Voxels,
        kernels: Sequence[Kernel],
        features: Sequence[FeatureColumns],
        spec: MeanFieldSpec,
        *,
        wants_theta: bool,
        wants_image: bool,
    ) -> None:
        """Take the model of the forward pass.

        Args:
            voxels: the masked voxels.
            kernels: the normalized kernels.
            features: features of each kernel.
            spec: the run.
            wants_theta: whether to compute the gradients with respect to the bandwidths.
            wants_image: whether to compute the gradient with respect to the image.
        """
        self._voxels, self._kernels, self._features, self._spec = voxels, kernels, features, spec
        self._wants_theta, self._wants_moments, self._wants_image = wants_theta, wants_theta or wants_image, wants_image

    def run(self, record: Any, steps: Sequence[float], by_logits: Any, volume: VolumeBackward | None = None) -> Gradients:
        """Run the steps backward.

        Args:
            record: (step, channel, voxel) marginals at the start of each step.
            steps: their lengths.
            by_logits: (label, voxel) gradient of the loss with respect to the logits of the last step; overwritten with a volume term.
            volume: the volume term of the run; None: it has none.
        """
        xp = self._voxels.device.xp
        by_logits = xp.ascontiguousarray(by_logits)  # a row per label, which kernels read
        num_labels, dtype = len(by_logits), by_logits.dtype
        num_modalities = max((features.num_modalities for features in self._features), default=0)
        self._compatibility = self._voxels.device.upload(np.asarray(self._spec.compatibility, dtype=dtype))
        self._found = Gradients(
            scores=xp.zeros_like(by_logits),
            weights=np.zeros((len(self._kernels), num_labels)),
            compatibility=np.zeros((num_labels, num_labels)),
            theta=[np.zeros(len(features)) for features in self._features],
            image=xp.zeros((num_modalities, self._voxels.num_voxels), dtype=dtype) if self._wants_image else None,
        )
        # (voxel) per kernel: gradients for the factor of the normalization and for the message of all ones, summed over the steps.
        self._by_scale = [xp.zeros(self._voxels.num_voxels, dtype=dtype) for _ in self._kernels]
        self._by_ones = [xp.zeros(self._voxels.num_voxels, dtype=dtype) for _ in self._kernels]
        by_x = by_logits
        for t in reversed(range(len(steps))):
            if volume is not None:
                volume.step_back(t, float(steps[t]), by_x)
            by_x = self._step_back(all_marginals(xp, record[t], num_labels), float(steps[t]), by_x)
        self._found.scores += by_x
        if volume is not None:
            volume.finish(self._found.scores)
        if self._wants_moments:
            for m in range(len(self._kernels)):
                self._normalization_back(m)
        for theta, features in zip(self._found.theta, self._features, strict=True):
            theta /= np.array(features.thetas)
        return self._found

    def _step_back(self, marginals: Any, step: float, by_x: Any) -> Any:
        """Turn the gradient for the logits after a step into that for the logits before it."""
        y = step * by_x
        self._found.scores += y
        z = y.sum(axis=0) - y if self._spec.is_potts else self._by_neighbors(y)
        by_marginals = sum(self._kernel_back(m, marginals, y, z) for m in range(len(self._kernels)))
        # Known up to one number per voxel, to which the softmax is blind: that of the last label is 0.
        own = self._voxels.device.xp.zeros_like(y)
        own[:-1] += by_marginals
        return (1.0 - step) * by_x + marginals * (own - (marginals * own).sum(axis=0))

    def _by_neighbors(self, y: Any) -> Any:
        """Compatibility times y; row by row, since a matrix product would need another library and might round to fewer digits."""
        z = self._voxels.device.xp.empty_like(y)
        for row, out in zip(self._compatibility, z, strict=True):
            out[...] = (row[:, None] * y).sum(axis=0)
        return z

    def _kernel_back(self, m: int, marginals: Any, y: Any, z: Any) -> Any:
        """One kernel's part of a step: gradients (all labels but the last, voxel) with respect to the marginals it was sent."""
        xp, kernel, voxels = self._voxels.device.xp, self._kernels[m], self._voxels
        weight = self._spec.weights[m].astype(y.dtype)
        scale, sent_scale = kernel.scale, kernel.scale if kernel.scales_sent else None
        q = marginals[:-1]
        # Marginals sum to 1: the gradient of the last label is subtracted, so its channel need not be filtered. Its effect on the
        # normalization is collected in `_by_ones`.
        weights = voxels.device.upload(weight[:, None])
        by_message = weights[-1] * z[-1] - weights[:-1] * z[:-1]
        self._by_ones[m] -= weights[-1] * z[-1]
        kv = filtered(kernel.filter, voxels, q, sent=sent_scale)
        u = by_message if scale is None else by_message * scale
        ktu = filtered(kernel.filter, voxels, u, transposed=True)
        message = xp.empty_like(z)
        message[:-1] = kv if scale is None else kv * scale
        message[-1] = kernel.ones - message[:-1].sum(axis=0)
        self._found.weights[m] -= voxels.device.download((message * z).sum(axis=1, dtype=np.float64))
        for k in range(len(z)):
            by_row = voxels.device.download((message[k] * y).sum(axis=1, dtype=np.float64))
            self._found.compatibility[k] -= float(weight[k]) * by_row
        if self._wants_moments:
            if scale is not None:
                self._by_scale[m] += (by_message * kv).sum(axis=0)
            if sent_scale is not None:
                self._by_scale[m] += (q * ktu).sum(axis=0)
            self._add_moments(m, u, q if sent_scale is None else q * sent_scale, kv, ktu)
        return ktu if sent_scale is None else ktu * sent_scale

    def _add_moments(self, m: int, u: Any, v: Any, kv: Any, ktu: Any) -> None:
        features = self._features[m]
        by_image = self._found.image if features.num_modalities > 0 else None
        squared = self._found.theta[m] if self._wants_theta else None
        add_moments(self._kernels[m].filter, self._voxels, features, u, v, kv, ktu, squared, by_image)

    def _normalization_back(self, m: int) -> None:
        """Backward pass of the row sums D.

        They normalize the messages and depend on bandwidths and image too: with the gradients for the message of all ones and for D,
        there are two more sums of the form <u, K v>.
        """
        xp, kernel, voxels = self._voxels.device.xp, self._kernels[m], self._voxels
        scale, ones = kernel.scale, kernel.ones
        unit = xp.ones_like(ones)
        # u: gradient for the message of all ones, scaled; v: the values sent for it.
        u = self._by_ones[m] if scale is None else self._by_ones[m] * scale
        v = scale if kernel.scales_sent else unit
        kv = ones if scale is None else ones / scale
        ktu = filtered(kernel.filter, voxels, u[None], transposed=True)[0]
        self._add_moments(m, u[None], v[None], kv[None], ktu[None])
        if scale is None:
            return
        # The gradient for D itself. Symmetric: the scale is D^-1/2, on both sides; after: D^-1, on the receiving side.
        total = self._by_scale[m] + self._by_ones[m] * kv
        if kernel.scales_sent:
            u = -0.5 * scale**3 * (total + ktu)
            row_sum = 1 / scale**2
        else:
            u = -(scale**2) * total
            row_sum = 1 / scale
        ktu = filtered(kernel.filter, voxels, u[None], transposed=True)[0]
        self._add_moments(m, u[None], unit[None], row_sum[None], ktu[None])
