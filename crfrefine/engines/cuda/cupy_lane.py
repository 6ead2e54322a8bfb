"""The real lane: a stream of CuPy's for copies through page-locked memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class _Event:
    """An event of CUDA behind a copy."""

    def __init__(self, xp: Any, stream: Any) -> None:
        self._event = xp.cuda.Event(block=True, disable_timing=True)  # block: waiting takes no processor time
        self._event.record(stream)

    def wait(self) -> None:
        self._event.synchronize()


class CupyLane:
    """A stream beside the current one; see `Lane`. Used on its device, inside `Device.active`."""

    def __init__(self, xp: Any) -> None:
        """Take CuPy."""
        self._xp = xp
        self._stream = xp.cuda.Stream(non_blocking=True)

    def page_locked(self, num_bytes: int) -> NDArray[np.uint8]:
        """Return page-locked memory; see `Lane.page_locked`."""
        return np.frombuffer(self._xp.cuda.alloc_pinned_memory(num_bytes), dtype=np.uint8, count=num_bytes)

    def follow_launches(self) -> None:
        """Wait on the device for the current stream; see `Lane.follow_launches`."""
        event = self._xp.cuda.Event(disable_timing=True)
        event.record(self._xp.cuda.get_current_stream())
        self._stream.wait_event(event)

    def precede_launches(self) -> None:
        """Let the current stream wait on the device; see `Lane.precede_launches`."""
        event = self._xp.cuda.Event(disable_timing=True)
        event.record(self._stream)
        self._xp.cuda.get_current_stream().wait_event(event)

    def to_device(self, target: Any, source: NDArray[np.uint8]) -> _Event:
        """Begin a copy; see `Lane.to_device`."""
        runtime = self._xp.cuda.runtime
        runtime.memcpyAsync(target.data.ptr, source.ctypes.data, source.nbytes, runtime.memcpyHostToDevice, self._stream.ptr)
        return _Event(self._xp, self._stream)

    def to_host(self, target: NDArray[np.uint8], source: Any) -> _Event:
        """Begin a copy; see `Lane.to_host`."""
        runtime = self._xp.cuda.runtime
        runtime.memcpyAsync(target.ctypes.data, source.data.ptr, target.nbytes, runtime.memcpyDeviceToHost, self._stream.ptr)
        return _Event(self._xp, self._stream)

    def wait(self) -> None:
        """Wait on the host; see `Lane.wait`."""
        self._stream.synchronize()
