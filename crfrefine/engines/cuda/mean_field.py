"""The mean-field iteration on the device (docs/reference/math.md, section 3): the host only decides on the next launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from crfrefine.base.array_types import Bool, Float64
from crfrefine.engines.cuda.kernel_set import Kernel
from crfrefine.engines.cuda.rows import grouped, num_row_groups, row_width
from crfrefine.engines.cuda.sums import MAX_THREADS, add_up
from crfrefine.engines.cuda.volume import VolumeSteps
from crfrefine.engines.cuda.voxels import Voxels

if TYPE_CHECKING:
    from crfrefine.parameters.specs import MeanFieldSpec

_FIELDS = (
    "weights",
    "compatibility",
    "num_iterations",
    "temperature",
    "tolerance",
    "bias",
    "volume_weight",
)  # of a spec; others are refused

# The same as in kernels/cuda/mean_field.cu.
_NUM_SUMS = 5
_NUM_STEPS, _CONVERGED, _NUM_STATES = 2, 3, 4


class MeanFieldOutcome(NamedTuple):
    """Result of a run."""

    logits: Any  # (label, *grid) on the device
    converged: bool  # whether the stopping rule was met
    energy: tuple[float, ...]  # free energy of the marginals at the start of each step
    # (step, channel, voxel) marginals at the start of each step, with a volume term those after the last step, too; None unless asked for
    record: Any
    volume_biases: Float64 | None  # (steps, label), those of the volume term; None without it


class MeanFieldRun:
    """The iteration on (label, *grid) float32 logits on the device."""

    def __init__(
        self, voxels: Voxels, kernels: Sequence[Kernel], spec: MeanFieldSpec, logits: Any, part: Bool | None, *, records: bool = False
    ) -> None:
        """Take a run.

        `part` is where the volume term applies, (voxel); None means everywhere, or no term. If it `records`, data of the backward
        pass are saved.
        """
        spec.require_known(_FIELDS, "cuda")
        self._voxels, self._spec, self._logits = voxels, spec, logits
        device, xp = voxels.device, voxels.device.xp
        num_labels, num_channels, num_voxels = len(logits), spec.num_channels, voxels.num_voxels
        width = row_width(num_channels)
        self._constants = {"CRF_LABELS": num_labels, "CRF_CHANNELS": num_channels, "CRF_WIDTH": width}
        weights = [device.upload(grouped(weight[:num_channels], width)) for weight in spec.weights]
        self._kernels = list(zip(kernels, weights, strict=True))
        self._weighted_ones = None
        if num_channels < num_labels:
            self._weighted_ones = xp.zeros(num_voxels, dtype=np.float32)
            for kernel, weight in zip(kernels, spec.weights, strict=True):
                self._weighted_ones += kernel.ones * float(weight[0])
        self._compatibility = device.upload(np.asarray(spec.compatibility, dtype=np.float32))
        self._marginals = xp.empty((num_row_groups(num_channels), num_voxels, width), dtype=np.float32)
        # The first kernel overwrites, the others add.
        self._messages = xp.empty_like(self._marginals) if kernels else xp.zeros_like(self._marginals)
        self._num_threads = min(num_voxels, MAX_THREADS)
        self._partial = xp.zeros((_NUM_SUMS, self._num_threads), dtype=np.float64)
        self._totals = xp.empty(_NUM_SUMS, dtype=np.float64)
        self._state = xp.zeros(_NUM_STATES + max(spec.num_iterations, 1), dtype=np.float64)
        self._inverse_temperature = np.float32(1.0) / np.float32(spec.temperature)
        self._bias = None if spec.bias is None else device.upload(np.asarray(spec.bias, dtype=np.float32))
        self._out = logits * self._inverse_temperature  # the result outside the mask
        self._num_recorded, has_volume = 0, spec.volume_weight > 0.0
        self._record = xp.empty((spec.num_iterations + has_volume, num_channels, num_voxels), dtype=np.float32) if records else None
        self._update(out=None if self._bias is None else self._out)
        add_up(device, self._partial, self._totals)
        self._launch("begin_run", 1, self._totals, self._state)
        self._volume = VolumeSteps(voxels, spec, self._out, part) if has_volume else None
        self._old = xp.empty_like(self._marginals) if has_volume and spec.tolerance > 0.0 else None

    def take_steps(self, progress: Callable[[int, int], None] | None = None) -> MeanFieldOutcome:
        """Take all steps, or until no further one is needed; once per object."""
        spec, may_stop, device = self._spec, self._spec.tolerance > 0.0, self._voxels.device
        for t in range(spec.num_iterations):
            if progress is not None:
                progress(t, spec.num_iterations)
            # A step that may turn out to be the last one stores its logits.
            self._step(stores=may_stop or t + 1 == spec.num_iterations)
            if may_stop and bool(device.download(self._state)[_CONVERGED]):  # waits for the step
                break
        biases = None
        if self._volume is not None:
            self._store_marginals()  # before the host's wait, or this would return too early
            biases = np.array(self._volume.biases).reshape(-1, spec.num_labels)
        state = device.download(self._state)
        energy = state[_NUM_STATES : _NUM_STATES + int(state[_NUM_STEPS])]
        return MeanFieldOutcome(self._out, bool(state[_CONVERGED]), tuple(energy.tolist()), self._record, biases)

    def _step(self, *, stores: bool) -> None:
        """Launch one step."""
        self._store_marginals()
        if self._old is not None:
            self._old[...] = self._marginals
        for number, (kernel, weight) in enumerate(self._kernels):
            kernel.accumulate(self._marginals, weight, self._messages, adds=number > 0)
        spec, volume, of_volumes = self._spec, self._volume, 0.0
        out = self._out if stores or volume is not None else None
        self._update(self._marginals, self._messages, out=out, wants_divergence=spec.tolerance > 0.0 and volume is None)
        if volume is not None:
            of_volumes = volume.end_step()
            # The marginals of the logits with the biases, and what they change in the sums.
            self._update(self._old, refined=self._out, wants_divergence=self._old is not None)
        add_up(self._voxels.device, self._partial, self._totals)
        self._launch("end_step", 1, self._totals, self._voxels.num_voxels, of_volumes, spec.tolerance, self._state)

    def _update(
        self, old: Any = None, messages: Any = None, *, refined: Any = None, out: Any = None, wants_divergence: bool = False
    ) -> None:
        """Compute the marginals; see `update` in kernels/cuda/mean_field.cu."""
        voxels = self._voxels
        given = (self._logits, self._bias, voxels.grid_size, voxels.grid_index, voxels.num_voxels, self._inverse_temperature)
        model = (messages, self._weighted_ones, self._compatibility, int(self._spec.is_potts), int(wants_divergence))
        arguments = (*given, old, self._marginals, *model, refined, out, self._num_threads, self._partial)
        self._launch("update", self._num_threads, *arguments)

    def _store_marginals(self) -> None:
        """Add them to the record, if there is one."""
        if self._record is not None:
            width, record = self._marginals.shape[-1], self._record[self._num_recorded]
            for g, rows in enumerate(self._marginals):
                channels = record[g * width : (g + 1) * width]
                channels[...] = rows.T[: len(channels)]
            self._num_recorded += 1

    def _launch(self, kernel: str, num_threads: int, *arguments: Any) -> None:
        self._voxels.device.launch("mean_field", kernel, self._constants, num_threads, *arguments)
