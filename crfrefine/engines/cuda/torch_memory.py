"""PyTorch's stream and PyTorch's memory for the engine where it is given tensors: one order of work, one pool of memory.

PyTorch is imported only where a tensor shows that somebody has done so before: refining files never loads it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class _Borrowed:
    """A stream of PyTorch's, as CuPy takes one from others."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


class _State(threading.local):
    """Whether this thread allocates through PyTorch now; which device's memory it is."""

    device: int | None = None


_state = _State()


@contextmanager
def following(cupy: Any, array: Any) -> Iterator[None]:
    """Launch on PyTorch's current stream, and allocate through PyTorch, while working for a tensor on a GPU.

    Arrays that are allocated in here may outlive it: each goes back to PyTorch, to the stream that it was allocated for.

    Args:
        cupy: the array module, with its device made current.
        array: what the engine was given; anything but a tensor on a GPU changes nothing.
    """
    if not _is_tensor(array):
        yield
        return
    import torch

    device = int(array.device.index)
    stream = torch.cuda.current_stream(device).cuda_stream
    # What CuPy keeps for itself from work without PyTorch cannot be had through PyTorch.
    pool = cupy.get_default_memory_pool()
    if pool.free_bytes() > 0:
        pool.free_all_blocks()

    def allocate(size: int, on_device: int) -> int:
        try:
            return int(torch.cuda.caching_allocator_alloc(size, on_device, stream))
        except torch.cuda.OutOfMemoryError as error:  # CuPy's own is one, and whoever calls expects one
            raise MemoryError(str(error)) from error

    allocator = cupy.cuda.PythonFunctionAllocator(allocate, _free).malloc
    before = _state.device
    # PyTorch's current device too: it shares no tensor of another one's, and after each allocation it makes its own the driver's again.
    with torch.cuda.device(device), _as_cupys(cupy, stream, device), cupy.cuda.using_allocator(allocator):
        _state.device = device
        try:
            yield
        finally:
            _state.device = before


def cached_bytes() -> int | None:
    """Memory that PyTorch holds unused, for whom this thread allocates through it; None: it does not."""
    if _state.device is None:
        return None
    import torch

    return int(torch.cuda.memory_reserved(_state.device) - torch.cuda.memory_allocated(_state.device))


def _is_tensor(array: Any) -> bool:
    """Whether it is a tensor in a GPU's memory; asked without importing PyTorch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor) and array.device.type == "cuda"


def _as_cupys(cupy: Any, pointer: int, device: int) -> Any:
    """PyTorch's stream as one of CuPy's; the default stream is the same one for both."""
    streams = cupy.cuda.Stream
    if pointer == 0:
        return streams.null
    if hasattr(streams, "from_external"):
        return streams.from_external(_Borrowed(pointer))
    return cupy.cuda.ExternalStream(pointer, device)


def _free(pointer: int, _: int) -> None:
    if not sys.is_finalizing():  # PyTorch may be gone already, and the memory goes with the process
        import torch

        torch.cuda.caching_allocator_delete(pointer)
