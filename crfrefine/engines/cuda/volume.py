"""The volume term on the device (docs/reference/math.md, section 11): sums over voxels there, the equations of the biases on the host."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.engines.cuda.memory import mass_threads
from crfrefine.engines.cuda.sums import add_up
from crfrefine.engines.cuda.voxels import Voxels
from crfrefine.engines.reference.volume import LAST_CHANGE, VolumeTerm

if TYPE_CHECKING:
    from crfrefine.specs import MeanFieldSpec

Float = NDArray[np.float64]

LAST_SINGLE_CHANGE = 1e-3
"""`LAST_CHANGE` for marginals in single precision."""

_GROUP = 8  # labels, as in kernels/cuda/volume.cu


class MassSums:
    """Masses and covariances of the marginals of all labels, over the voxels where the term applies."""

    def __init__(self, voxels: Voxels, constants: Mapping[str, int], part: Any, dtype: Any) -> None:
        """Allocate the sums.

        Args:
            voxels: the masked voxels.
            constants: of the run's kernels.
            part: (voxel) uint8 on the device, 1 where the term applies; None: everywhere.
            dtype: float32 or float64, that of the values.
        """
        self._voxels, self._constants, self._part, self._dtype = voxels, constants, part, dtype
        self._device, xp = voxels.device, voxels.device.xp
        self._num_labels = constants["CRF_LABELS"]
        self._group = min(self._num_labels, _GROUP)
        self._firsts = range(0, self._num_labels, self._group)
        self._num_threads = mass_threads(voxels.num_voxels)
        num_groups = len(self._firsts)
        is_split = num_groups > 1
        self._parts = xp.empty(max(self._size_of_group, self._group**2 * is_split) * self._num_threads, dtype=np.float64)
        num_pairs = num_groups * (num_groups - 1) // 2
        self._totals = xp.empty(num_groups * self._size_of_group + num_pairs * self._group**2, dtype=np.float64)
        self._normalizer = xp.empty((2, voxels.num_voxels), dtype=dtype) if is_split else None

    def of_logits(self, logits: Any, bias: Float) -> tuple[Float, Float]:
        """Return masses (L,) and covariance (L, L), as `sums_of`, of softmax(logits + bias); logits are (label, *grid)."""
        return self._masses_and_products(self._with_bias(logits, bias))

    def of_marginals(self, marginals: Any) -> tuple[Float, Float]:
        """Return the same of (label, voxel) marginals."""
        return self._masses_and_products(self._as_they_are(marginals))

    def masses(self, logits: Any) -> Float:
        """Return the masses of softmax(logits), (L,); logits are (label, *grid)."""
        return self._masses(self._with_bias(logits, np.zeros(self._num_labels)))

    def total(self, values: Any) -> Float:
        """Return the sums of (label, voxel) values, (L,)."""
        return self._masses(self._as_they_are(values))

    def counts(self, logits: Any) -> Float:
        """Return the numbers of voxels where each label has the largest of (label, *grid) logits, (L,)."""
        voxels, xp = self._voxels, self._device.xp
        labels = xp.empty(voxels.num_voxels, dtype=np.int32)
        self._launch("find_largest", voxels.num_voxels, logits, voxels.grid_size, voxels.grid_index, voxels.num_voxels, self._part, labels)
        counts = self._device.download(xp.bincount(labels, minlength=self._num_labels + 1))
        return np.asarray(counts[: self._num_labels], dtype=np.float64)

    @property
    def _size_of_group(self) -> int:
        return self._group + self._group * (self._group - 1) // 2

    def _with_bias(self, logits: Any, bias: Float) -> tuple[Any, ...]:
        """What the kernels that sum are given for softmax(logits + bias)."""
        voxels = self._voxels
        given = (logits, voxels.grid_size, voxels.grid_index, voxels.num_voxels)
        added = self._device.upload(np.asarray(bias, dtype=self._dtype))
        if self._normalizer is not None:
            self._launch("normalize_logits", voxels.num_voxels, *given, added, self._normalizer)
        return *given, self._part, added, self._normalizer

    def _as_they_are(self, values: Any) -> tuple[Any, ...]:
        """What they are given for (label, voxel) values."""
        return values, self._voxels.num_voxels, None, self._voxels.num_voxels, self._part, None, None

    def _masses(self, given: tuple[Any, ...]) -> Float:
        end = 0
        for first in self._firsts:
            end = self._sum("sum_labels", *given, first, begin=end, num_sums=self._group)
        return self._device.download(self._totals[:end])[: self._num_labels]

    def _masses_and_products(self, given: tuple[Any, ...]) -> tuple[Float, Float]:
        end = 0
        for i, first in enumerate(self._firsts):
            end = self._sum("sum_group", *given, first, begin=end, num_sums=self._size_of_group)
            for second in self._firsts[i + 1 :]:
                end = self._sum("sum_groups", *given, first, second, begin=end, num_sums=self._group**2)
        return self._put_together(self._device.download(self._totals))

    def _put_together(self, sums: Float) -> tuple[Float, Float]:
        """Masses and covariance from the sums of all groups, in the order of their launches."""
        group, padded = self._group, len(self._firsts) * self._group
        masses, products, place = np.zeros(padded), np.zeros((padded, padded)), 0
        above = np.triu_indices(group, 1)
        for i, first in enumerate(self._firsts):
            of_group, place = sums[place : place + self._size_of_group], place + self._size_of_group
            masses[first : first + group] = of_group[:group]
            products[first + above[0], first + above[1]] = of_group[group:]
            for second in self._firsts[i + 1 :]:
                products[first : first + group, second : second + group] = sums[place : place + group**2].reshape(group, group)
                place += group**2
        products = (products + products.T)[: self._num_labels, : self._num_labels]
        # Marginals sum to 1: what is left of a label's variance when nothing cancels.
        return masses[: self._num_labels], np.diag(products.sum(axis=1)) - products

    def _sum(self, kernel: str, *arguments: Any, begin: int, num_sums: int) -> int:
        """Sum over the voxels into the totals from `begin` on; return their end."""
        end, parts = begin + num_sums, self._parts[: num_sums * self._num_threads]
        self._launch(kernel, self._num_threads, *arguments, self._num_threads, parts)
        add_up(self._device, parts.reshape(num_sums, self._num_threads), self._totals[begin:end])
        return end

    def _launch(self, kernel: str, num_threads: int, *arguments: Any) -> None:
        self._device.launch("volume", kernel, self._constants, num_threads, *arguments)


class VolumeSteps:
    """The volume term of a run: after each `update` of mean_field.cu, the biases that keep the masses."""

    def __init__(self, voxels: Voxels, spec: MeanFieldSpec, constants: Mapping[str, int], out: Any, marginals: Any, part: Any) -> None:
        """Take the state of a run before its first step.

        Args:
            voxels: the masked voxels.
            spec: the run.
            constants: of the run's kernels.
            out: (label, *grid) calibrated logits, which the steps replace by those after each.
            marginals: (group, voxel, width) of them, which the steps replace, too.
            part: (voxel) where the term applies, on the host; None: everywhere.
        """
        self._voxels, self._spec, self._constants, self._out, self._marginals = voxels, spec, constants, out, marginals
        device = voxels.device
        self._part = None if part is None else device.upload(np.asarray(part, dtype=np.uint8))
        self._sums = MassSums(voxels, constants, self._part, out.dtype)
        self._old = device.xp.empty_like(marginals) if spec.tolerance > 0.0 else None
        self._masses = self._sums.masses(out)
        self._term = VolumeTerm(self._sums.counts(out) if spec.keeps_counts else self._masses, spec.volume_slack)
        self._last_change = LAST_CHANGE if out.dtype == np.float64 else LAST_SINGLE_CHANGE
        self.biases: list[Float] = []
        # The marginals of the network do not have the masses of its labels, which are kept from the first step on.
        self._first_watched = 2 if spec.volume_slack == 0.0 and spec.keeps_counts else 1

    @property
    def may_compare(self) -> bool:
        """Whether the energy of the step that is at its end may be compared with the one before."""
        return len(self.biases) > self._first_watched

    def begin_step(self) -> None:
        """Keep the marginals, if the step's divergence from them is wanted."""
        if self._old is not None:
            self._old[...] = self._marginals

    def end_step(self, step: float, num_threads: int, partial_sums: Any) -> float:
        """Add the biases to what `update` has stored; return the term's energy at the start of the step.

        Args:
            step: its length.
            num_threads: of `update`.
            partial_sums: (sum, thread) of `update`, of which those of the new marginals are replaced.
        """
        energy = self._term.energy(self._masses)
        start = self.biases[-1] if self.biases else np.zeros(self._spec.num_labels)
        self.biases.append(self._term.search(partial(self._masses_with, step), step, start, self._last_change))
        voxels = self._voxels
        voxels.device.launch(
            "volume",
            "add_biases",
            self._constants,
            num_threads,
            self._out,
            voxels.grid_size,
            voxels.grid_index,
            voxels.num_voxels,
            self._part,
            voxels.device.upload(self._scaled(step, self.biases[-1])),
            self._marginals,
            self._old,
            num_threads,
            partial_sums,
        )
        if self._spec.volume_slack > 0.0:  # the energy of masses that are kept exactly is 0
            self._masses = self._sums.masses(self._out)
        return energy

    def _masses_with(self, step: float, bias: Float) -> tuple[Float, Float]:
        return self._sums.of_logits(self._out, self._scaled(step, bias))

    def _scaled(self, step: float, bias: Float) -> NDArray[Any]:
        dtype = self._out.dtype
        return np.asarray(dtype.type(step) * bias.astype(dtype), dtype=dtype)
