"""The mean-field iteration on the device (docs/reference/math.md, section 3): the host only decides on the next launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.array_types import Bool, Float64
from crfrefine.engines.cuda.device import grouped, num_row_groups, row_width
from crfrefine.engines.cuda.kernel_set import Kernel
from crfrefine.engines.cuda.memory import MAX_THREADS
from crfrefine.engines.cuda.sums import add_up
from crfrefine.engines.cuda.volume import VolumeSteps
from crfrefine.engines.cuda.voxels import Voxels

if TYPE_CHECKING:
    from crfrefine.parameters.specs import MeanFieldSpec


# The same as in kernels/cuda/mean_field.cu.
_NUM_SUMS = 5
_NUM_STEPS, _CONVERGED, _NUM_STATES = 2, 3, 4


@dataclass(frozen=True)
class MeanFieldOutcome:
    """Result of a run."""

    logits: Any  # (label, *grid) on the device
    num_iterations: int  # steps taken
    converged: bool  # whether the stopping rule was met
    energy: tuple[float, ...]  # free energy of the marginals at the start of each step
    # (step, channel, voxel) marginals at the start of each step, on the device, with a volume term those after the last step, too; None
    # unless asked for.
    record: Any = None
    volume_biases: Float64 | None = None  # (steps, label), those of the volume term; None without it


class MeanFieldRun:
    """The iteration on (label, *grid) float32 logits on the device."""

    def __init__(
        self,
        voxels: Voxels,
        kernels: Sequence[Kernel],
        spec: MeanFieldSpec,
        logits: Any,
        *,
        volume_part: Bool | None,
        records: bool = False,
    ) -> None:
        """Take a run.

        `volume_part` is where the volume term applies, (voxel); None means everywhere, or no term. If it `records`, data of the backward
        pass are saved.
        """
        self._voxels, self._spec, self._logits = voxels, spec, logits
        self._device, xp = voxels.device, voxels.device.xp
        dtype = logits.dtype
        num_labels, num_channels, num_voxels = len(logits), spec.num_channels, voxels.num_voxels
        width = row_width(num_channels)
        num_groups = num_row_groups(num_channels)
        self._constants = {"CRF_LABELS": num_labels, "CRF_CHANNELS": num_channels, "CRF_WIDTH": width}
        weights = [self._device.upload(grouped(weight[:num_channels].astype(dtype), width)) for weight in spec.weights]
        self._kernels = list(zip(kernels, weights, strict=True))
        self._weighted_ones = None
        if num_channels < num_labels:
            self._weighted_ones = xp.zeros(num_voxels, dtype=dtype)
            for kernel, weight in zip(kernels, spec.weights, strict=True):
                self._weighted_ones += kernel.ones * float(weight[0])
        self._compatibility = self._device.upload(np.asarray(spec.compatibility, dtype=dtype))
        self._marginals = xp.empty((num_groups, num_voxels, width), dtype=dtype)
        # The first kernel overwrites, the others add.
        self._messages = xp.empty_like(self._marginals) if kernels else xp.zeros_like(self._marginals)
        self._num_threads = min(num_voxels, MAX_THREADS)
        self._partial = xp.zeros((_NUM_SUMS, self._num_threads), dtype=np.float64)
        self._totals = xp.empty(_NUM_SUMS, dtype=np.float64)
        self._state = xp.zeros(_NUM_STATES + max(spec.num_iterations, 1), dtype=np.float64)
        self._inverse_temperature = dtype.type(1.0) / dtype.type(spec.temperature)
        self._bias = None if spec.bias is None else self._device.upload(np.asarray(spec.bias, dtype=dtype))
        self._out = logits * self._inverse_temperature  # the result outside the mask
        self._num_done = 0
        keeps_volumes = spec.volume_weight > 0.0
        self._record = xp.empty((spec.num_iterations + keeps_volumes, num_channels, num_voxels), dtype=dtype) if records else None
        self._update(logits, self._bias, self._inverse_temperature, out=None if self._bias is None else self._out)
        add_up(self._device, self._partial, self._totals)
        self._launch("begin_run", 1, self._totals, self._state)
        self._volume = VolumeSteps(voxels, spec, self._out, volume_part) if keeps_volumes else None
        self._old = xp.empty_like(self._marginals) if keeps_volumes and spec.tolerance > 0.0 else None

    def take_steps(self, progress: Callable[[int, int], None] | None = None) -> MeanFieldOutcome:
        """Take all steps, or until no further one is needed; once per object."""
        spec, may_stop = self._spec, self._spec.tolerance > 0.0
        for t in range(spec.num_iterations):
            if progress is not None:
                progress(t, spec.num_iterations)
            # A step that may turn out to be the last one stores its logits.
            self._step(stores=may_stop or t + 1 == spec.num_iterations)
            if may_stop and bool(self._device.download(self._state)[_CONVERGED]):  # waits for the step
                break
        return self._outcome()

    def _step(self, *, stores: bool) -> None:
        """Launch one step."""
        self._store_marginals()
        if self._old is not None:
            self._old[...] = self._marginals
        for number, (kernel, weight) in enumerate(self._kernels):
            kernel.accumulate(self._marginals, weight, self._messages, adds=number > 0)
        spec, volume = self._spec, self._volume
        network = (self._logits, self._bias, self._inverse_temperature)
        is_watched = spec.tolerance > 0.0 and volume is None
        out = self._out if stores or volume is not None else None
        self._update(*network, self._marginals, self._messages, out=out, wants_divergence=is_watched)
        of_volumes = 0.0
        if volume is not None:
            of_volumes = volume.end_step()
            # The marginals of the logits with the biases, and what they change in the sums.
            self._update(*network, self._old, refined=self._out, wants_divergence=self._old is not None)
        add_up(self._device, self._partial, self._totals)
        self._launch("end_step", 1, self._totals, self._voxels.num_voxels, of_volumes, spec.tolerance, self._state)

    def _update(
        self,
        logits: Any,
        bias: Any,
        inverse_temperature: float,
        old: Any = None,
        messages: Any = None,
        *,
        refined: Any = None,
        out: Any = None,
        wants_divergence: bool = False,
    ) -> None:
        """Compute the marginals; see `update` in kernels/cuda/mean_field.cu."""
        voxels, spec = self._voxels, self._spec
        given = (logits, bias, voxels.grid_size, voxels.grid_index, voxels.num_voxels, inverse_temperature, old, self._marginals)
        model = (messages, self._weighted_ones, self._compatibility, int(spec.is_potts), int(wants_divergence))
        self._launch("update", self._num_threads, *given, *model, refined, out, self._num_threads, self._partial)

    def _outcome(self) -> MeanFieldOutcome:
        """Return the present result."""
        if self._volume is not None:
            self._store_marginals()  # before the host's wait, or it would return too early
        state = self._device.download(self._state)
        done = int(state[_NUM_STEPS])
        energy = state[_NUM_STATES : _NUM_STATES + done]
        biases = None
        if self._volume is not None:
            biases = np.array(self._volume.biases).reshape(done, self._spec.num_labels)
        return MeanFieldOutcome(self._out, done, bool(state[_CONVERGED]), tuple(energy.tolist()), self._record, biases)

    def _store_marginals(self) -> None:
        """Add them to the record, if there is one."""
        if self._record is not None:
            width, record = self._marginals.shape[-1], self._record[self._num_done]
            for g, rows in enumerate(self._marginals):
                channels = record[g * width : (g + 1) * width]
                channels[...] = rows.T[: len(channels)]
            self._num_done += 1

    def _launch(self, kernel: str, num_threads: int, *arguments: Any) -> None:
        self._device.launch("mean_field", kernel, self._constants, num_threads, *arguments)
