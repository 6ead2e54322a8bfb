"""The mean-field iteration on the device (docs/reference/math.md, section 3).

The host decides which kernels are launched. The volume term is here, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from crfrefine.base.array_types import Bool, Float64
from crfrefine.engines.cuda.cupy_device import CupyDevice
from crfrefine.engines.cuda.kernel_set import Kernel
from crfrefine.engines.cuda.launches import Arguments
from crfrefine.engines.cuda.rows import (
    Products,
    Sums,
    add_up,
    grouped,
    num_row_groups,
    row_width,
    upload_float32,
)
from crfrefine.engines.cuda.voxels import Voxels
from crfrefine.engines.volume import VolumeTerm
from crfrefine.parameters.specs import MeanFieldSpec

LAST_CHANGE = 1e-3  # nats; a Newton step of this size is the last one


class MassSums:
    """Masses and covariances of the marginals of all labels.

    Only the voxels where `part`, (voxel) on the host, is True count; None means all.
    """

    def __init__(self, voxels: Voxels, num_labels: int, part: Bool | None) -> None:
        device = voxels.device
        num_voxels = voxels.num_voxels
        self.part = None
        if part is not None:
            self.part = device.upload(np.asarray(part, dtype=np.uint8))
        self._voxels = voxels
        self._num_labels = num_labels
        self._pair_sums = Sums(device)
        self._label_sums = Sums(device)
        self._pairs = Products(self._pair_sums, num_labels, num_labels, num_voxels)
        self._labels = Products(self._label_sums, num_labels, 1, num_voxels)
        self._marginals = device.xp.empty((num_labels, num_voxels), dtype=np.float32)

    def of_logits(self, logits: Any, bias: Float64) -> tuple[Float64, Float64]:
        """Return masses and covariance of softmax(logits + bias), for logits (label, *grid)."""
        return self.of_marginals(self._with_bias(logits, bias))

    def of_marginals(self, marginals: Any) -> tuple[Float64, Float64]:
        """Return masses (L,) and covariance (L, L) of (label, voxel) marginals."""
        self._pairs.parts[...] = 0.0
        self._pairs.add(marginals, marginals, part=self.part)
        (products,) = self._pair_sums.totals()
        products = products.reshape(self._num_labels, self._num_labels)
        masses = products.sum(axis=1)  # marginals sum to 1
        np.fill_diagonal(products, 0.0)
        # Such a sum for a label's variance loses no digits: nothing in it cancels.
        return masses, np.diag(products.sum(axis=1)) - products

    def masses(self, logits: Any) -> Float64:
        """Return the masses of softmax(logits), (L,); logits are (label, *grid)."""
        return self.total(self._with_bias(logits, np.zeros(self._num_labels)))

    def total(self, values: Any) -> Float64:
        """Return the sums of (label, voxel) values, (L,)."""
        self._labels.parts[...] = 0.0
        self._labels.add(values, None, part=self.part)
        (totals,) = self._label_sums.totals()
        return totals

    def counts(self, logits: Any) -> Float64:
        """Return the voxels where each label has the largest of (label, *grid) logits, (L,)."""
        device = self._voxels.device
        index = self._voxels.grid_index
        if self.part is not None:
            index = index[self.part != 0]
        scores = logits.reshape(self._num_labels, -1)[:, index]
        labels = scores.argmax(axis=0)
        counts = device.xp.bincount(labels, minlength=self._num_labels)
        return np.asarray(device.download(counts), dtype=np.float64)

    def _with_bias(self, logits: Any, bias: Float64) -> Any:
        """Return softmax(logits + bias), (label, voxel), until the next call."""
        voxels = self._voxels
        num_voxels = voxels.num_voxels
        voxels.device.launch(
            "volume",
            "find_marginals",
            {},
            num_voxels,
            logits=logits,
            grid_size=voxels.grid_size,
            grid_index=voxels.grid_index,
            num_voxels=num_voxels,
            num_labels=self._num_labels,
            bias=upload_float32(voxels.device, bias),
            marginals=self._marginals,
        )
        return self._marginals


class VolumeSteps:
    """The volume term of a run: after each `update` of mean_field.cu, biases that keep the masses.

    `biases` has those of the steps so far, (L,).
    """

    def __init__(self, voxels: Voxels, spec: MeanFieldSpec, out: Any, part: Bool | None) -> None:
        """Take a run's (label, *grid) calibrated logits, and the `part` of `MassSums`.

        Each step replaces these logits by those after it.
        """
        self._voxels = voxels
        self._spec = spec
        self._out = out
        self._sums = MassSums(voxels, spec.num_labels, part)
        self._masses = self._sums.masses(out)
        self._term = VolumeTerm(self._sums.counts(out), spec.volume_slack)
        self.biases: list[Float64] = []

    def end_step(self) -> float:
        """Add the biases to the logits that `update` has stored.

        Returns the term's energy at the start of the step.
        """
        energy = self._term.energy(self._masses)
        num_labels = self._spec.num_labels
        start = self.biases[-1] if self.biases else np.zeros(num_labels)
        masses_of = partial(self._sums.of_logits, self._out)
        bias = self._term.search(masses_of, start, LAST_CHANGE)
        self.biases.append(bias)

        voxels = self._voxels
        num_voxels = voxels.num_voxels
        voxels.device.launch(
            "volume",
            "add_biases",
            {},
            num_voxels,
            logits=self._out,
            grid_size=voxels.grid_size,
            grid_index=voxels.grid_index,
            num_voxels=num_voxels,
            num_labels=num_labels,
            part=self._sums.part,
            bias=upload_float32(voxels.device, bias),
        )
        if self._spec.volume_slack > 0.0:  # the energy of masses that are kept exactly is 0
            self._masses = self._sums.masses(self._out)
        return energy


class VolumeBackward:
    """The gradients of the logits through the biases of the steps.

    `by_slack` is the gradient with respect to the slack, summed over the steps so far.
    """

    def __init__(
        self, voxels: Voxels, spec: MeanFieldSpec, record: Any, biases: Float64, part: Bool | None
    ) -> None:
        """Take a run's (step + 1, channel, voxel) marginals on the device, and (step, L) biases."""
        self._voxels = voxels
        self._num_labels = spec.num_labels
        self._record = record
        self._biases = biases
        self._sums = MassSums(voxels, spec.num_labels, part)
        # No gradient depends on the masses to keep, so these are zeros.
        self._term = VolumeTerm(np.zeros(spec.num_labels), spec.volume_slack)
        self.by_slack = 0.0

    def step_back(self, step: int, by_x: Any) -> None:
        """Add the gradient through a step's biases to that for the logits after the step.

        Before, `by_x`, (label, voxel), is the gradient as if the biases were constant.
        """
        xp = self._voxels.device.xp
        marginals = self._record[step + 1]
        if len(marginals) < self._num_labels:  # Those of the last label follow from the others.
            last = xp.maximum(1.0 - marginals.sum(axis=0), 0.0)
            marginals = xp.concatenate([marginals, last[None]])
        masses, covariance = self._sums.of_marginals(marginals)
        by_masses = self._sums.total(by_x)
        bias = self._biases[step]
        pull, by_slack = self._term.pull(by_masses, masses, covariance, bias)
        self.by_slack += by_slack

        num_voxels = self._voxels.num_voxels
        self._voxels.device.launch(
            "volume",
            "pull_masses",
            {},
            num_voxels,
            marginals=marginals,
            num_voxels=num_voxels,
            num_labels=self._num_labels,
            part=self._sums.part,
            by_mass=upload_float32(self._voxels.device, -pull),
            gradient=by_x,
        )


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
_FLIPS_AT_CONVERGENCE = 1e-4  # voxels whose label may change in the last step, as a share of all
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
_UPDATES_TOGETHER = 8  # whose sums wait in memory until they are added up


class _StepSums:
    """The sums of a run's updates, in the order of the updates."""

    def __init__(self, device: CupyDevice, num_updates: int, num_threads: int) -> None:
        self._device = device
        num_rows = min(num_updates, _UPDATES_TOGETHER)
        shape = (num_rows, _NUM_SUMS, num_threads)
        # The first update leaves one sum as it was; all others are written each time.
        self._parts = device.xp.zeros(shape, dtype=np.float64)
        self._totals = device.xp.empty((num_updates, _NUM_SUMS), dtype=np.float64)
        self._num_updates = 0
        self._num_added = 0

    def part(self) -> Any:
        """Return memory for the next update, (sum, thread)."""
        if self._num_updates - self._num_added == len(self._parts):
            self._add_up()
        self._num_updates += 1
        return self._parts[self._num_updates - self._num_added - 1]

    def totals(self) -> Float64:
        """Return the sums of the updates so far, (update, sum); this waits for the updates."""
        self._add_up()
        return self._device.download(self._totals[: self._num_updates])

    def _add_up(self) -> None:
        parts = self._parts[: self._num_updates - self._num_added]
        totals = self._totals[self._num_added : self._num_updates]
        if len(parts):
            add_up(self._device, parts.reshape(-1, parts.shape[2]), totals.reshape(-1))
        self._num_added = self._num_updates


class MeanFieldOutcome(NamedTuple):
    """Result of a run."""

    logits: Any  # (label, *grid) on the device
    converged: bool  # True if the stopping rule was met
    energy: tuple[float, ...]  # free energy of the marginals at the start of each step
    # (step, channel, voxel) marginals at the start of each step, and with a volume term those after
    # the last step, too; None unless asked for.
    record: Any
    volume_biases: Float64 | None  # (steps, label), those of the volume term; None without it


class _Record:
    """The marginals of the steps, (step, channel, voxel), for the backward pass."""

    def __init__(self, xp: Any, num_steps: int, num_channels: int, num_voxels: int) -> None:
        self.values = xp.empty((num_steps, num_channels, num_voxels), dtype=np.float32)
        self._num_stored = 0

    def store(self, marginals: Any) -> None:
        """Add (group, voxel, width) marginals."""
        width = marginals.shape[-1]
        channels = self.values[self._num_stored]
        for number, rows in enumerate(marginals):
            of_group = channels[number * width : (number + 1) * width]
            of_group[...] = rows.T[: len(of_group)]
        self._num_stored += 1


class MeanFieldRun:
    """The iteration on (label, *grid) float32 logits on the device."""

    def __init__(
        self,
        voxels: Voxels,
        kernels: Sequence[Kernel],
        spec: MeanFieldSpec,
        logits: Any,
        part: Bool | None,
        *,
        records: bool = False,
    ) -> None:
        """Allocate the memory of a run, and compute its first marginals.

        `part` is that of `MassSums`. `records` saves the marginals for the backward pass.
        """
        spec.require_known(_FIELDS, "cuda")
        device = voxels.device
        xp = device.xp
        num_labels = len(logits)
        num_channels = spec.num_channels
        num_voxels = voxels.num_voxels
        width = row_width(num_channels)
        has_volume = spec.volume_weight > 0.0
        self._voxels = voxels
        self._spec = spec
        self._logits = logits
        self._constants = {
            "CRF_LABELS": num_labels,
            "CRF_CHANNELS": num_channels,
            "CRF_WIDTH": width,
        }

        self._upload_model(kernels, width)
        self._allocate(num_channels, width)
        self._out = logits * self._inverse_temperature  # the result outside the mask
        self._record = None
        if records:
            num_recorded = spec.num_iterations + int(has_volume)
            self._record = _Record(xp, num_recorded, num_channels, num_voxels)

        self._update(self._sums.part(), out=None if self._bias is None else self._out)
        self._volume = None
        self._old = None  # marginals before a step, where the volume term changes the new ones
        if has_volume:
            self._volume = VolumeSteps(voxels, spec, self._out, part)
            if spec.tolerance > 0.0:
                self._old = xp.empty_like(self._marginals)

    def _upload_model(self, kernels: Sequence[Kernel], width: int) -> None:
        """Upload the parameters, the weights in rows of so many channels."""
        spec = self._spec
        device = self._voxels.device
        num_channels = spec.num_channels
        self._kernels = []
        for kernel, weight in zip(kernels, spec.weights, strict=True):
            uploaded = device.upload(grouped(weight[:num_channels], width))
            self._kernels.append((kernel, uploaded))
        self._weighted_ones = None
        if num_channels < spec.num_labels:
            self._weighted_ones = device.xp.zeros(self._voxels.num_voxels, dtype=np.float32)
            for kernel, weight in zip(kernels, spec.weights, strict=True):
                self._weighted_ones += kernel.ones * float(weight[0])
        self._compatibility = upload_float32(device, spec.compatibility)
        self._inverse_temperature = np.float32(1.0) / np.float32(spec.temperature)
        self._bias = None
        if spec.bias is not None:
            self._bias = upload_float32(device, spec.bias)

    def _allocate(self, num_channels: int, width: int) -> None:
        """Allocate the memory of the steps."""
        xp = self._voxels.device.xp
        num_voxels = self._voxels.num_voxels
        shape = (num_row_groups(num_channels), num_voxels, width)
        self._marginals = xp.empty(shape, dtype=np.float32)
        self._messages: Any = None  # the sum of those that kernels have added
        self._endings = _NO_ENDINGS  # of the filters whose last pass `update` does
        self._num_threads = min(num_voxels, _MAX_THREADS)
        num_updates = self._spec.num_iterations + 1
        self._sums = _StepSums(self._voxels.device, num_updates, self._num_threads)

    def take_steps(
        self,
        progress: Callable[[int, int], None] | None = None,
        *,
        wants_energy: bool = True,
    ) -> MeanFieldOutcome:
        """Take all steps, or until no further one is needed; callers do this once per object.

        Without `wants_energy` the energies are left out, and without a tolerance and a volume term
        the host does not wait.
        """
        spec = self._spec
        may_stop = spec.tolerance > 0.0
        with self._voxels.device.recording() as filterings:
            self._filter_marginals()

        of_volumes = []
        converged = False
        for step in range(spec.num_iterations):
            if progress is not None:
                progress(step, spec.num_iterations)
            self._store_marginals()
            if self._old is not None:
                self._old[...] = self._marginals
            for launch in filterings:
                launch()
            # A step that may turn out to be the last one stores its logits.
            stores = may_stop or step + 1 == spec.num_iterations
            of_volumes.append(self._end_step(stores=stores))
            if may_stop:
                converged = self._has_converged()
                if converged:
                    break

        biases = None
        if self._volume is not None:
            self._store_marginals()
            biases = np.array(self._volume.biases)
            biases = biases.reshape(-1, spec.num_labels)
        energy: tuple[float, ...] = ()
        if wants_energy:
            energy = self._energy(of_volumes)
        record = None if self._record is None else self._record.values
        return MeanFieldOutcome(self._out, converged, energy, record, biases)

    def _filter_marginals(self) -> None:
        """Launch the filters of a step, but for the endings that the update does itself.

        It does one of each kind, if there is one group of channels.
        """
        ended = set()
        for kernel, weight in self._kernels:
            kind = type(kernel.filter)
            if kind not in ended and len(self._marginals) == 1:
                ending = kernel.filter.filter_until_last(
                    self._marginals[0], kernel.sent_scale, kernel.scale, weight[0]
                )
                if ending is not None:
                    self._endings = {**self._endings, **ending}
                    ended.add(kind)
                    continue
            # The first message is not added: it overwrites the rows.
            adds = self._messages is not None
            if not adds:
                self._messages = self._voxels.device.xp.empty_like(self._marginals)
            kernel.accumulate(self._marginals, weight, self._messages, adds=adds)

    def _end_step(self, *, stores: bool) -> float:
        """Launch the update of a step after its filterings.

        Returns the energy of the volume term at the start of the step.
        """
        wants_divergence = self._spec.tolerance > 0.0
        part = self._sums.part()
        if self._volume is None:
            out = self._out if stores else None
            self._update(
                part,
                self._marginals,
                has_messages=True,
                out=out,
                wants_divergence=wants_divergence,
            )
            return 0.0
        self._update(part, self._marginals, has_messages=True, out=self._out)
        volume_energy = self._volume.end_step()
        # The logits with the biases give the marginals, and the sums that depend on these.
        self._update(part, self._old, refined=self._out, wants_divergence=wants_divergence)
        return volume_energy

    def _has_converged(self) -> bool:
        """Return whether the last step has changed little; this waits for the step."""
        last = self._sums.totals()[-1]
        num_voxels = self._voxels.num_voxels
        has_few_flips = last[_FLIPS] < _FLIPS_AT_CONVERGENCE * num_voxels
        return bool(last[_DIVERGENCE] / num_voxels < self._spec.tolerance and has_few_flips)

    def _energy(self, of_volumes: Sequence[float]) -> tuple[float, ...]:
        """Return the free energy at the start of each step, for that of the volume term."""
        totals = self._sums.totals()
        # The logits are relative to the largest one of each voxel.
        at_start = totals[:-1, _UNARY] - totals[0, _LARGEST]
        energy = at_start + 0.5 * totals[1:, _QUADRATIC] + np.array(of_volumes)
        return tuple(energy.tolist())

    def _update(
        self,
        part: Any,
        old: Any = None,
        *,
        has_messages: bool = False,
        refined: Any = None,
        out: Any = None,
        wants_divergence: bool = False,
    ) -> None:
        """Compute the marginals, and leave sums in `part`; see kernels/cuda/mean_field.cu."""
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
            partial=part,
        )

    def _store_marginals(self) -> None:
        """Add the marginals to the record, if there is one."""
        if self._record is not None:
            self._record.store(self._marginals)
