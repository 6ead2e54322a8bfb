"""The backward pass of the mean field on the device.

kernels/cuda/mean_field_backward.cu has the names and the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from crfrefine.engines.base import MeanFieldGradients
from crfrefine.engines.cuda.filters import Filter
from crfrefine.engines.cuda.launches import Arguments
from crfrefine.engines.cuda.moments import Moments, Pair
from crfrefine.engines.cuda.rows import (
    Products,
    Room,
    Sums,
    fill_rows,
    shape_of_rows,
    upload_float32,
)
from crfrefine.engines.cuda.volume import VolumeBackward
from crfrefine.engines.cuda.voxels import Voxels
from crfrefine.parameters.specs import KernelSetSpec, MeanFieldSpec


class Backward:
    """One backward pass."""

    def __init__(
        self,
        voxels: Voxels,
        kernels: Sequence[Filter],
        specs: tuple[KernelSetSpec, MeanFieldSpec],
        *,
        wants_theta: bool,
        wants_image: bool,
        stays: bool,
    ) -> None:
        """Take the model of the forward pass, and allocate the memory of the steps.

        With `stays` the gradients of the parameters stay on the device.
        """
        self._voxels = voxels
        self._device = voxels.device
        self._kernels = kernels
        self._kernel_set, self._spec = specs
        self._wants_theta = wants_theta
        self._stays = stays
        num_voxels = voxels.num_voxels
        self._num_labels = num_labels = self._spec.num_labels
        self._weights = upload_float32(self._device, self._spec.weights)
        self._compatibility = upload_float32(self._device, self._spec.compatibility)
        self._sums = Sums(voxels.device)
        xp = self._device.xp
        # (label, voxel) gradients with respect to x and to the first x, and the messages.
        of_labels = (num_labels, num_voxels)
        self._by_x = xp.empty(of_labels, dtype=np.float32)
        self._by_start = xp.zeros(of_labels, dtype=np.float32)
        self._messages = xp.empty(of_labels, dtype=np.float32)
        # Of messages and gradients with respect to x, a set for each kernel.
        self._products = Products(self._sums, self._messages, self._by_x, num_sets=len(kernels))
        self._by_intensity = None
        if wants_image:
            self._by_intensity = xp.zeros((len(voxels.image), num_voxels), dtype=np.float32)

        # Rows of the marginals, of the gradients with respect to messages and to marginals, and of
        # the filtered first two.
        shape = shape_of_rows(num_labels - 1, num_voxels)
        self._constants = {"CRF_WIDTH": shape[-1]}
        rows = xp.zeros((4, *shape), dtype=np.float32)
        self._marginals, self._by_message, self._by_marginals, self._filtered_back = rows
        self._filtered = xp.empty(shape, dtype=np.float32)
        # The sums for the gradients of each kernel, None if none of them is wanted.
        self._moments: list[Moments | None] = []
        room = Room(xp)
        for kernel, spec in zip(kernels, self._kernel_set.kernels, strict=True):
            moments = None
            if wants_theta or (wants_image and spec.theta_intensity):
                moments = Moments(
                    kernel,
                    spec,
                    voxels,
                    self._sums,
                    room,
                    wants_theta=wants_theta,
                    by_image=self._by_intensity,
                )
            self._moments.append(moments)
        self._num_features = sum(len(moments.thetas) for moments in self._moments if moments)

    def run(
        self, record: Any, by_out: Any, logits: Any, volume: VolumeBackward | None
    ) -> MeanFieldGradients:
        """Run the steps backward; callers do this once per object.

        Args:
            record: the record of a `Tape`, on the device.
            by_out: (label, *grid), the gradient of the loss with respect to the tape's logits.
            logits: (label, *grid), the input of the forward pass.
            volume: the gradients of the volume term; None without the term.
        """
        num_labels = self._num_labels
        self._voxels.gather(by_out, self._by_x)
        for step in reversed(range(self._spec.num_iterations)):
            if volume is not None:
                volume.step_back(step, self._by_x)
            fill_rows(record[step, : num_labels - 1], self._marginals)
            for number in range(len(self._kernels)):
                self._kernel_back(number)
            self._launch(
                "end_step_back",
                num_labels=num_labels,
                num_channels=record.shape[1],
                record=record[step],
                by_marginals=self._by_marginals,
                by_x=self._by_x,
                by_start=self._by_start,
            )
        del self._marginals, self._by_message, self._by_marginals
        del self._filtered_back, self._messages, self._products

        for number, moments in enumerate(self._moments):
            if moments is not None:
                by_ones = self._device.xp.empty_like(self._voxels.ones)
                self._launch(
                    "differentiate_ones",
                    **self._penalty(number),
                    by_start=self._by_start,
                    gradient=by_ones,
                )
                moments.finish(by_ones)
        del self._moments, self._filtered
        by_image = None
        if self._by_intensity is not None:
            shape = (len(self._by_intensity), *by_out.shape[1:])
            by_image = self._device.xp.zeros(shape, dtype=np.float32)
            self._voxels.scatter(self._by_intensity, by_image)
        by_logits = self._logits_back(by_out, logits)
        return self._gradients(by_logits, by_image, volume)

    def _kernel_back(self, number: int) -> None:
        """Do one kernel's part of a step backward."""
        kernel = self._kernels[number]
        moments = self._moments[number]
        self._launch(
            "send_back", **self._penalty(number), by_x=self._by_x, by_message=self._by_message
        )
        if moments is not None:
            moments.add_pair(
                Pair(
                    self._marginals,
                    kernel.sent_scale,
                    self._by_message,
                    kernel.scale,
                    self._num_labels - 1,
                )
            )
        kernel.apply(self._marginals, kernel.sent_scale, self._filtered)
        kernel.apply(self._by_message, kernel.scale, self._filtered_back, transposed=True)

        self._launch(
            "take_messages",
            num_labels=self._num_labels,
            marginals=self._marginals,
            by_message=self._by_message,
            filtered=self._filtered,
            filtered_back=self._filtered_back,
            scale=kernel.scale,
            back_scale=kernel.sent_scale,
            ones=kernel.ones,
            by_received=None if moments is None else moments.by_received,
            by_sent=None if moments is None else moments.by_sent,
            by_marginals=self._by_marginals,
            adds=number > 0,
            messages=self._messages,
        )
        self._products.add(number)

    def _logits_back(self, by_out: Any, logits: Any) -> Any:
        """Return the gradient with respect to the logits; add its sums for bias and temperature."""
        inverse = np.float32(1.0) / np.float32(self._spec.temperature)
        self._by_start += self._by_x
        self._by_start *= inverse
        Products(self._sums, self._by_start, None).add()
        by_logits = by_out * inverse
        self._voxels.scatter(self._by_start, by_logits)
        # A logit of minus infinity has no gradient except for rounding, and is left out.
        xp = self._device.xp
        finite = xp.where(xp.isfinite(logits), logits, np.float32(0.0))
        Products(self._sums, by_logits.reshape(1, -1), finite.reshape(1, -1)).add()
        return by_logits

    def _gradients(
        self, by_logits: Any, by_image: Any, volume: VolumeBackward | None
    ) -> MeanFieldGradients:
        """Put the results together.

        Totals come in the order in which their sums were reserved: the kernels' products, their
        bandwidths, the bias, the temperature.
        """
        device = self._device
        spec = self._spec
        num_kernels = len(self._kernels)
        num_labels = self._num_labels
        # The number of the sum of each bandwidth's gradient; -1 where that is not wanted, or the
        # axis has one voxel.
        thetas: list[float] = []
        has_sum: list[bool] = []
        for kernel in self._kernel_set.kernels:
            thetas += kernel.theta
            has_sum += [True] * len(kernel.theta_intensity)
            axes = range(len(kernel.theta_position))
            has_sum += [axis in self._voxels.source_axis for axis in axes]
        sources = np.where(has_sum, np.cumsum(has_sum) - 1, -1)
        if not self._wants_theta:
            sources[:] = -1
        sizes = (num_kernels * num_labels, num_labels**2, num_labels, 1, len(thetas))
        gradient = device.xp.empty(sum(sizes), dtype=np.float64)
        device.launch(
            "mean_field_backward",
            "combine_sums",
            self._constants,
            gradient.size,
            num_kernels=num_kernels,
            num_labels=num_labels,
            totals=self._sums.add_up(),
            num_features=self._num_features,
            weights=self._weights,
            compatibility=self._compatibility,
            bias=upload_float32(device, spec.bias),
            temperature=spec.temperature,
            num_thetas=len(thetas),
            sources=device.upload(sources.astype(np.int32)),
            thetas=device.upload(np.array(thetas)),
            gradient=gradient,
        )
        if not self._stays:
            gradient = device.download(gradient)
        ends = np.cumsum(sizes).tolist()
        weights, compatibility, by_bias, temperature, by_theta = np.split(gradient, ends[:-1])
        by_temperature: Any = temperature.reshape(())
        if not self._stays:
            by_temperature = float(by_temperature)
        by_volume = None
        if volume is not None:
            by_volume = self._spec.volume_weight_gradient(volume.by_slack)
        return MeanFieldGradients(
            logits=by_logits,
            weights=weights.reshape(num_kernels, num_labels),
            compatibility=compatibility.reshape(num_labels, num_labels),
            temperature=by_temperature,
            bias=by_bias,
            theta=by_theta,
            image=by_image,
            volume_weight=by_volume,
        )

    def _penalty(self, number: int) -> Arguments:
        """Return the arguments for a kernel's weights and the compatibility."""
        return {
            "weights": self._weights[number],
            "compatibility": self._compatibility,
            "is_potts": self._spec.is_potts,
            "num_labels": self._num_labels,
        }

    def _launch(self, kernel: str, /, **arguments: Any) -> None:
        """Run a kernel with a thread for each voxel."""
        self._voxels.launch("mean_field_backward", kernel, self._constants, **arguments)
