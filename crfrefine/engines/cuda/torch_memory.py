"""PyTorch's stream and memory for the engine when it is given tensors: one order of work, one pool of memory.

PyTorch is imported only if a tensor shows that it has been imported before: refining files never loads it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from crfrefine.base.text import shorten_value
from crfrefine.engines.cuda.loss import GpuError
from crfrefine.errors import ConfigError

VARIABLE = "CRFREFINE_CUDA"
"""Variable of the environment that asks for plain mode."""


def is_plain() -> bool:
    """Whether the environment asks for plain mode, to find what breaks on a GPU; raises ConfigError if it asks for something else.

    CuPy's own memory is then used for all work, and each launch is waited for, so that errors name a kernel.
    """
    asked = os.environ.get(VARIABLE, "").strip()
    if asked not in ("", "plain"):
        raise ConfigError(f"{VARIABLE} is {shorten_value(asked)}; expected plain, or nothing")
    return asked == "plain"


@dataclass(frozen=True)
class _Borrowed:
    """A stream of PyTorch in the form in which CuPy takes external streams."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


class _State(threading.local):
    """Whether this thread now allocates through PyTorch, and on which device."""

    device: int | None = None


_state = _State()

_not_freed: list[Exception] = []
"""Errors of memory that was to be given back. CuPy does so where Python prints exceptions and goes on."""


@contextmanager
def following(cupy: Any, array: Any) -> Iterator[None]:
    """Launch on PyTorch's current stream, and allocate through PyTorch, while working for a tensor on a GPU.

    Arrays allocated inside may outlive the context: each goes back to PyTorch, to the stream that it was allocated for.

    Args:
        cupy: the array module; its device is current.
        array: the engine's input; anything but a tensor on a GPU changes nothing.

    Raises:
        GpuError: memory of this run, or of an earlier one, could not be given back to PyTorch.
    """
    if not _is_tensor(array):
        yield
        return
    import torch

    _check_freed()
    device = int(array.device.index)
    stream = torch.cuda.current_stream(device).cuda_stream
    before, pools = _state.device, not is_plain()
    memory = _as_pytorchs(cupy, stream) if pools else nullcontext()
    # PyTorch's current device too: it shares no tensor of another device, and after each allocation it makes its own device current again.
    with torch.cuda.device(device), _as_cupys(cupy, stream, device), memory:
        _state.device = device if pools else before
        try:
            yield
        finally:
            _state.device = before
    _check_freed()


def _as_pytorchs(cupy: Any, stream: int) -> AbstractContextManager[Any]:
    """Return the context in which CuPy's memory is PyTorch's, of one of its streams."""
    import torch

    # PyTorch cannot use the memory that CuPy still holds from work without PyTorch.
    pool = cupy.get_default_memory_pool()
    if pool.free_bytes() > 0:
        pool.free_all_blocks()

    def allocate(size: int, on_device: int) -> int:
        try:
            return int(torch.cuda.caching_allocator_alloc(size, on_device, stream))
        except torch.cuda.OutOfMemoryError as error:  # CuPy's own error is a MemoryError, and callers expect one
            raise MemoryError(str(error)) from error

    context: AbstractContextManager[Any] = cupy.cuda.using_allocator(cupy.cuda.PythonFunctionAllocator(allocate, _free).malloc)
    return context


def cached_bytes() -> int | None:
    """Unused memory that PyTorch holds, if this thread allocates through it; None if it does not."""
    if _state.device is None:
        return None
    import torch

    return int(torch.cuda.memory_reserved(_state.device) - torch.cuda.memory_allocated(_state.device))


def _is_tensor(array: Any) -> bool:
    """Whether an array is a tensor in GPU memory; checked without importing PyTorch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor) and array.device.type == "cuda"


def _as_cupys(cupy: Any, pointer: int, device: int) -> Any:
    """Return PyTorch's stream as a CuPy stream; both have the same default stream."""
    streams = cupy.cuda.Stream
    if pointer == 0:
        return streams.null
    if hasattr(streams, "from_external"):
        return streams.from_external(_Borrowed(pointer))
    return cupy.cuda.ExternalStream(pointer, device)


def _free(pointer: int, _: int) -> None:
    if not sys.is_finalizing():  # PyTorch may be unloaded already, and the memory ends with the process
        import torch

        try:
            torch.cuda.caching_allocator_delete(pointer)
        except Exception as error:
            _not_freed.append(error)
            raise


def _check_freed() -> None:
    """Raise the first error of memory that was given back since the last call."""
    if _not_freed:
        error = _not_freed[0]
        _not_freed.clear()
        raise GpuError("memory could not be given back to PyTorch", error) from error
