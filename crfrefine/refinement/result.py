"""What `refine` returns: label maps, refined logits, marginals, and what changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from crfrefine.arrays.arguments import given_voxels
from crfrefine.arrays.label_maps import LabelChanges, count_labels
from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.arrays.softmax import over_output_temperature, sigmoid
from crfrefine.base.array_types import Float32, Labels, Spacing
from crfrefine.base.axes import Axes
from crfrefine.base.notes import Notes
from crfrefine.base.text import counted
from crfrefine.engines.base import MeanFieldReport, Reported
from crfrefine.engines.results import softmax
from crfrefine.refinement.refined import RefinedChannels

if TYPE_CHECKING:
    from crfrefine.metrics.lesion_matching import ComponentChanges


# Fields have names, no promised order.
@dataclass(frozen=True, eq=False, repr=False, match_args=False)
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
        threads: number of CPU threads used; None means the cores this process may use.
        num_padding_voxels: voxels in the mask that are padding, and took no part.
        voxels_removed: voxels of components that `postprocess` turned into background.
        voxels_filled: voxels of holes that `postprocess` filled.
        lost_to_rules: for each label that lost voxels to `postprocess`: the number of its voxels
            before and after.
        notes: notes for the caller; `str` of one is its sentence, `kind` and `values` are for
            programs.
        spacing: mm, one per grid axis, as it was given; None means unknown.
        regions: the regions of the channels; None means that the channels are labels.
        channel_labels: the label of each channel; a refined label map has channels only for labels
            that occur. Empty for regions.
        num_labels: L, background included; more than there are channels if some labels do not
            occur.
        output_temperature: divides the logits where they become marginals.
    """

    label_map: Labels
    network_label_map: Labels
    channels: RefinedChannels
    order: Axes = field(compare=False)
    report: MeanFieldReport
    timings: dict[str, float] = field(default_factory=dict, compare=False)
    device: str = field(default="cpu", compare=False)
    threads: int | None = field(default=None, compare=False)
    num_padding_voxels: int = 0
    voxels_removed: int = 0
    voxels_filled: int = 0
    lost_to_rules: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    notes: Notes = ()
    spacing: Spacing | None = None
    regions: RegionScheme | None = None
    channel_labels: tuple[int, ...] = ()
    num_labels: int = 0
    output_temperature: float = 1.0

    def __eq__(self, other: object) -> bool:
        """Compare the values, arrays too, which a dataclass cannot compare."""
        if not isinstance(other, RefinementResult):
            return NotImplemented
        for entry in fields(self):
            if entry.compare and entry.name != "channels":
                mine = getattr(self, entry.name)
                theirs = getattr(other, entry.name)
                if isinstance(mine, np.ndarray):
                    is_same = np.array_equal(mine, theirs)
                else:
                    is_same = mine == theirs
                if not is_same:
                    return False
        mine = self.order.undo(self.channels.dense())
        theirs = other.order.undo(other.channels.dense())
        return np.array_equal(mine, theirs)

    def __repr__(self) -> str:
        """Summarize the result in one line, without arrays."""
        grid = "×".join(str(extent) for extent in self.label_map.shape)
        kind = "labels" if self.regions is None else "regions"
        report = self.report
        words = [
            f"{self.channels.num_channels} {kind} on {grid} voxels",
            counted(report.num_iterations, "step"),
        ]
        if report.converged:
            words.append("converged")
        if report.energy:
            words.append(f"energy {report.energy[-1]:.6g}")
        words.append(f"on {self.device}")
        return f"<RefinementResult: {', '.join(words)}>"

    @cached_property
    def logits(self) -> Float32:
        """(L, *grid) float32, x of the last step; for regions (R, *grid) log-odds.

        Outside the mask they are the input over the temperature. Where the network saw nothing they
        are 0 for background and -1e4 for all other labels, or all regions. The array is put
        together when first asked for, where labels took no part from the input's array. Raises
        InputError if the caller has changed that since.
        """
        return self.order.undo(self.channels.dense())

    @cached_property
    def marginals(self) -> Float32:
        """(L, *grid) float32, the softmax of logits / output temperature.

        For regions it is the sigmoid, (R, *grid). They are computed when asked for, unless the
        engine has computed them in its last step.
        """
        channels = self.channels
        is_kept = "logits" in vars(self) or channels.is_array
        computed = channels.marginals
        order = self.order
        if computed is not None and self.output_temperature == 1.0:
            return order.undo(computed)
        # If the logits were not asked for, their array is reused for the marginals.
        values = order.apply(self.logits) if is_kept else channels.dense()
        return order.undo(self._probabilities(values, in_place=not is_kept))

    def logits_at(self, mask: ArrayLike) -> Float32:
        """Return the refined logits at the voxels of a mask, (L, N), for regions (R, N).

        Arguments and errors as for `marginals_at`.
        """
        return self.channels.at(given_voxels(mask, self.label_map.shape), self.order)

    def marginals_at(self, mask: ArrayLike) -> Float32:
        """Return `marginals[:, mask != 0]`, (L, N) float32, for regions (R, N).

        The array of the whole grid is not made.

        Args:
            mask: (*grid), nonzero at the voxels; it may differ from the mask given to `refine`.

        Raises:
            InputError: the mask has another shape than the grid, or values that are not finite; or
                the caller has changed the input's array.
        """
        return self._probabilities(self.logits_at(mask), in_place=True)

    def _probabilities(self, logits: Float32, *, in_place: bool) -> Float32:
        """Return softmax over labels, or sigmoid of regions; `in_place` overwrites the logits."""
        temperature = self.output_temperature
        if self.regions is not None:
            return sigmoid(over_output_temperature(logits, temperature))
        out = logits if in_place else None
        if temperature != 1.0:
            out = np.multiply(logits, 1.0 / temperature, out=out)
            logits = out
        return softmax(logits, self.threads, out)

    @cached_property
    def changes(self) -> LabelChanges:
        """Voxels of each label before and after, and the number of changed voxels.

        Counted when first asked for.
        """
        before = self.network_label_map
        after = self.label_map
        num_changed = int(np.count_nonzero(before != after))
        counts_before = count_labels(before, self.num_labels)
        counts_after = count_labels(after, self.num_labels)
        return LabelChanges(num_changed, counts_before, counts_after)

    @cached_property
    def component_changes(self) -> dict[int, ComponentChanges]:
        """Of each label above 0 before or after: components that vanished or were made, and so on.

        Counted when first asked for.
        """
        from crfrefine.metrics.lesion_matching import component_changes

        labels = [label for label, _, _ in self.changes.by_label()]
        return component_changes(self.network_label_map, self.label_map, labels)
