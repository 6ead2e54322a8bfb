"""Channels that stay on the device, and what is asked about them there: a label map is a byte per voxel, logits are four per label."""

from __future__ import annotations

import time
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.arrays.label_maps import LabelChanges
from crfrefine.engines.base import MeanFieldReport, MeanFieldResult, Range

if TYPE_CHECKING:
    from crfrefine.arrays.label_maps import Box
    from crfrefine.engines.cuda.device import Device

SHARE = 8
"""What is held for later takes at most the free memory over this: other cases need it too."""

_FOLDS = (1 << 14, 1 << 9, 1 << 4)
"""Values left per channel after each pass over it; the last ones are the host's."""
_MOST_NARROW = 256
_COUNTERS = 1 << 17
"""Threads that count labels, each its share of the places for one label."""


class HeldChannels:
    """(channels, *grid) float32 on a device, in C order."""

    def __init__(self, device: Device, array: Any) -> None:
        """Take an array on the device."""
        self.device, self.array = device, array

    def __len__(self) -> int:
        """Return the number of channels."""
        return len(self.array)

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, *grid)."""
        return tuple(self.array.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return int(self.array.nbytes)

    def to_host(self) -> NDArray[np.float32]:
        """Return a copy on the host."""
        with self.device.active():
            found: NDArray[np.float32] = self.device.download(self.array)
        return found

    def inside(self, box: Box) -> HeldChannels:
        """Return a copy of a box of the grid, (channels, *box)."""
        return HeldChannels(self.device, self.array[(slice(None), *box)].copy())

    def ranges(self) -> list[Range]:
        """Return each channel's extremes; see `Backend.channel_ranges`."""
        low = high = self.array.reshape(len(self), -1)
        for most in _FOLDS:
            num_folded = min(most, low.shape[1])
            folded = self.device.xp.empty((2, len(self), num_folded), dtype=np.float32)
            self._launch("fold_ranges", len(self) * num_folded, low, high, low.shape[1], len(self), num_folded, folded)
            low, high = folded
        ends = self.device.download(folded)
        return [(float(low.min()), float(high.max())) for low, high in zip(*ends, strict=True)]

    def label_map(self) -> NDArray[np.unsignedinteger[Any]]:
        """Return the label of the largest channel at each voxel, on the host; see `Backend.label_map`."""
        return self.device.download(self.labels)

    @cached_property
    def labels(self) -> Any:
        """(*grid) the label of the largest channel at each voxel, on the device, in one byte, or two from 257 labels on."""
        size = int(self.array[0].size)
        labels = self.device.xp.empty(self.shape[1:], dtype=np.uint8 if self._is_narrow else np.uint16)
        self._launch("label_places" if self._is_narrow else "label_places_wide", size, self.array, size, len(self), labels)
        return labels

    def changes(self, after: HeldChannels, box: Box | None) -> LabelChanges:
        """Return what became of the label map of these channels.

        Args:
            after: refined channels, (channels, *grid) or (channels, *box); their label map on the device is given up.
            box: the part of the grid that was refined; None: all of it.
        """
        num_labels = len(self)
        before = self.labels if box is None else self.labels[box].copy()
        counts = self._count(before, after.labels, 2 * num_labels + 1)
        of_before, of_after, changed = counts[:num_labels], counts[num_labels:-1], counts[-1]
        if box is not None:
            everywhere = self._count(self.labels, self.labels, num_labels)
            of_before, of_after = everywhere, everywhere - of_before + of_after
        del after.labels
        return LabelChanges(int(changed), tuple(map(int, of_before)), tuple(map(int, of_after)))

    def _count(self, before: Any, after: Any, num_rows: int) -> NDArray[np.int64]:
        """Return how often each label occurs before, and after, and how many places differ: the first rows of these."""
        size = int(before.size)
        num_folded = max(1, min(size, _COUNTERS // num_rows))
        counts = self.device.xp.empty((num_rows, num_folded), dtype=np.uint32)
        kernel = "count_labels" if self._is_narrow else "count_labels_wide"
        self._launch(kernel, num_rows * num_folded, before, after, size, len(self), num_rows, num_folded, counts)
        return self.device.download(counts.sum(axis=1, dtype=np.int64))

    @property
    def _is_narrow(self) -> bool:
        return len(self) <= _MOST_NARROW

    def find_padding(self) -> NDArray[np.bool_] | None:
        """Return where all channels are equal, on the host; None: nowhere. See `Backend.find_padding`."""
        xp, size = self.device.xp, int(self.array[0].size)
        equal, found = xp.empty(self.shape[1:], dtype=np.uint8), xp.zeros(1, dtype=np.uint64)
        self._launch("find_equal", size, self.array, size, len(self), equal, found)
        if not int(self.device.download(found)[0]):
            return None
        return self.device.download(equal).view(np.bool_)

    def _launch(self, kernel: str, num_threads: int, *arguments: Any) -> None:
        self.device.launch("channels", kernel, {}, num_threads, *arguments)


class HeldResult(MeanFieldResult):
    """A run whose refined logits are on the device until somebody asks for them, which gives their memory there back."""

    def __init__(self, channels: HeldChannels, report: MeanFieldReport, timings: dict[str, float]) -> None:
        """Take refined logits."""
        vars(self).update(_channels=channels, report=report, timings=timings, marginals=None)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies, and other processes, get the logits as an array of the host."""
        return MeanFieldResult, (self.logits, self.report, self.timings)

    @property
    def held(self) -> Any:
        """The logits where they are."""
        return vars(self)["_channels"] or self.logits

    @cached_property
    def logits(self) -> NDArray[np.float32]:
        """(L, *grid) on the host."""
        channels = vars(self)["_channels"]
        started = time.perf_counter()
        found: NDArray[np.float32] = channels.to_host()
        vars(self)["_channels"] = None
        self.timings["download"] = time.perf_counter() - started
        return found
