"""Refining one case again and again with ever new parameters, as interactive programs do: what they change costs, and steps are shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from crfrefine.arrays.one_hot import renumber
from crfrefine.engines.keeping import KeepingBackend

if TYPE_CHECKING:
    from crfrefine.arrays.label_maps import Box
    from crfrefine.base.array_types import Float32, Labels
    from crfrefine.base.axes import StorageOrder
    from crfrefine.engines.base import Backend


@dataclass(frozen=True)
class RefiningAgain:
    """What calls of `crfrefine.refine` for one case share; on the CPU, one call at a time. Results have the bits of calls without it.

    The kernels of the newest call are kept, in memory that it would otherwise give back (20 to 100 bytes per voxel): if image, mask and
    bandwidths are the same in the next call, they are not built anew.

    Attributes:
        show: called as show(step, num_steps, label_map) after each step that is not the last, before small objects are removed; may raise
            to stop. Not called for regions, for cases that are worked on part by part, and if the tolerance is 0. None: nothing is shown.
        engine: keeps the kernels.
    """

    show: Callable[[int, int, Labels], None] | None = None
    engine: KeepingBackend = field(default_factory=KeepingBackend)

    def replaces(self, backend: Backend) -> Backend:
        """Return the engine that keeps kernels, for the CPU; other backends keep nothing, and are returned as they are."""
        return self.engine if backend.name == self.engine.name else backend

    def watch(self, decode: Callable[[Float32], Labels], logits: Float32, box: Box | None, order: StorageOrder) -> None:
        """Prepare for showing the steps of the next run: of its network's (L, *grid) logits, refined in a box, in storage order."""
        show = self.show
        if show is None:
            self.engine.look = None
            return

        def look(step: int, num_steps: int, refined: Float32) -> None:
            labels = decode(refined)
            if box is not None:
                inside, labels = labels, decode(logits)
                labels[box] = inside
            show(step, num_steps, order.to_user(labels))

        self.engine.look = look

    def renumbered(self, channel_labels: Sequence[int]) -> RefiningAgain:
        """Return the same for channels that hold some of the labels only: only labels are shown."""
        show = self.show
        if show is None:
            return self
        return replace(self, show=lambda step, num_steps, labels: show(step, num_steps, renumber(labels, channel_labels)))
