"""The volume term on the device (docs/reference/math.md, section 11), forward and backward.

The host searches the biases; kernels/cuda/volume.cu and products.cu have the sums.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from crfrefine.base.array_types import Bool, Float64
from crfrefine.base.numerics import LAST_CHANGE
from crfrefine.engines.base import Tape
from crfrefine.engines.cuda.rows import Products, Sums, upload_float32
from crfrefine.engines.cuda.voxels import Voxels
from crfrefine.engines.volumes import VolumeTerm
from crfrefine.parameters.specs import MeanFieldSpec


class MassSums:
    """Masses and covariances of the marginals of all labels.

    Only the voxels where `part`, (voxel) on the host, is True count; None means all.
    """

    def __init__(self, voxels: Voxels, num_labels: int, part: Bool | None) -> None:
        device = voxels.device
        self.part = None
        if part is not None:
            self.part = device.upload(np.asarray(part, dtype=np.uint8))
        self._voxels = voxels
        self._num_labels = num_labels
        self._marginals = device.xp.empty((num_labels, voxels.num_voxels), dtype=np.float32)

    def of_marginals(self, marginals: Any) -> tuple[Float64, Float64]:
        """Return masses (L,) and covariance (L, L) of (label, voxel) marginals."""
        products = self._products(marginals, marginals)
        masses = products.sum(axis=1)  # marginals sum to 1
        np.fill_diagonal(products, 0.0)
        # This sum for a label's variance loses no digits: nothing in it cancels.
        return masses, np.diag(products.sum(axis=1)) - products

    def masses(self, logits: Any) -> Float64:
        """Return the masses of softmax(logits), (L,); logits are (label, *grid)."""
        return self.total(self._with_bias(logits, np.zeros(self._num_labels)))

    def total(self, values: Any) -> Float64:
        """Return the sums of (label, voxel) values, (L,)."""
        return self._products(values, None)[:, 0]

    def _products(self, rows: Any, others: Any) -> Float64:
        """Return the sums of `Products` of (label, voxel) rows and others; None means ones."""
        sums = Sums(self._voxels.device)
        Products(sums, rows, others, self.part).add()
        return sums.device.download(sums.add_up()).reshape(len(rows), -1)

    def counts(self, logits: Any) -> Float64:
        """Return the voxels where each label has the largest of (label, *grid) logits, (L,)."""
        device = self._voxels.device
        index = self._voxels.grid_index
        if self.part is not None:
            index = index[self.part != 0]
        scores = logits.reshape(self._num_labels, -1)[:, index]
        labels = scores.argmax(axis=0)
        counts = device.xp.bincount(labels, minlength=self._num_labels)
        return device.download(counts).astype(np.float64)

    def _with_bias(self, logits: Any, bias: Float64) -> Any:
        """Return softmax(logits + bias), (label, voxel), until the next call."""
        voxels = self._voxels
        voxels.launch(
            "volume",
            "find_marginals",
            {},
            logits=logits,
            grid_size=voxels.grid_size,
            grid_index=voxels.grid_index,
            num_labels=self._num_labels,
            bias=upload_float32(voxels.device, bias),
            marginals=self._marginals,
        )
        return self._marginals


class VolumeSteps(MassSums):
    """The volume term of a run: after each `update` of mean_field.cu, biases that keep the masses.

    Attributes:
        biases: those of the steps so far, (L,).
        energies: the term's energy at the start of each of them.
    """

    def __init__(self, voxels: Voxels, spec: MeanFieldSpec, out: Any, part: Bool | None) -> None:
        """Take a run's (label, *grid) calibrated logits, and the `part` of `MassSums`.

        Each step replaces these logits by those after it.
        """
        super().__init__(voxels, spec.num_labels, part)
        self._out = out
        self._masses = self.masses(out)
        self._term = VolumeTerm(self.counts(out), spec.volume_slack)
        self.biases: list[Float64] = []
        self.energies: list[float] = []

    def end_step(self) -> None:
        """Add the biases to the logits that `update` has stored."""
        self.energies.append(self._term.energy(self._masses))
        start = self.biases[-1] if self.biases else np.zeros(self._num_labels)
        bias = self._term.search(self.masses_with, start, LAST_CHANGE)
        self.biases.append(bias)

        voxels = self._voxels
        voxels.launch(
            "volume",
            "add_biases",
            {},
            logits=self._out,
            grid_size=voxels.grid_size,
            grid_index=voxels.grid_index,
            num_labels=self._num_labels,
            part=self.part,
            bias=upload_float32(voxels.device, bias),
        )
        if self._term.slack > 0.0:  # the energy of masses that are kept exactly is 0
            self._masses = self.masses(self._out)

    def masses_with(self, bias: Float64) -> tuple[Float64, Float64]:
        """Return masses and covariance of the softmax of the logits with a bias."""
        return self.of_marginals(self._with_bias(self._out, bias))


class VolumeBackward(MassSums):
    """The gradients of the logits through the biases of the steps.

    `by_slack` is the gradient with respect to the slack, summed over the steps so far.
    """

    def __init__(self, voxels: Voxels, tape: Tape, record: Any) -> None:
        """Take the tape of a run, and its record on the device."""
        spec = tape.spec
        super().__init__(voxels, spec.num_labels, tape.volume_part)
        self._biases = tape.volume_biases
        self._record = record
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
        masses, covariance = self.of_marginals(marginals)
        by_masses = self.total(by_x)
        bias = np.asarray(self._biases[step])
        pull, by_slack = self._term.pull(by_masses, masses, covariance, bias)
        self.by_slack += by_slack

        self._voxels.launch(
            "volume",
            "pull_masses",
            {},
            marginals=marginals,
            num_labels=self._num_labels,
            part=self.part,
            by_mass=upload_float32(self._voxels.device, -pull),
            gradient=by_x,
        )
