"""The GPU of a thread while the engine works.

CUDA opens a context (some 500 MB) on every GPU that a thread is set to, even if the thread is only
set back to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

OUT_OF_MEMORY = 2  # `cudaErrorMemoryAllocation` and `CUDA_ERROR_OUT_OF_MEMORY`
_DEVICES_UNAVAILABLE = 46  # status of CUDA's runtime: another process has the GPU for itself
# True lets threads stay on the GPU that they worked on, because nothing else in the process depends
# on the current GPU.
is_own_process = False


class GpuMemoryError(MemoryError):
    """A GPU has too little memory; CuPy's own error is a MemoryError, too."""


@contextmanager
def on_gpu(runtime: Any, number: int) -> Iterator[None]:
    """Set this thread to a GPU by CuPy's `cuda.runtime`.

    At the end the thread is set back to its previous GPU, unless `is_own_process`.
    """
    before = runtime.getDevice()
    if before != number:
        runtime.setDevice(number)
    try:
        yield
    finally:
        if before != number and not is_own_process:
            try:
                runtime.setDevice(before)
            except runtime.CUDARuntimeError as error:
                if error.status not in (OUT_OF_MEMORY, _DEVICES_UNAVAILABLE):
                    raise
                warnings.warn(
                    f"GPU {before} cannot be made current again ({error}): this thread stays on "
                    f"GPU {number}",
                    RuntimeWarning,
                    stacklevel=3,
                )
