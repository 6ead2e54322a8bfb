"""The table of backends: which engine runs on which device."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from crfrefine.base.text import shorten_value
from crfrefine.errors import BackendUnavailableError, ConfigError

if TYPE_CHECKING:
    from crfrefine.engines.base import Backend

DEVICES = ("auto", "cpu", "cuda", "cuda:N", "torch", "torch:cuda", "torch:cuda:N")


def get_backend(device: str, *, keeps_kernels: bool = False) -> Backend:
    """Return the engine for one of `DEVICES`; "auto" is the GPU if there is one and CuPy is installed, else the CPU.

    With `keeps_kernels` the newest kernels of the CPU stay in memory for the next run. Raises ConfigError for an unknown device,
    BackendUnavailableError if its engine is missing.
    """
    for pattern, load in _TABLE:
        if re.fullmatch(pattern, str(device)):
            return load(device)
    if device == "auto":
        from crfrefine.engines.cuda.cupy_device import is_available

        try:
            if is_available():
                return _cuda_backend(0)
        except BackendUnavailableError as error:
            warnings.warn(
                f"--device auto takes the CPU, as the GPU cannot be used ({error})",
                RuntimeWarning,
                stacklevel=2,
            )
    elif device != "cpu":
        raise ConfigError(
            f"device: expected one of {', '.join(DEVICES)}; got {shorten_value(device)}"
        )
    from crfrefine.engines.cpu import CpuBackend

    return CpuBackend(keeps_kernels)


def unexpected_device(requested: str, device: str) -> str | None:
    """Return words about a device that "auto" chose, if a user may expect another one; else None.

    The CPU is expected where no GPU is. A GPU that does not work has led to a warning before.
    """
    from crfrefine.engines.cuda.cupy_device import lacks_cupy

    if requested != "auto":
        return None
    if device != "cpu":
        return f"device {device} (auto)"
    if lacks_cupy():
        return "device cpu (auto: CuPy, which drives the GPU, is not installed)"
    return None


@cache
def _cuda_backend(number: int) -> Backend:
    """One backend per GPU, whatever name it is asked for by: its lock admits one case at a time."""
    from crfrefine.engines.cuda.cupy_device import CupyDevice
    from crfrefine.engines.cuda.kernels import CudaBackend

    return CudaBackend(CupyDevice(number))


# A device does not survive a fork: the child creates it again, or finds that it does not work.
os.register_at_fork(after_in_child=_cuda_backend.cache_clear)


def _torch(device: str) -> Backend:
    try:
        from crfrefine.engines.torch.engine import TorchBackend
    except ImportError as error:
        raise BackendUnavailableError(
            f"--device torch needs PyTorch ({error}): pip install 'crfrefine[train]'"
        ) from error
    return TorchBackend(device.partition(":")[2] or "cpu")


# Patterns of devices beside the CPU.
_TABLE: tuple[tuple[str, Callable[[str], Backend]], ...] = (
    (r"cuda(:[0-9]{1,9})?", lambda device: _cuda_backend(int(device.partition(":")[2] or 0))),
    (r"torch(:cuda(:[0-9]{1,9})?)?", _torch),
)
