"""Work on a device for one object, whose memory belongs to one stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from crfrefine.base.one_call import OneCall
from crfrefine.engines.cuda.cupy_device import CupyDevice, following
from crfrefine.errors import DeviceMemoryError


class OneStream:
    """The calls of an object that keeps arrays on a device: one at a time.

    All memory is allocated for the stream that was the current one in the first call. A call on
    that stream does not wait for the device; one on another stream waits for all work before and
    after it.
    """

    def __init__(self, device: CupyDevice, task: str, remedy: str) -> None:
        """Take the task and the remedy that an error names if a GPU's memory is too small.

        `{shape}` in the task stands for the shape of a call's array.
        """
        self._device = device
        self._task = task
        self._remedy = remedy
        self._one_call = OneCall(
            f"these kernels on {device.name} are at work: a progress callback must not use the "
            "kernels of the run that called it; build others for it",
            waits=True,
        )
        self._stream: int | None = None  # that of the first call

    @contextmanager
    def working(self, array: Any) -> Iterator[None]:
        """Work on the device; if the array is a tensor, on PyTorch's stream and in its memory.

        A failed allocation becomes a DeviceMemoryError: the case does not fit.
        """
        device = self._device
        try:
            with self._one_call, device.active(), following(device.xp, array, owner=self._stream):
                stream = device.stream()
                if self._stream is None:
                    self._stream = stream
                if stream == self._stream:
                    yield
                    return
                device.synchronize_all()
                try:
                    yield
                finally:
                    device.synchronize()
        except MemoryError as error:
            # A plain MemoryError is a progress callback's: the GPU's and numpy's have other types.
            if type(error) is MemoryError:
                raise
            task = self._task.format(shape=tuple(array.shape))
            raise DeviceMemoryError(
                f"not enough memory on {device.name} {task} ({error}); {self._remedy}"
            ) from error

    def like(self, array: Any, example: Any) -> Any:
        """Return the array, if there is one, on the host or on the device, as the example is."""
        if array is None or not isinstance(example, np.ndarray):
            return array
        return self._device.download(array)
