"""What `refine` returns: label maps, refined logits, marginals, and what changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crfrefine.arrays.arguments import given_voxels
from crfrefine.arrays.label_maps import LabelChanges, count_labels
from crfrefine.arrays.probabilities import over_output_temperature
from crfrefine.arrays.region_scheme import RegionScheme, sigmoid
from crfrefine.base.geometry import StorageOrder
from crfrefine.base.text import counted
from crfrefine.engines import get_backend
from crfrefine.engines.base import MeanFieldReport, Reported
from crfrefine.refinement.refined import RefinedChannels


@dataclass(
    frozen=True, eq=False, repr=False, match_args=False
)  # Fields have names, no promised order.
class RefinementResult(Reported):
    """A refined case.

    Results are equal if their values are, bit for bit; the order of axes in memory, device, threads
    and timings do not matter.

    Attributes:
        label_map: (*grid), smallest unsigned integer type; postprocessed. Outside the mask: the
            label of the largest input logit.
        network_label_map: (*grid), the same type: the label of the largest input logit at each
            voxel.
        channels: the refined logits, in storage order.
        order: of the axes of `channels`.
        report: num_iterations, converged, energy and filters, which are also attributes of the
            result.
        timings: seconds of each stage: normalize, build, steps, labels.
        device: the device that was used.
        threads: number of CPU threads used; None: the cores this process may use.
        num_padding_voxels: voxels in the mask that are padding, and took no part.
        voxels_removed: voxels of components that `postprocess` turned into background.
        voxels_filled: voxels of holes that `postprocess` filled.
        lost_to_rules: for each label that lost voxels to `postprocess`: the number of its voxels
            before and after.
        notes: notes for the caller, one sentence each.
        spacing: mm, one per grid axis, as it was given; None: unknown.
        regions: the regions of the channels; None: the channels are labels.
        channel_labels: the label of each channel; a refined label map has channels only for labels
            that occur. Empty for regions.
        num_labels: L, background included; more than there are channels if some labels do not
            occur.
        output_temperature: divides the logits where they become marginals.
    """

    label_map: NDArray[np.unsignedinteger[Any]]
    network_label_map: NDArray[np.unsignedinteger[Any]]
    channels: RefinedChannels
    order: StorageOrder = field(compare=False)
    report: MeanFieldReport
    timings: dict[str, float] = field(default_factory=dict, compare=False)
    device: str = field(default="cpu", compare=False)
    threads: int | None = field(default=None, compare=False)
    num_padding_voxels: int = 0
    voxels_removed: int = 0
    voxels_filled: int = 0
    lost_to_rules: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    spacing: tuple[float, ...] | None = None
    regions: RegionScheme | None = None
    channel_labels: tuple[int, ...] = ()
    num_labels: int = 0
    output_temperature: float = 1.0

    def __eq__(self, other: object) -> bool:
        """Compare the values, arrays too: the dataclass's own comparison asks whether an array is true."""
        if not isinstance(other, RefinementResult):
            return NotImplemented
        names = [entry.name for entry in fields(self) if entry.compare and entry.name != "channels"]
        pairs = [(getattr(self, name), getattr(other, name)) for name in names]
        same = all(
            np.array_equal(one, two) if isinstance(one, np.ndarray) else one == two
            for one, two in pairs
        )
        return same and np.array_equal(
            self.order.to_user(self.channels.dense()), other.order.to_user(other.channels.dense())
        )

    def __repr__(self) -> str:
        """Summarize the result in one line, without arrays."""
        grid = "×".join(str(extent) for extent in self.label_map.shape)
        report = self.report
        details = counted(report.num_iterations, "step") + (
            ", converged" if report.converged else ""
        )
        details += f", energy {report.energy[-1]:.6g}" if report.energy else ""
        channels = f"{self.channels.num_channels} {'labels' if self.regions is None else 'regions'}"
        return f"<RefinementResult: {channels} on {grid} voxels, {details}, on {self.device}>"

    @cached_property
    def logits(self) -> NDArray[np.float32]:
        """(L, *grid) float32, x of the last step; for regions (R, *grid) log-odds.

        Outside the mask: the input over the temperature.

        It is put together when first asked for, where labels took no part from the input's array,
        which must not have changed.
        """
        return self.order.to_user(self.channels.dense())

    @cached_property
    def marginals(self) -> NDArray[np.float32]:
        """(L, *grid) float32, the softmax of logits / output temperature, for regions (R, *grid) the sigmoid.

        Computed when asked for, unless the engine has computed them in its last step.
        """
        is_kept = "logits" in vars(self) or self.channels.is_array
        computed = self.channels.marginals
        if computed is not None and self.output_temperature == 1.0:
            return self.order.to_user(computed)
        # If the logits were not asked for, their array is reused for the marginals.
        values = self.order.to_storage(self.logits) if is_kept else self.channels.dense()
        return self.order.to_user(self._probabilities(values, in_place=not is_kept))

    def logits_at(self, mask: ArrayLike) -> NDArray[np.float32]:
        """Return the refined logits at the voxels of a mask, (L, N), for regions (R, N).

        Arguments and errors as for `marginals_at`.
        """
        return self.channels.at(given_voxels(mask, self.label_map.shape), self.order)

    def marginals_at(self, mask: ArrayLike) -> NDArray[np.float32]:
        """Return `marginals[:, mask != 0]`, (L, N) float32, for regions (R, N), without making the array of the whole grid.

        Args:
            mask: (*grid), nonzero at the voxels; it may differ from the mask given to `refine`.

        Raises:
            InputError: the mask has another shape than the grid, or values that are not finite.
        """
        return self._probabilities(self.logits_at(mask), in_place=True)

    def _probabilities(self, logits: NDArray[np.float32], *, in_place: bool) -> NDArray[np.float32]:
        """Return the softmax over labels, or the sigmoid of the log-odds of regions, perhaps in the place of the logits."""
        if self.regions is not None:
            return sigmoid(over_output_temperature(logits, self.output_temperature))
        out = logits if in_place else None
        if self.output_temperature != 1.0:
            logits = out = np.multiply(logits, np.float32(1.0 / self.output_temperature), out=out)
        return get_backend(self.device).softmax(logits, threads=self.threads, out=out)

    @cached_property
    def changes(self) -> LabelChanges:
        """Voxels of each label before and after, and the number of changed voxels.

        Counted when first asked for.
        """
        before = self.network_label_map
        after = self.label_map
        changed = int(np.count_nonzero(before != after))
        return LabelChanges(
            changed, count_labels(before, self.num_labels), count_labels(after, self.num_labels)
        )
