"""The gradients of the volume term on the device (docs/reference/math.md, section 11.5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.array_types import Bool, Float64
from crfrefine.engines.cuda.volume import MassSums
from crfrefine.engines.cuda.voxels import Voxels
from crfrefine.engines.volume_term import VolumeTerm

if TYPE_CHECKING:
    from crfrefine.parameters.specs import MeanFieldSpec


class VolumeBackward:
    """The gradients of the logits through the biases of the steps.

    Attributes:
        by_slack: gradient with respect to the slack, of the steps so far.
    """

    def __init__(self, voxels: Voxels, spec: MeanFieldSpec, record: Any, biases: Float64, part: Bool | None) -> None:
        """Take a run's (step + 1, channel, voxel) marginals, on the device, its (step, label) biases, and where the term applies."""
        self._voxels, self._spec, self._record, self._biases = voxels, spec, record, biases
        self._device = voxels.device
        self._part = None if part is None else self._device.upload(np.asarray(part, dtype=np.uint8))
        self._sums = MassSums(voxels, spec.num_labels, self._part, record.dtype)
        # No gradient depends on numbers of voxels.
        self._term = VolumeTerm(np.zeros(spec.num_labels), spec.volume_slack)
        self.by_slack = 0.0

    def step_back(self, t: int, by_x: Any) -> None:
        """Turn the gradient (label, voxel) for the logits after step t, as if its biases were constant, into the whole one, in place."""
        marginals = self._marginals(t + 1)
        masses, covariance = self._sums.of_marginals(marginals)
        pull, by_slack = self._term.pull(self._sums.total(by_x), masses, covariance, self._biases[t])
        self.by_slack += by_slack
        self._pull(marginals, -pull, by_x)

    def _pull(self, marginals: Any, by_mass: Float64, gradient: Any) -> None:
        given = self._device.upload(np.asarray(by_mass, dtype=gradient.dtype))
        num_voxels = self._voxels.num_voxels
        arguments = (marginals, num_voxels, self._spec.num_labels, self._part, given, gradient)
        self._device.launch("volume", "pull_masses", {}, num_voxels, *arguments)

    def _marginals(self, t: int) -> Any:
        return _all_marginals(self._device.xp, self._record[t], self._spec.num_labels)


def _all_marginals(xp: Any, channels: Any, num_labels: int) -> Any:
    """Return the marginals of all labels from (channel, voxel) ones; those of the last follow from the others if they are not there."""
    if len(channels) == num_labels:
        return channels
    rest = xp.maximum(1.0 - channels.sum(axis=0), 0.0)
    return xp.concatenate([channels, rest[None]])
