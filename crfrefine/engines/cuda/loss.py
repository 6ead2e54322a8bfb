"""GPUs that stop working: CUDA's errors turned into what they mean for the caller."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from crfrefine.base.text import MAX_OF_A_REASON, shorten
from crfrefine.errors import CapacityError, DeviceLostError

_OUT_OF_MEMORY = 2
"""`cudaErrorMemoryAllocation` and `CUDA_ERROR_OUT_OF_MEMORY`."""


class GpuError(RuntimeError):
    """An error of CUDA, or of its compiler, and where it was.

    Attributes:
        status: CUDA's number of it; None: the compiler's.
    """

    def __init__(self, where: str, error: Exception) -> None:
        super().__init__(f"{where}: {error}")
        self.status = getattr(error, "status", None)


class LossWatch:
    """Whether a GPU still works in this process: `ask` raises one of `errors`, CUDA's exceptions, if it does not answer.

    Most errors of CUDA, such as an address that does not exist or a GPU that has left the bus, are for good: all later calls of the
    process fail.
    """

    def __init__(self, name: str, errors: tuple[type[Exception], ...], ask: Callable[[], object]) -> None:
        self._name, self._ask = name, ask
        self._errors: tuple[type[Exception], ...] = (*errors, GpuError)
        self._reason: str | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Return the context of work on the GPU.

        Raises:
            DeviceLostError: the GPU stopped working, in this context or before.
            CapacityError: the driver has no memory left.
        """
        if self._reason is not None:
            raise DeviceLostError(
                f"--device {self._name}: the GPU stopped working earlier in this process ({self._reason}); "
                "start again once nvidia-smi shows it, or use --device cpu"
            )
        try:
            yield
        except self._errors as error:
            if getattr(error, "status", None) == _OUT_OF_MEMORY:
                raise CapacityError(
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
