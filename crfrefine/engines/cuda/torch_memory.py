"""PyTorch's stream and memory for the engine when it is given tensors: one order of work, one pool of memory.

PyTorch is used only if the caller has imported it: refining files never loads it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from crfrefine.base.text import shorten_value
from crfrefine.errors import ConfigError

VARIABLE = "CRFREFINE_CUDA"  # of the environment; asks for plain mode


def is_plain() -> bool:
    """Whether the environment asks for plain mode, to find what breaks on a GPU; raises ConfigError for any other word.

    All work then uses CuPy's own memory, and each launch is waited for, so that errors name a kernel.
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


@contextmanager
def following(cupy: Any, array: Any) -> Iterator[None]:
    """Launch on PyTorch's current stream, and allocate through PyTorch, while working for a tensor on a GPU.

    Arrays allocated inside may outlive the context: each goes back to PyTorch, to the stream that it was allocated for.

    Args:
        cupy: the array module; its device is current.
        array: the engine's input; anything but a tensor on a GPU changes nothing.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(array, torch.Tensor) or array.device.type != "cuda":
        yield
        return
    device = int(array.device.index)
    pointer = torch.cuda.current_stream(device).cuda_stream
    stream = cupy.cuda.Stream.from_external(_Borrowed(pointer)) if pointer else cupy.cuda.Stream.null
    memory = nullcontext() if is_plain() else _pytorchs_memory(torch, cupy, pointer)
    # PyTorch's current device too: it shares no tensor of another device, and allocates on its own.
    with torch.cuda.device(device), stream, memory:
        yield


def _pytorchs_memory(torch: Any, cupy: Any, stream: int) -> AbstractContextManager[Any]:
    # PyTorch cannot use the memory that CuPy still holds from work without PyTorch.
    cupy.get_default_memory_pool().free_all_blocks()

    def allocate(size: int, device: int) -> int:
        try:
            return int(torch.cuda.caching_allocator_alloc(size, device, stream))
        except torch.cuda.OutOfMemoryError as error:  # Callers expect a MemoryError, as CuPy's is one.
            raise MemoryError(str(error)) from error

    def free(pointer: int, _: int) -> None:
        if not sys.is_finalizing():  # PyTorch may be unloaded already, and the memory ends with the process.
            torch.cuda.caching_allocator_delete(pointer)

    context: AbstractContextManager[Any] = cupy.cuda.using_allocator(cupy.cuda.PythonFunctionAllocator(allocate, free).malloc)
    return context
