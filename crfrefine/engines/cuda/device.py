"""The parts of a device that the GPU engine uses: arrays with numpy's functions, and kernels to launch on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.array_types import Array
from crfrefine.engines.base import Progress
from crfrefine.engines.cuda.torch_memory import following
from crfrefine.errors import CapacityError

_MARK = "_is_a_callers"
"""Attribute of errors of a caller's progress function: its lack of memory means nothing about the GPU's."""

UNKNOWN_SHORTAGE = 2.0
"""`CapacityError.shortage` where an allocation failed whose size was not estimated."""


class Device(Protocol):
    """A place where arrays live and kernels run, in the order in which they are launched."""

    name: str
    xp: Any
    """The array module, numpy or one like it: bincount, cumsum, flatnonzero, searchsorted, sort, stable argsort, elementwise arithmetic."""

    def launch(self, source: str, kernel: str, constants: Mapping[str, int], num_threads: int, *arguments: Any) -> None:
        """Run a kernel of kernels/cuda/<source>.cu with at least `num_threads` threads; None means a null pointer."""
        ...

    def launch_blocks(self, source: str, kernel: str, constants: Mapping[str, int], num_blocks: int, *arguments: Any) -> None:
        """Run a kernel whose threads share memory by block: `num_blocks` blocks of constants["CRF_THREADS"] threads each."""
        ...

    def upload(self, array: Any) -> Any:
        """Return the array on the device in C order: a numpy array is copied; an array on the device is shared by DLPack."""
        ...

    def download(self, array: Any) -> Array:
        """Return a copy on the host after all launches so far are done."""
        ...

    def synchronize(self) -> None:
        """Wait until all launches so far are done."""
        ...

    def active(self) -> AbstractContextManager[Any]:
        """Return the context in which all calls and all arithmetic on the device's arrays must happen."""
        ...

    def free_bytes(self) -> int | None:
        """Memory that can still be allocated; None: not limited by a device."""
        ...


@contextmanager
def active_for(device: Device, array: Any) -> Iterator[None]:
    """Activate the device for a run on an array: for a tensor on a GPU, on PyTorch's stream and in PyTorch's memory."""
    with device.active(), following(device.xp, array):
        yield


def check_memory(device: Device, num_bytes: float, what: str) -> None:
    """Refuse what will not fit, before anything is allocated for it.

    Raises:
        CapacityError: too little memory is free; the message has the estimate and the free memory.
    """
    free = device.free_bytes()
    if free is not None and num_bytes > free:
        raise CapacityError(
            f"{what} needs about {num_bytes / 1e9:.1f} GB on {device.name}, where {free / 1e9:.1f} GB are free; "
            "use a mask or a smaller region, fewer labels at a time, or --device cpu"
        ).with_shortage(num_bytes / max(free, 1.0))


@contextmanager
def capacity(shape: Sequence[int]) -> Iterator[None]:
    """Turn a failed allocation into an error that a user can act on."""
    try:
        yield
    except MemoryError as error:  # CuPy's error is a MemoryError too
        if hasattr(error, _MARK):
            raise
        grid = "x".join(str(extent) for extent in shape[1:])
        raise CapacityError(
            f"not enough memory on the GPU to filter {shape[0]} channels on a grid of {grid} voxels ({error}); "
            "use a mask or a smaller region, or --device cpu"
        ).with_shortage(UNKNOWN_SHORTAGE) from error


def staged(progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    """Return a caller's progress function for one stage, to be called with a step and the number of steps."""
    if progress is None:
        return None

    def call(step: int, num_steps: int) -> None:
        try:
            progress(stage, step, num_steps)
        except MemoryError as error:
            setattr(error, _MARK, True)
            raise

    return call


class Room:
    """Memory that all filterings of a filter use in turn: as much as the largest array so far has needed."""

    def __init__(self, device: Device, what: str) -> None:
        """Take a device; `what` is named if there is too little memory."""
        self._device, self._what = device, what
        self._bytes: Any = None

    def array(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return an array with any values in it, until the next call; raises CapacityError with too little memory."""
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        if self._bytes is None or self._bytes.size < num_bytes:
            self._bytes = None  # before more is allocated
            check_memory(self._device, num_bytes, self._what)
            self._bytes = self._device.xp.empty(num_bytes, dtype=np.uint8)
        return self._bytes[:num_bytes].view(dtype).reshape(shape)


WIDEST_ROW = 8


def row_width(num_channels: int) -> int:
    """Channels that lie side by side and are filtered together: 1, 2, 4 or 8."""
    return next((width for width in (1, 2, 4) if num_channels <= width), WIDEST_ROW)


def num_row_groups(num_channels: int) -> int:
    """Rows needed for so many channels; the last one may be filled in part."""
    return -(-num_channels // row_width(num_channels))


def padded_channels(num_channels: int) -> int:
    """Number of channels including those that fill the last row."""
    return num_row_groups(num_channels) * row_width(num_channels)


def row_constants(rows: Any) -> dict[str, int]:
    """The constants of kernels for (group, voxel, width) values."""
    return {"CRF_WIDTH": rows.shape[-1]}


def grouped(per_channel: NDArray[np.floating[Any]], width: int) -> NDArray[np.floating[Any]]:
    """(channel) numbers as (group, width), padded with zeros."""
    num_groups = -(-len(per_channel) // width)
    padded = np.zeros(num_groups * width, dtype=per_channel.dtype)
    padded[: len(per_channel)] = per_channel
    return padded.reshape(num_groups, width)
