"""The mean-field iteration on the device (docs/reference/math.md, section 3) with its volume term: the host decides on launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from crfrefine.base.array_types import Bool, Float64
from crfrefine.engines.cuda.kernel_set import Kernel
from crfrefine.engines.cuda.rows import (
    MAX_THREADS,
    Products,
    Sums,
    add_up,
    grouped,
    num_row_groups,
    row_width,
)
from crfrefine.engines.cuda.voxels import Voxels
from crfrefine.engines.volume import VolumeTerm
from crfrefine.parameters.specs import MeanFieldSpec

LAST_CHANGE = 1e-3  # nats; a Newton step of this size is the last one


class MassSums:
    """Masses and covariances of the marginals of all labels, in `part`, (voxel) on the host; None means everywhere."""

    def __init__(self, voxels: Voxels, num_labels: int, part: Bool | None) -> None:
        device = voxels.device
        self._voxels, self._num_labels = voxels, num_labels
        self.part = None if part is None else device.upload(np.asarray(part, dtype=np.uint8))
        self._of_pairs, self._of_labels = Sums(device), Sums(device)
        self._pairs = Products(self._of_pairs, num_labels, num_labels, voxels.num_voxels)
        self._labels = Products(self._of_labels, num_labels, 1, voxels.num_voxels)
        self._marginals = device.xp.empty((num_labels, voxels.num_voxels), dtype=np.float32)

    def of_logits(self, logits: Any, bias: Float64) -> tuple[Float64, Float64]:
        """Return masses (L,) and covariance (L, L) of softmax(logits + bias); logits are (label, *grid)."""
        return self.of_marginals(self._with_bias(logits, bias))

    def of_marginals(self, marginals: Any) -> tuple[Float64, Float64]:
        """Return masses and covariance of (label, voxel) marginals."""
        self._pairs.parts[...] = 0.0
        self._pairs.add(marginals, marginals, part=self.part)
        products = self._of_pairs.totals()[0].reshape(self._num_labels, self._num_labels)
        masses = products.sum(axis=1)  # marginals sum to 1
        np.fill_diagonal(products, 0.0)
        # The part of a label's variance that stays when nothing cancels.
        return masses, np.diag(products.sum(axis=1)) - products

    def masses(self, logits: Any) -> Float64:
        """Return the masses of softmax(logits), (L,); logits are (label, *grid)."""
        return self.total(self._with_bias(logits, np.zeros(self._num_labels)))

    def total(self, values: Any) -> Float64:
        """Return the sums of (label, voxel) values, (L,)."""
        self._labels.parts[...] = 0.0
        self._labels.add(values, None, part=self.part)
        return self._of_labels.totals()[0]

    def counts(self, logits: Any) -> Float64:
        """Return the numbers of voxels where each label has the largest of (label, *grid) logits, (L,)."""
        device, index = self._voxels.device, self._voxels.grid_index
        index = index if self.part is None else index[self.part != 0]
        labels = logits.reshape(self._num_labels, -1)[:, index].argmax(axis=0)
        return np.asarray(
            device.download(device.xp.bincount(labels, minlength=self._num_labels)),
            dtype=np.float64,
        )

    def _with_bias(self, logits: Any, bias: Float64) -> Any:
        """Return softmax(logits + bias), (label, voxel), until the next call."""
        voxels = self._voxels
        given = (logits, voxels.grid_size, voxels.grid_index, voxels.num_voxels, self._num_labels)
        added = voxels.device.upload(np.asarray(bias, dtype=np.float32))
        voxels.device.launch(
            "volume", "find_marginals", {}, voxels.num_voxels, *given, added, self._marginals
        )
        return self._marginals


class VolumeSteps:
    """The volume term of a run: after each `update` of mean_field.cu, the biases that keep the masses."""

    def __init__(self, voxels: Voxels, spec: MeanFieldSpec, out: Any, part: Bool | None) -> None:
        """Take a run's (label, *grid) calibrated logits, which the steps replace by those after each, and the `part` of `MassSums`."""
        self._voxels, self._spec, self._out = voxels, spec, out
        self._sums = MassSums(voxels, spec.num_labels, part)
        self._masses = self._sums.masses(out)
        self._term = VolumeTerm(self._sums.counts(out), spec.volume_slack)
        self.biases: list[Float64] = []

    def end_step(self) -> float:
        """Add the biases to the logits that `update` has stored; return the term's energy at the start of the step."""
        energy = self._term.energy(self._masses)
        start = self.biases[-1] if self.biases else np.zeros(self._spec.num_labels)
        self.biases.append(
            self._term.search(partial(self._sums.of_logits, self._out), start, LAST_CHANGE)
        )
        voxels, num_labels = self._voxels, self._spec.num_labels
        bias = voxels.device.upload(np.asarray(self.biases[-1], dtype=np.float32))
        arguments = (
            self._out,
            voxels.grid_size,
            voxels.grid_index,
            voxels.num_voxels,
            num_labels,
            self._sums.part,
            bias,
        )
        voxels.device.launch("volume", "add_biases", {}, voxels.num_voxels, *arguments)
        if self._spec.volume_slack > 0.0:  # the energy of masses that are kept exactly is 0
            self._masses = self._sums.masses(self._out)
        return energy


class VolumeBackward:
    """The gradients of the logits through the biases of the steps; `by_slack` is that with respect to the slack, of the steps so far."""

    def __init__(
        self, voxels: Voxels, spec: MeanFieldSpec, record: Any, biases: Float64, part: Bool | None
    ) -> None:
        """Take a run's (step + 1, channel, voxel) marginals, on the device, and its (step, label) biases."""
        self._voxels, self._spec, self._record, self._biases = voxels, spec, record, biases
        self._sums = MassSums(voxels, spec.num_labels, part)
        self._term = VolumeTerm(
            np.zeros(spec.num_labels), spec.volume_slack
        )  # No gradient depends on numbers of voxels.
        self.by_slack = 0.0

    def step_back(self, t: int, by_x: Any) -> None:
        """Turn the gradient (label, voxel) for the logits after step t, as if its biases were constant, into the whole one, in place."""
        device, num_voxels, num_labels = (
            self._voxels.device,
            self._voxels.num_voxels,
            self._spec.num_labels,
        )
        marginals = self._record[t + 1]
        if len(marginals) < num_labels:  # Those of the last label follow from the others.
            rest = device.xp.maximum(1.0 - marginals.sum(axis=0), 0.0)
            marginals = device.xp.concatenate([marginals, rest[None]])
        masses, covariance = self._sums.of_marginals(marginals)
        pull, by_slack = self._term.pull(
            self._sums.total(by_x), masses, covariance, self._biases[t]
        )
        self.by_slack += by_slack
        by_mass = device.upload(np.asarray(-pull, dtype=np.float32))
        arguments = (marginals, num_voxels, num_labels, self._sums.part, by_mass, by_x)
        device.launch("volume", "pull_masses", {}, num_voxels, *arguments)


# Fields of a spec; others are refused.
_FIELDS = (
    "weights",
    "compatibility",
    "num_iterations",
    "temperature",
    "tolerance",
    "bias",
    "volume_weight",
)

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
        self,
        voxels: Voxels,
        kernels: Sequence[Kernel],
        spec: MeanFieldSpec,
        logits: Any,
        part: Bool | None,
        *,
        records: bool = False,
    ) -> None:
        """Take a run; `part` is that of `MassSums`. If it `records`, data of the backward pass are saved."""
        spec.require_known(_FIELDS, "cuda")
        self._voxels, self._spec, self._logits = voxels, spec, logits
        device, xp = voxels.device, voxels.device.xp
        num_labels, num_channels, num_voxels = len(logits), spec.num_channels, voxels.num_voxels
        width = row_width(num_channels)
        self._constants = {
            "CRF_LABELS": num_labels,
            "CRF_CHANNELS": num_channels,
            "CRF_WIDTH": width,
        }
        weights = [device.upload(grouped(weight[:num_channels], width)) for weight in spec.weights]
        self._kernels = list(zip(kernels, weights, strict=True))
        self._weighted_ones = None
        if num_channels < num_labels:
            self._weighted_ones = xp.zeros(num_voxels, dtype=np.float32)
            for kernel, weight in zip(kernels, spec.weights, strict=True):
                self._weighted_ones += kernel.ones * float(weight[0])
        self._compatibility = device.upload(np.asarray(spec.compatibility, dtype=np.float32))
        self._marginals = xp.empty(
            (num_row_groups(num_channels), num_voxels, width), dtype=np.float32
        )
        # The first kernel overwrites, the others add.
        self._messages = (
            xp.empty_like(self._marginals) if kernels else xp.zeros_like(self._marginals)
        )
        self._num_threads = min(num_voxels, MAX_THREADS)
        self._partial = xp.zeros((_NUM_SUMS, self._num_threads), dtype=np.float64)
        self._totals = xp.empty(_NUM_SUMS, dtype=np.float64)
        self._state = xp.zeros(_NUM_STATES + max(spec.num_iterations, 1), dtype=np.float64)
        self._inverse_temperature = np.float32(1.0) / np.float32(spec.temperature)
        self._bias = (
            None if spec.bias is None else device.upload(np.asarray(spec.bias, dtype=np.float32))
        )
        self._out = logits * self._inverse_temperature  # the result outside the mask
        self._num_recorded, has_volume = 0, spec.volume_weight > 0.0
        self._record = (
            xp.empty((spec.num_iterations + has_volume, num_channels, num_voxels), dtype=np.float32)
            if records
            else None
        )
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
        return MeanFieldOutcome(
            self._out, bool(state[_CONVERGED]), tuple(energy.tolist()), self._record, biases
        )

    def _step(self, *, stores: bool) -> None:
        """Launch one step."""
        self._store_marginals()
        if self._old is not None:
            self._old[...] = self._marginals
        for number, (kernel, weight) in enumerate(self._kernels):
            kernel.accumulate(self._marginals, weight, self._messages, adds=number > 0)
        spec, volume, of_volumes = self._spec, self._volume, 0.0
        out = self._out if stores or volume is not None else None
        self._update(
            self._marginals,
            self._messages,
            out=out,
            wants_divergence=spec.tolerance > 0.0 and volume is None,
        )
        if volume is not None:
            of_volumes = volume.end_step()
            # The marginals of the logits with the biases, and what they change in the sums.
            self._update(self._old, refined=self._out, wants_divergence=self._old is not None)
        add_up(self._voxels.device, self._partial, self._totals)
        self._launch(
            "end_step",
            1,
            self._totals,
            self._voxels.num_voxels,
            of_volumes,
            spec.tolerance,
            self._state,
        )

    def _update(
        self,
        old: Any = None,
        messages: Any = None,
        *,
        refined: Any = None,
        out: Any = None,
        wants_divergence: bool = False,
    ) -> None:
        """Compute the marginals; see `update` in kernels/cuda/mean_field.cu."""
        voxels = self._voxels
        given = (
            self._logits,
            self._bias,
            voxels.grid_size,
            voxels.grid_index,
            voxels.num_voxels,
            self._inverse_temperature,
        )
        model = (
            messages,
            self._weighted_ones,
            self._compatibility,
            int(self._spec.is_potts),
            int(wants_divergence),
        )
        arguments = (
            *given,
            old,
            self._marginals,
            *model,
            refined,
            out,
            self._num_threads,
            self._partial,
        )
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
