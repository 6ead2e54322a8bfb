"""The GPU of a thread while the engine works, and GPUs that stop working.

CUDA opens a context (some 500 MB) on every GPU that a thread is set to, also where it is only set back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from crfrefine.base.text import MAX_OF_A_REASON, shorten
from crfrefine.errors import DeviceLostError, DeviceMemoryError

OUT_OF_MEMORY = 2  # `cudaErrorMemoryAllocation` and `CUDA_ERROR_OUT_OF_MEMORY`
_REFUSED = (OUT_OF_MEMORY, 46)  # the second, `cudaErrorDevicesUnavailable`: another process has the GPU for itself
_is_own_process = False


def own_process() -> None:
    """Leave threads of this process on the GPU that they worked on: nothing else in it depends on the current GPU."""
    global _is_own_process
    _is_own_process = True


@contextmanager
def on_gpu(runtime: Any, number: int) -> Iterator[None]:
    """Set this thread to a GPU; at the end to its GPU before, unless the process is our own (`own_process`)."""
    # If that GPU admits no context of this process, the thread stays, with a warning. `runtime` is
    # CuPy's `cuda.runtime`.
    before = int(runtime.getDevice())
    if before != number:
        runtime.setDevice(number)
    try:
        yield
    finally:
        if before != number and not _is_own_process:
            try:
                runtime.setDevice(before)
            except runtime.CUDARuntimeError as error:
                if getattr(error, "status", None) not in _REFUSED:
                    raise
                text = f"GPU {before} cannot be made current again ({error}): this thread stays on GPU {number}"
                warnings.warn(text, RuntimeWarning, stacklevel=3)


class GpuError(RuntimeError):
    """An error of CUDA or of its compiler, and where it was; `status` is CUDA's number, None the compiler's."""

    def __init__(self, where: str, error: Exception) -> None:
        super().__init__(f"{where}: {error}")
        self.status = getattr(error, "status", None)


class LossWatch:
    """Whether a GPU still works in this process: `ask` raises one of `errors`, CUDA's exceptions, if it does not answer.

    Most errors of CUDA, such as a wrong address or a GPU that has left the bus, are for good: all later calls fail.
    """

    def __init__(self, name: str, errors: tuple[type[Exception], ...], ask: Callable[[], object]) -> None:
        self._name, self._ask = name, ask
        self._errors: tuple[type[Exception], ...] = (*errors, GpuError)
        self._reason: str | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Return the context of work on the GPU; raises DeviceLostError if it stopped working, or DeviceMemoryError."""
        if self._reason is not None:
            raise DeviceLostError(
                f"--device {self._name}: the GPU stopped working earlier in this process ({self._reason}); "
                "start again once nvidia-smi shows it, or use --device cpu"
            )
        try:
            yield
        except self._errors as error:
            if getattr(error, "status", None) == OUT_OF_MEMORY:
                raise DeviceMemoryError(
                    f"not enough memory on the GPU {self._name} ({error}); use a mask or a smaller region, or --device cpu"
                ) from error
            try:
                self._ask()
            except self._errors:
                self._reason = shorten(error, MAX_OF_A_REASON)
                raise DeviceLostError(
                    f"--device {self._name}: the GPU stopped working in this case ({self._reason}); "
                    "nvidia-smi and the system's log may say why; start again, or use --device cpu"
                ) from error
            raise
