"""The GPU of a thread while the engine works, and afterwards.

CUDA opens a context (some 500 MB) on every GPU that a thread is set to, also where it is only set back; on a GPU that admits one process
(exclusive mode), that fails if another process has it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_REFUSED = (2, 46)
"""`cudaErrorMemoryAllocation` and `cudaErrorDevicesUnavailable`: the GPU is full, or another process has it for itself."""

_is_own_process = False


def own_process() -> None:
    """Leave threads of this process on the GPU that they worked on: nothing else in it depends on the current GPU."""
    global _is_own_process
    _is_own_process = True


@contextmanager
def on_gpu(runtime: Any, number: int) -> Iterator[None]:
    """Set this thread to a GPU; at the end to its GPU before, unless the process is our own (`own_process`).

    If a GPU refuses to be set back to, its context would be this process's first one there: a warning says that the thread stays.
    `runtime` is CuPy's `cuda.runtime`.
    """
    before = int(runtime.getDevice())
    if before != number:
        runtime.setDevice(number)
    try:
        yield
    finally:
        if before != number and not _is_own_process:
            _set_back(runtime, before, number)


def _set_back(runtime: Any, before: int, number: int) -> None:
    try:
        runtime.setDevice(before)
    except runtime.CUDARuntimeError as error:
        if getattr(error, "status", None) not in _REFUSED:
            raise
        warnings.warn(
            f"GPU {before}, which was current before work on GPU {number}, cannot be set back to ({error}): this thread stays on "
            f"GPU {number}; make that current beforehand, or hide the others with CUDA_VISIBLE_DEVICES",
            RuntimeWarning,
            stacklevel=4,
        )
