"""Memory of a filter that all its filterings use in turn, whatever the number of channels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from crfrefine.engines.cuda.device import Device, check_memory


class Room:
    """As much memory as the largest array so far has needed."""

    def __init__(self, device: Device, what: str) -> None:
        """Take a device; `what` is named if there is too little memory."""
        self._device, self._what = device, what
        self._bytes: Any = None

    def array(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return an array with any values in it, until the next call.

        Raises:
            CapacityError: too little memory.
        """
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        if self._bytes is None or self._bytes.size < num_bytes:
            self._bytes = None  # before more is allocated
            check_memory(self._device, num_bytes, self._what)
            self._bytes = self._device.xp.empty(num_bytes, dtype=np.uint8)
        return self._bytes[:num_bytes].view(dtype).reshape(shape)
