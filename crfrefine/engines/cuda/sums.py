"""Sums over the voxels that stay on the device until all of them are downloaded at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.engines.cuda.device import Device

_THREADS = 256


class Sums:
    """Numbers in float64 that kernels add to, one of each thread or block for each sum; they are added up in a fixed order."""

    def __init__(self, device: Device) -> None:
        """Take a device."""
        self._device = device
        self._parts: list[Any] = []

    def reserve(self, num_sums: int, count: int) -> Any:
        """Return (num_sums, count) zeros on the device, for kernels to add to."""
        self._parts.append(self._device.xp.zeros((num_sums, count), dtype=np.float64))
        return self._parts[-1]

    def totals(self) -> list[NDArray[np.float64]]:
        """Wait until all launches so far are done; return (num_sums) totals on the host, in the order in which they were reserved."""
        ends = np.cumsum([len(part) for part in self._parts])
        found = self._device.xp.empty(int(ends[-1]), dtype=np.float64)
        for part, end in zip(self._parts, ends.tolist(), strict=True):
            add_up(self._device, part, found[end - len(part) : end])
        return np.split(self._device.download(found), ends[:-1])


def add_up(device: Device, parts: Any, totals: Any) -> None:
    """Add up (num_sums, count) numbers in float64, in a fixed order, into (num_sums) totals."""
    num_sums, count = parts.shape
    device.launch_blocks("sums", "add_up", {"CRF_THREADS": _THREADS}, num_sums, parts, count, totals)
