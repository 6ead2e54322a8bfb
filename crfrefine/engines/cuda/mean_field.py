"""The mean-field iteration on the device (docs/reference/math.md, section 3).

The host decides which kernels are launched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from crfrefine.base.array_types import Bool, Float64
from crfrefine.base.numerics import FLIPPED_SHARE
from crfrefine.engines.base import Progress
from crfrefine.engines.cuda.filters import Filter
from crfrefine.engines.cuda.launches import Arguments
from crfrefine.engines.cuda.rows import (
    add_up,
    from_rows,
    shape_of_rows,
    to_rows,
    upload_float32,
)
from crfrefine.engines.cuda.volume import VolumeSteps
from crfrefine.engines.cuda.voxels import Voxels
from crfrefine.engines.volumes import volume_part
from crfrefine.parameters.specs import MeanFieldSpec

# Fields of a spec that this engine takes into account; a spec with other ones is refused.
_FIELDS = (
    "weights",
    "compatibility",
    "num_iterations",
    "temperature",
    "tolerance",
    "bias",
    "volume_weight",
)

# Sums over the voxels that an update leaves; the same as in kernels/cuda/mean_field.cu.
_QUADRATIC, _UNARY, _LARGEST, _DIVERGENCE, _FLIPS = range(5)
_NUM_SUMS = 5
# Arguments of an update that does no filter's last pass: without rows and a box the others are not
# read.
_NO_ENDINGS: Arguments = {
    "vertex_rows": None,
    "corner_vertex": None,
    "corner_weight": None,
    "num_corners": 0,
    "amplitude": 0.0,
    "slice_scale": None,
    "slice_weight": None,
    "box": None,
    "places": None,
    "stride": 1,
    "extent": 1,
    "taps": None,
    "radius": 0,
    "axis_scale": None,
    "axis_weight": None,
}
_MAX_THREADS = 1 << 17  # of an update: an H200 holds about as many at a time


class MeanFieldRun:
    """The iteration on (label, *grid) float32 logits on the device.

    Attributes:
        out: (label, *grid) logits of the last step; outside the mask the input divided by the
            temperature.
        converged: whether the stopping rule was met.
        num_steps: the steps that were taken.
        record: (step, channel, voxel) marginals at the start of each step, and with a volume term
            those after the last step, too; None unless asked for.
        volume: the volume term with its biases; None without it.
        volume_part: (voxel) on the host, True where the term acts; None without it.
    """

    def __init__(
        self,
        voxels: Voxels,
        kernels: Sequence[Filter],
        spec: MeanFieldSpec,
        logits: Any,
        *,
        records: bool = False,
    ) -> None:
        """Allocate the memory of a run, and compute its first marginals.

        `records` saves the marginals for the backward pass.
        """
        spec.require_known(_FIELDS, "cuda")
        xp = voxels.device.xp
        num_channels = spec.num_channels
        num_voxels = voxels.num_voxels
        shape = shape_of_rows(num_channels, num_voxels)
        self._voxels = voxels
        self._spec = spec
        self._logits = logits
        self._constants = {
            "CRF_LABELS": len(logits),
            "CRF_CHANNELS": num_channels,
            "CRF_WIDTH": shape[-1],
        }
        self._upload_model(kernels)

        self._marginals = xp.empty(shape, dtype=np.float32)
        self._messages: Any = None  # the sum of those that kernels have added
        self._endings = _NO_ENDINGS  # of the filters whose last pass `update` does
        self._num_threads = min(num_voxels, _MAX_THREADS)
        # Parts of the newest update's sums, (sum, thread), and the sums of all updates. The first
        # update leaves one sum as it was; all others are written each time.
        self._parts = xp.zeros((_NUM_SUMS, self._num_threads), dtype=np.float64)
        self._totals = xp.empty((spec.num_iterations + 1, _NUM_SUMS), dtype=np.float64)
        self.out = logits * self._inverse_temperature
        self.converged = False
        self.num_steps = 0
        self.record: Any = None
        if records:
            shape = (spec.num_recorded, num_channels, num_voxels)
            self.record = xp.empty(shape, dtype=np.float32)

        self._update(out=None if self._bias is None else self.out)
        self.volume: VolumeSteps | None = None
        self.volume_part: Bool | None = None
        self._old = None  # marginals before a step, where the volume term changes the new ones
        if spec.volume_weight > 0.0:
            on_host = voxels.device.download(logits)
            self.volume_part = volume_part(on_host, voxels.mask, spec, voxels.axes)
            self.volume = VolumeSteps(voxels, spec, self.out, self.volume_part)
            if spec.tolerance > 0.0:
                self._old = xp.empty_like(self._marginals)

    def _upload_model(self, kernels: Sequence[Filter]) -> None:
        """Upload the parameters, the weights in rows of channels."""
        spec = self._spec
        device = self._voxels.device
        num_channels = spec.num_channels
        self._weighted_ones = None
        if num_channels < spec.num_labels:
            self._weighted_ones = device.xp.zeros(self._voxels.num_voxels, dtype=np.float32)
        self._kernels = []
        for kernel, weight in zip(kernels, spec.weights, strict=True):
            rows = to_rows(np, weight[:num_channels, None])
            self._kernels.append((kernel, device.upload(rows[:, 0])))
            if self._weighted_ones is not None:
                self._weighted_ones += kernel.ones * float(weight[0])
        self._compatibility = upload_float32(device, spec.compatibility)
        self._inverse_temperature = np.float32(1.0) / np.float32(spec.temperature)
        self._bias = upload_float32(device, spec.bias)

    def take_steps(self, progress: Progress | None = None) -> None:
        """Take all steps, or until no further one is needed; callers do this once per object.

        Without a tolerance and a volume term the host does not wait.
        """
        spec = self._spec
        may_stop = spec.tolerance > 0.0
        with self._voxels.device.recording() as filterings:
            self._filter_marginals()

        while self.num_steps < spec.num_iterations and not self.converged:
            if progress is not None:
                progress("mean field", self.num_steps, spec.num_iterations)
            self._store_marginals()
            if self._old is not None:
                self._old[...] = self._marginals
            for launch in filterings:
                launch()
            self.num_steps += 1
            if self.volume is None:
                # A step that may turn out to be the last one stores its logits.
                stores = may_stop or self.num_steps == spec.num_iterations
                out = self.out if stores else None
                self._update(self._marginals, has_messages=True, out=out, wants_divergence=may_stop)
            else:
                self._update(self._marginals, has_messages=True, out=self.out)
                self.volume.end_step()
                # The logits with the biases give the marginals, and the sums that depend on these.
                self._update(self._old, refined=self.out, wants_divergence=may_stop)
            if may_stop:
                last = self._downloaded_sums()[-1]  # this waits for the step
                num_voxels = self._voxels.num_voxels
                has_few_flips = last[_FLIPS] < FLIPPED_SHARE * num_voxels
                is_near = last[_DIVERGENCE] / num_voxels < spec.tolerance
                self.converged = bool(is_near and has_few_flips)
        if self.volume is not None:
            self._store_marginals()

    def energy(self) -> tuple[float, ...]:
        """Return the free energy at the start of each step; this waits for the steps."""
        totals = self._downloaded_sums()
        # The logits are relative to the largest one of each voxel.
        energy = totals[:-1, _UNARY] - totals[0, _LARGEST] + 0.5 * totals[1:, _QUADRATIC]
        if self.volume is not None:
            energy += np.array(self.volume.energies)
        return tuple(energy.tolist())

    def _downloaded_sums(self) -> Float64:
        """Return the sums of the updates so far, (update, sum); this waits for the updates."""
        return self._voxels.device.download(self._totals[: self.num_steps + 1])

    def _filter_marginals(self) -> None:
        """Launch the filters of a step, except the endings that the update does itself.

        It does one of each kind, if there is one group of channels.
        """
        ended = set()
        for kernel, weight in self._kernels:
            kind = type(kernel)
            if kind not in ended and len(self._marginals) == 1:
                ending = kernel.filter_until_last(self._marginals[0], weight[0])
                if ending is not None:
                    self._endings = {**self._endings, **ending}
                    ended.add(kind)
                    continue
            # The first message is not added: it overwrites the rows.
            adds = self._messages is not None
            if not adds:
                self._messages = self._voxels.device.xp.empty_like(self._marginals)
            kernel.apply(
                self._marginals,
                kernel.sent_scale,
                self._messages,
                received=kernel.scale,
                weights=weight,
                adds=adds,
            )

    def _update(
        self,
        old: Any = None,
        *,
        has_messages: bool = False,
        refined: Any = None,
        out: Any = None,
        wants_divergence: bool = False,
    ) -> None:
        """Compute the marginals and sums over the voxels; see kernels/cuda/mean_field.cu.

        Nobody asks for the sums of a run that is recorded, and they are not added up.
        """
        voxels = self._voxels
        endings = self._endings if has_messages else _NO_ENDINGS
        voxels.device.launch(
            "mean_field",
            "update",
            self._constants,
            self._num_threads,
            logits=self._logits,
            bias=self._bias,
            grid_size=voxels.grid_size,
            grid_index=voxels.grid_index,
            num_voxels=voxels.num_voxels,
            inverse_temperature=self._inverse_temperature,
            old_marginals=old,
            marginals=self._marginals,
            has_messages=has_messages,
            messages=self._messages if has_messages else None,
            **endings,
            weighted_ones=self._weighted_ones,
            compatibility=self._compatibility,
            is_potts=self._spec.is_potts,
            wants_divergence=wants_divergence,
            refined=refined,
            out=out,
            num_threads=self._num_threads,
            partial=self._parts,
        )
        if self.record is None:
            add_up(voxels.device, self._parts, self._totals[self.num_steps])

    def _store_marginals(self) -> None:
        """Store the marginals at the start of the next step, if they are recorded."""
        if self.record is not None:
            from_rows(self._marginals, self.record[self.num_steps])
