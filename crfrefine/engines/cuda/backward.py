"""The backward pass of the mean field on the device (docs/reference/math.md; kernels/cuda/backward.h has the names).

The host decides what is launched, and waits once, for the sums of all steps; with a volume term twice per step more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.engines.cuda.device import num_row_groups, precision, row_width
from crfrefine.engines.cuda.feature_columns import FeatureColumns
from crfrefine.engines.cuda.kernel_set import Kernel
from crfrefine.engines.cuda.memory import PAIR_THREADS, SUM_THREADS, pair_blocks, pair_tile, sum_threads
from crfrefine.engines.cuda.moments import Moments, Scratch, Singles
from crfrefine.engines.cuda.sums import Sums
from crfrefine.engines.cuda.volume_backward import VolumeBackward
from crfrefine.engines.cuda.voxels import Voxels

if TYPE_CHECKING:
    from crfrefine.specs import MeanFieldSpec


@dataclass
class Gradients:
    """Gradients of a loss; arrays on the device, sums on the host in float64.

    Attributes:
        logits: (label, *grid).
        weights: (kernel, label).
        compatibility: (label, label), including the diagonal.
        temperature: number.
        bias: (label).
        theta: (feature) per kernel, intensities first, box axes last; zeros unless asked for.
    """

    logits: Any
    weights: NDArray[np.float64]
    compatibility: NDArray[np.float64]
    temperature: float
    bias: NDArray[np.float64]
    theta: list[NDArray[np.float64]]


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
        """Take the model of the forward pass, and allocate what the steps need; see `memory.backward_bytes`.

        Args:
            voxels: the masked voxels.
            kernels: the normalized kernels.
            features: features of each kernel.
            spec: the run.
            dtype: float32 or float64, that of the kernels.
            wants_theta: whether to compute the gradients with respect to the bandwidths.
            by_image: (modality, *grid) zeros on the device, which become the gradient with respect to the image; None: not asked for.
        """
        self._voxels, self._kernels, self._features, self._spec = voxels, kernels, features, spec
        self._device, self._dtype = voxels.device, np.dtype(dtype)
        xp, num_voxels, num_labels = voxels.device.xp, voxels.num_voxels, spec.num_labels
        num_sent = num_labels - 1
        width, num_groups = row_width(num_sent), num_row_groups(num_sent)
        self._constants = {"CRF_LABELS": num_labels, "CRF_CHANNELS": num_sent, "CRF_WIDTH": width, **precision(dtype)}
        self._weights = self._device.upload(np.asarray(spec.weights, dtype=dtype))
        self._compatibility = self._device.upload(np.asarray(spec.compatibility, dtype=dtype))
        self._tile, num_slices = pair_tile(num_labels, dtype)
        self._num_blocks = pair_blocks(num_labels, num_voxels, dtype)
        self._sums = Sums(voxels.device)
        self._products = [self._sums.reserve(num_labels**2, self._num_blocks * num_slices) for _ in kernels]
        self._by_image = by_image
        self._by_voxels = None if by_image is None else xp.zeros((len(by_image), num_voxels), dtype=dtype)
        self._is_differentiated = [wants_theta or (by_image is not None and of_kernel.num_modalities > 0) for of_kernel in features]
        self._wants_theta = wants_theta
        scratch = Scratch(voxels, num_sent, dtype) if any(self._is_differentiated) else None
        self._moments = [
            Moments(kernel, voxels, of_kernel, num_sent, dtype, self._sums, scratch, wants_theta=wants_theta, by_image=self._by_voxels)
            if wanted and scratch is not None
            else None
            for kernel, of_kernel, wanted in zip(kernels, features, self._is_differentiated, strict=True)
        ]
        self._by_x, self._by_start = (xp.empty((num_labels, num_voxels), dtype=dtype) for _ in range(2))

        def rows(is_needed: bool = True) -> Any:
            return xp.empty((num_groups, num_voxels, width), dtype=dtype) if is_needed else None

        self._marginals, self._by_message = rows(), rows()
        both: tuple[Any, Any] = (rows(), None) if scratch is None else scratch.rows(num_sent)
        self._filtered, self._filtered_back = both
        self._by_marginals = rows(len(kernels) > 1 or not all(self._moments))
        self._unit = xp.ones((num_groups, width), dtype=dtype)

    def run(self, record: Any, steps: Sequence[float], by_out: Any, logits: Any, volume: VolumeBackward | None = None) -> Gradients:
        """Run the steps backward; once per object, whose memory the results take over.

        Args:
            record: (step, channel, voxel) marginals at the start of each step.
            steps: their lengths.
            by_out: (label, *grid) gradient of the loss with respect to the refined logits.
            logits: (label, *grid) that the run was given.
            volume: the volume term of the run; None: it has none.
        """
        voxels = self._voxels
        num_steps = len(steps) if self._kernels else 0  # without a kernel, a step changes nothing but volumes
        is_known = num_steps > 0 and volume is None  # With a volume term more is added to the gradient first.
        self._launch(
            "begin_backward",
            voxels.num_voxels,
            by_out,
            voxels.grid_size,
            voxels.grid_index,
            voxels.num_voxels,
            self._by_x,
            self._by_start,
            steps[-1] if is_known else 0.0,
            *(self._penalty(0) if is_known else (None, None, 0)),
            record[-1] if is_known else None,
            self._marginals,
            self._by_message,
        )
        for t in reversed(range(num_steps)):
            if volume is not None:
                volume.step_back(t, steps[t], self._by_x)
                given = (self._by_x, voxels.num_voxels, steps[t], *self._penalty(0), record[t])
                self._launch("begin_step_back", voxels.num_voxels, *given, self._marginals, self._by_message)
            for m in range(len(self._kernels)):
                self._kernel_back(m, t, record, steps, prepares_next=volume is None)
        if volume is not None and not self._kernels:
            for t in reversed(range(len(steps))):
                volume.step_back(t, steps[t], self._by_x)
                self._by_start += steps[t] * self._by_x
                self._by_x *= 1.0 - steps[t]
        del self._marginals, self._by_message, self._by_marginals
        if any(self._is_differentiated):
            self._normalizations_back()
        del self._moments, self._filtered, self._filtered_back
        if volume is not None:
            volume.finish(self._by_x)
        self._image_back()
        by_logits = self._logits_back(by_out, logits)
        return self._gradients(by_logits, self._sums.totals())

    def _kernel_back(self, m: int, t: int, record: Any, steps: Sequence[float], *, prepares_next: bool) -> None:
        """Take one kernel's part of a step back. `prepares_next`: the last one leaves what the first kernel of the step before filters."""
        kernel, moments, num_channels = self._kernels[m], self._moments[m], self._spec.num_labels - 1
        scale, sent_scale = kernel.scale, kernel.scale if kernel.scales_sent else None
        if moments is not None:
            moments.add_step(self._marginals, self._by_message)  # first: what is filtered below lies in the same memory
        kernel.filter.accumulate(self._marginals, sent_scale, None, self._unit, self._filtered, adds=False)
        if moments is None:
            filtered_back, back_scale = None, None
            arguments = (self._by_message, scale, sent_scale, self._unit, self._by_marginals)
            kernel.filter.accumulate(*arguments, transposed=True, adds=m > 0)
        else:
            filtered_back, back_scale = self._filtered_back, sent_scale
            kernel.filter.accumulate(self._by_message, scale, None, self._unit, filtered_back, transposed=True, adds=False)
        is_last = m + 1 == len(self._kernels)
        next_t = t if not is_last else t - 1 if prepares_next else -1
        follows = self._penalty(0 if is_last else m + 1) if next_t >= 0 else (None, None, 0)
        constants = {**self._constants, "CRF_THREADS": PAIR_THREADS, "CRF_TILE": self._tile}
        self._device.launch_blocks(
            "take_messages",
            "take_messages",
            constants,
            self._num_blocks,
            self._voxels.num_voxels,
            self._num_blocks,
            steps[t],
            self._by_x,
            self._marginals,
            record[t, num_channels] if record.shape[1] > num_channels else None,
            self._by_message,
            self._filtered,
            filtered_back,
            scale,
            back_scale,
            kernel.ones,
            None if moments is None else moments.by_received,
            None if moments is None else moments.by_sent,
            self._by_marginals,
            int(m > 0 or moments is None),
            self._by_start if is_last else None,
            *follows,
            steps[max(next_t, 0)],
            record[next_t] if is_last and next_t >= 0 else None,
            self._products[m],
        )

    def _normalizations_back(self) -> None:
        """Add what the normalizations pass on to bandwidths and image."""
        singles = Singles(self._voxels, self._dtype)
        for m, moments in enumerate(self._moments):
            if moments is not None:
                arguments = (self._by_start, *self._penalty(m), self._voxels.num_voxels, singles.by_ones)
                self._launch("differentiate_ones", self._voxels.num_voxels, *arguments)
                moments.finish(singles)

    def _logits_back(self, by_out: Any, logits: Any) -> Any:
        """Return the gradient with respect to the logits, and keep its sums."""
        voxels, by_logits = self._voxels, self._device.xp.empty_like(by_out)
        inverse = float(self._dtype.type(1.0) / self._dtype.type(self._spec.temperature))
        size, num_threads = int(by_out.size), sum_threads(voxels.num_voxels)
        inside = self._sums.reserve(self._spec.num_labels + 1, num_threads)
        outside = self._sums.reserve(1, SUM_THREADS) if voxels.num_voxels < voxels.grid_size else None
        if outside is not None:
            self._launch("finish_outside", SUM_THREADS, by_out, logits, size, inverse, by_logits, SUM_THREADS, outside)
        self._launch(
            "finish_inside",
            num_threads,
            self._by_x,
            self._by_start,
            logits,
            voxels.grid_size,
            voxels.grid_index,
            voxels.num_voxels,
            inverse,
            int(outside is not None),
            by_logits,
            num_threads,
            inside,
        )
        return by_logits

    def _image_back(self) -> None:
        """Put the gradient with respect to the image at its places, if it is asked for."""
        if self._by_image is None or self._by_voxels is None:
            return
        voxels, constants = self._voxels, {"CRF_WIDTH": 1, **precision(self._dtype)}
        for of_voxels, of_grid in zip(self._by_voxels.reshape(len(self._by_voxels), -1, 1), self._by_image, strict=True):
            arguments = (of_voxels, voxels.num_voxels, voxels.grid_index, 1, voxels.grid_size, of_grid)
            voxels.device.launch("voxels", "scatter_rows", constants, voxels.num_voxels, *arguments)

    def _gradients(self, by_logits: Any, totals: list[NDArray[np.float64]]) -> Gradients:
        """Put the results together from the totals of the sums, in the order in which they were reserved."""
        spec, num_labels, found = self._spec, self._spec.num_labels, iter(totals)
        products = np.array([next(found) for _ in self._kernels]).reshape(-1, num_labels, num_labels)
        compatibility, weights = np.asarray(spec.compatibility, dtype=np.float64), spec.weights.astype(np.float64)
        of_features = [next(found) if wanted else None for wanted in self._is_differentiated]
        theta = [
            total / np.array(features.thetas) if total is not None and self._wants_theta else np.zeros(len(features))
            for total, features in zip(of_features, self._features, strict=True)
        ]
        *by_bias, by_temperature = next(found).tolist()
        by_temperature += sum(float(total.sum()) for total in found)
        if spec.bias is not None:
            by_temperature += float((np.array(by_bias) * spec.bias).sum())
        return Gradients(
            logits=by_logits,
            weights=-(products * compatibility).sum(axis=2),
            compatibility=-(products * weights[:, :, None]).sum(axis=0),
            temperature=-by_temperature / spec.temperature,
            bias=np.array(by_bias),
            theta=theta,
        )

    def _penalty(self, m: int) -> tuple[Any, Any, int]:
        """A kernel's weights, the compatibility, and whether it is Potts."""
        return self._weights[m], self._compatibility, int(self._spec.is_potts)

    def _launch(self, kernel: str, num_threads: int, *arguments: Any) -> None:
        self._device.launch("mean_field_backward", kernel, self._constants, num_threads, *arguments)
