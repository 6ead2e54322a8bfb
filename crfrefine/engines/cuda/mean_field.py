"""The mean-field iteration on the device (docs/reference/math.md, section 3): the host only decides what is launched next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.engines.cuda.device import grouped, num_row_groups, precision, row_width
from crfrefine.engines.cuda.kernel_set import Kernel
from crfrefine.engines.cuda.memory import MOST_THREADS
from crfrefine.engines.cuda.volume import VolumeSteps
from crfrefine.engines.cuda.voxels import Voxels

if TYPE_CHECKING:
    from crfrefine.specs import MeanFieldSpec

MOST_IN_REGISTERS = 32
"""Labels up to which a thread keeps those of its voxel in registers; with more, it takes them in groups, twice (many_labels.cu)."""

# The same as in kernels/cuda/mean_field.cu.
_NUM_SUMS, _FOLD = 6, 32
_STEP, _NUM_STEPS, _CONVERGED, _NUM_STATES = 0, 4, 5, 6


@dataclass(frozen=True)
class MeanFieldOutcome:
    """Result of a run.

    Attributes:
        logits: (label, *grid) on the device.
        num_iterations: steps taken.
        converged: whether the stopping rule was met.
        energy: free energy of the marginals at the start of each step.
        steps: length of each step.
        record: (step, channel, voxel) marginals at the start of each step, on the device, with a volume term those after the last step,
            too; None unless asked for.
        volume_biases: (steps, label), those of the volume term; None without it.
    """

    logits: Any
    num_iterations: int
    converged: bool
    energy: tuple[float, ...]
    steps: tuple[float, ...]
    record: Any = None
    volume_biases: NDArray[np.float64] | None = None


def run_mean_field(
    voxels: Voxels,
    kernels: Sequence[Kernel],
    spec: MeanFieldSpec,
    logits: Any,
    progress: Callable[[int, int], None] | None = None,
    *,
    volume_part: NDArray[np.bool_] | None = None,
    watches_energy: bool = True,
    records: bool = False,
) -> MeanFieldOutcome:
    """Run the iteration.

    Args:
        voxels: the masked voxels.
        kernels: the normalized kernels.
        spec: the run, with weights of the precision of the logits.
        logits: (label, *grid) float32 or float64, on the device.
        progress: called before each step with its number and the number of all steps.
        volume_part: (voxel), where the volume term applies; None: everywhere, or there is no term.
        watches_energy: whether a rise of the energy halves the steps.
        records: whether to save what the backward pass needs.
    """
    run = _Run(voxels, kernels, spec, logits, volume_part=volume_part, watches_energy=watches_energy, records=records)
    may_stop = spec.tolerance > 0.0
    # A step that may turn out to be the last one stores its logits; a damped step starts from those of the previous step.
    # The energy of a Potts model with one weight for all labels does not rise.
    may_rise = not (spec.is_potts and spec.num_channels < len(spec.compatibility))
    keeps = may_stop or spec.damping > 0.0 or (watches_energy and may_rise)
    for t in range(spec.num_iterations):
        if progress is not None:
            progress(t, spec.num_iterations)
        run.step(keeps=keeps, is_last=t + 1 == spec.num_iterations)
        if may_stop and run.converged():
            break
    return run.outcome()


class _Run:
    """The arrays of a run, and its launches."""

    def __init__(
        self,
        voxels: Voxels,
        kernels: Sequence[Kernel],
        spec: MeanFieldSpec,
        logits: Any,
        *,
        volume_part: NDArray[np.bool_] | None,
        watches_energy: bool,
        records: bool,
    ) -> None:
        self._voxels, self._spec, self._logits = voxels, spec, logits
        self._watches_energy = watches_energy
        self._device, xp = voxels.device, voxels.device.xp
        dtype = logits.dtype
        num_labels, num_channels, num_voxels = len(logits), spec.num_channels, voxels.num_voxels
        width = row_width(num_channels)
        num_groups = num_row_groups(num_channels)
        self._constants = {"CRF_LABELS": num_labels, "CRF_CHANNELS": num_channels, "CRF_WIDTH": width, **precision(dtype)}
        weights = [self._device.upload(grouped(weight[:num_channels].astype(dtype), width)) for weight in spec.weights]
        storing = list(zip(kernels, weights, strict=True))
        # The last one that can be is sliced by `update`: its message is neither stored nor read again.
        last = max((m for m, kernel in enumerate(kernels) if kernel.can_be_sliced and num_groups == 1), default=None)
        self._sliced = None if last is None else storing.pop(last)
        self._storing = storing
        self._has_many_labels = num_labels > MOST_IN_REGISTERS and self._sliced is None
        self._of_sums = {**self._constants, **({"CRF_SLICES": 0} if last is None else kernels[last].slicing_constants)}
        if self._has_many_labels:  # sums do not depend on the labels
            self._of_sums |= {"CRF_LABELS": 2, "CRF_CHANNELS": 1, "CRF_WIDTH": 1, "CRF_SLICES": 0}
        self._weighted_ones = None
        if num_channels < num_labels:
            self._weighted_ones = xp.zeros(num_voxels, dtype=dtype)
            for kernel, weight in zip(kernels, spec.weights, strict=True):
                self._weighted_ones += kernel.ones * float(weight[0])
        self._compatibility = self._device.upload(np.asarray(spec.compatibility, dtype=dtype))
        self._marginals = xp.empty((num_groups, num_voxels, width), dtype=dtype)
        # The first of the kernels that store their messages does not look at what was there, the others add theirs.
        self._messages = xp.zeros_like(self._marginals) if not kernels else xp.empty_like(self._marginals) if storing else None
        self._num_threads = min(num_voxels, MOST_THREADS)
        self._partial = xp.empty((_NUM_SUMS, self._num_threads), dtype=np.float64)
        self._state = xp.zeros(_NUM_STATES + 2 * max(spec.num_iterations, 1), dtype=np.float64)
        self._inverse_temperature = dtype.type(1.0) / dtype.type(spec.temperature)
        self._bias = None if spec.bias is None else self._device.upload(np.asarray(spec.bias, dtype=dtype))
        self._out = xp.empty_like(logits)
        self._num_done = 0
        keeps_volumes = spec.volume_weight > 0.0
        self._record = xp.empty((spec.num_iterations + keeps_volumes, num_channels, num_voxels), dtype=dtype) if records else None
        self._launch("scale_logits", int(logits.size), logits, int(logits.size), self._inverse_temperature, self._out)
        self._launch_over_voxels(
            "start",
            logits,
            self._bias,
            voxels.grid_size,
            voxels.grid_index,
            num_voxels,
            self._inverse_temperature,
            self._marginals,
            None if self._bias is None else self._out,
            self._num_threads,
            self._partial,
        )
        sums = self._fold()
        self._launch("begin_run", 1, sums, sums.shape[1], 1.0 - float(dtype.type(spec.damping)), self._state)
        self._volume = None
        if keeps_volumes:
            self._volume = VolumeSteps(voxels, spec, self._constants, self._out, self._marginals, volume_part)

    def step(self, *, keeps: bool, is_last: bool) -> None:
        """Launch one step."""
        self._store_marginals()
        if self._volume is not None:
            self._volume.begin_step()
        for number, (kernel, weight) in enumerate(self._storing):
            kernel.accumulate(self._marginals, weight, self._messages, adds=number > 0)
        slicing: tuple[Any, ...] = () if self._has_many_labels else (None, None, None, 0, 0.0, None, None)
        if self._sliced is not None:
            kernel, weight = self._sliced
            slicing = kernel.to_vertices(self._marginals[0], weight[0])
        voxels, spec = self._voxels, self._spec
        # In groups, products with a matrix would be computed twice if nothing stored what they come to.
        stores = keeps or is_last or self._volume is not None or (self._has_many_labels and not spec.is_potts)
        self._launch_over_voxels(
            "update",
            self._logits,
            self._bias,
            voxels.grid_size,
            voxels.grid_index,
            voxels.num_voxels,
            self._inverse_temperature,
            self._marginals,
            self._messages,
            *slicing,
            self._weighted_ones,
            self._compatibility,
            int(spec.is_potts),
            int(spec.tolerance > 0.0),
            self._state,
            self._out if keeps else None,
            self._out if stores else None,
            self._num_threads,
            self._partial,
        )
        watches, of_volumes = self._watches_energy, 0.0
        if self._volume is not None:
            step = float(self._device.download(self._state)[_STEP])
            of_volumes = self._volume.end_step(step, self._num_threads, self._partial)
            watches = watches and self._volume.may_compare
        sums = self._fold()
        self._launch(
            "end_step",
            1,
            sums,
            sums.shape[1],
            voxels.num_voxels,
            int(watches),
            of_volumes,
            spec.tolerance,
            max(spec.num_iterations, 1),
            self._state,
        )

    def converged(self) -> bool:
        """Wait for the latest step, and return whether no further one is needed."""
        return bool(self._device.download(self._state)[_CONVERGED])

    def outcome(self) -> MeanFieldOutcome:
        """Return the present result."""
        if self._volume is not None:
            self._store_marginals()  # before what the host waits for, or it would return too early
        state = self._device.download(self._state)
        done, most = int(state[_NUM_STEPS]), max(self._spec.num_iterations, 1)
        energy, steps = state[_NUM_STATES : _NUM_STATES + done], state[_NUM_STATES + most : _NUM_STATES + most + done]
        biases = None
        if self._volume is not None:
            biases = np.array(self._volume.biases).reshape(done, self._spec.num_labels)
        found = (done, bool(state[_CONVERGED]), tuple(energy.tolist()), tuple(steps.tolist()))
        return MeanFieldOutcome(self._out, *found, self._record, biases)

    def _store_marginals(self) -> None:
        """Add them to the record, if there is one."""
        if self._record is not None:
            width, record = self._marginals.shape[-1], self._record[self._num_done]
            for g, rows in enumerate(self._marginals):
                channels = record[g * width : (g + 1) * width]
                channels[...] = rows.T[: len(channels)]
            self._num_done += 1

    def _launch(self, kernel: str, num_threads: int, *arguments: Any) -> None:
        self._device.launch("mean_field", kernel, self._of_sums, num_threads, *arguments)

    def _launch_over_voxels(self, kernel: str, *arguments: Any) -> None:
        if self._has_many_labels:
            self._device.launch("many_labels", f"{kernel}_many", self._constants, self._num_threads, *arguments)
        else:
            self._launch(kernel, self._num_threads, *arguments)

    def _fold(self) -> Any:
        """Add up the sums of the threads until few are left."""
        sums = self._partial
        while sums.shape[1] > _FOLD:
            count = -(-sums.shape[1] // _FOLD)
            folded = self._device.xp.empty((_NUM_SUMS, count), dtype=np.float64)
            self._launch("fold_sums", _NUM_SUMS * count, sums, sums.shape[1], count, folded)
            sums = folded
        return sums
