"""The volume term on the device (docs/reference/math.md, section 11): sums over voxels there, the equations of the biases on the host."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.array_types import Bool, Float64
from crfrefine.engines.cuda.sums import Products, Sums
from crfrefine.engines.cuda.voxels import Voxels
from crfrefine.engines.volume import VolumeTerm

if TYPE_CHECKING:
    from crfrefine.parameters.specs import MeanFieldSpec

LAST_CHANGE = 1e-3  # nats; a Newton step of this size is the last one


class MassSums:
    """Masses and covariances of the marginals of all labels, over the voxels where the term applies."""

    def __init__(self, voxels: Voxels, num_labels: int, part: Bool | None) -> None:
        """Allocate the sums; `part`, (voxel) on the host, is where the term applies; None means everywhere."""
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
        """Return the same of (label, voxel) marginals."""
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
        return np.asarray(device.download(device.xp.bincount(labels, minlength=self._num_labels)), dtype=np.float64)

    def _with_bias(self, logits: Any, bias: Float64) -> Any:
        """Return softmax(logits + bias), (label, voxel), until the next call."""
        voxels = self._voxels
        given = (logits, voxels.grid_size, voxels.grid_index, voxels.num_voxels, self._num_labels)
        added = voxels.device.upload(np.asarray(bias, dtype=np.float32))
        voxels.device.launch("volume", "find_marginals", {}, voxels.num_voxels, *given, added, self._marginals)
        return self._marginals


class VolumeSteps:
    """The volume term of a run: after each `update` of mean_field.cu, the biases that keep the masses."""

    def __init__(self, voxels: Voxels, spec: MeanFieldSpec, out: Any, part: Bool | None) -> None:
        """Take a run's (label, *grid) calibrated logits, which the steps replace by those after each.

        `part`, (voxel) on the host, is where the term applies; None means everywhere.
        """
        self._voxels, self._spec, self._out = voxels, spec, out
        self._sums = MassSums(voxels, spec.num_labels, part)
        self._masses = self._sums.masses(out)
        self._term = VolumeTerm(self._sums.counts(out), spec.volume_slack)
        self.biases: list[Float64] = []

    def end_step(self) -> float:
        """Add the biases to the logits that `update` has stored; return the term's energy at the start of the step."""
        energy = self._term.energy(self._masses)
        start = self.biases[-1] if self.biases else np.zeros(self._spec.num_labels)
        self.biases.append(self._term.search(partial(self._sums.of_logits, self._out), start, LAST_CHANGE))
        voxels, num_labels = self._voxels, self._spec.num_labels
        bias = voxels.device.upload(np.asarray(self.biases[-1], dtype=np.float32))
        arguments = (self._out, voxels.grid_size, voxels.grid_index, voxels.num_voxels, num_labels, self._sums.part, bias)
        voxels.device.launch("volume", "add_biases", {}, voxels.num_voxels, *arguments)
        if self._spec.volume_slack > 0.0:  # the energy of masses that are kept exactly is 0
            self._masses = self._sums.masses(self._out)
        return energy


class VolumeBackward:
    """The gradients of the logits through the biases of the steps.

    Attributes:
        by_slack: gradient with respect to the slack, of the steps so far.
    """

    def __init__(self, voxels: Voxels, spec: MeanFieldSpec, record: Any, biases: Float64, part: Bool | None) -> None:
        """Take a run's (step + 1, channel, voxel) marginals, on the device, its (step, label) biases, and where the term applies."""
        self._voxels, self._spec, self._record, self._biases = voxels, spec, record, biases
        self._sums = MassSums(voxels, spec.num_labels, part)
        # No gradient depends on numbers of voxels.
        self._term = VolumeTerm(np.zeros(spec.num_labels), spec.volume_slack)
        self.by_slack = 0.0

    def step_back(self, t: int, by_x: Any) -> None:
        """Turn the gradient (label, voxel) for the logits after step t, as if its biases were constant, into the whole one, in place."""
        device, num_voxels, num_labels = self._voxels.device, self._voxels.num_voxels, self._spec.num_labels
        marginals = self._record[t + 1]
        if len(marginals) < num_labels:  # Those of the last label follow from the others.
            rest = device.xp.maximum(1.0 - marginals.sum(axis=0), 0.0)
            marginals = device.xp.concatenate([marginals, rest[None]])
        masses, covariance = self._sums.of_marginals(marginals)
        pull, by_slack = self._term.pull(self._sums.total(by_x), masses, covariance, self._biases[t])
        self.by_slack += by_slack
        by_mass = device.upload(np.asarray(-pull, dtype=np.float32))
        arguments = (marginals, num_voxels, num_labels, self._sums.part, by_mass, by_x)
        device.launch("volume", "pull_masses", {}, num_voxels, *arguments)
