"""The table of backends: which engine runs on which device, and whether there is a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from crfrefine.base.text import shorten_value
from crfrefine.errors import BackendUnavailableError, ConfigError

if TYPE_CHECKING:
    from crfrefine.engines.base import Backend

DEVICES = ("auto", "cpu", "cuda", "cuda:N", "torch", "torch:cuda", "torch:cuda:N")
# Device files of GPUs on Linux, on WSL, and on boards with an integrated GPU.
_GPU_FILES = ("nvidia[0-9]*", "dxg", "nvhost-gpu", "nvgpu")


def get_backend(device: str, *, keeps_kernels: bool = False) -> Backend:
    """Return the engine for one of `DEVICES`.

    "auto" is the GPU if there is one and CuPy is installed, else the CPU. With `keeps_kernels`
    the newest kernels of the CPU stay in memory for the next run. Raises ConfigError for an
    unknown device, BackendUnavailableError if its engine is missing. "auto" warns of a GPU that
    cannot be used.
    """
    name = str(device)
    for pattern, load in _TABLE:
        if re.fullmatch(pattern, name):
            return load(name)

    if name == "auto":
        try:
            if is_available():
                return _cuda_backend(0)
        except BackendUnavailableError as error:
            warnings.warn(
                f"--device auto takes the CPU, as the GPU cannot be used ({error})",
                RuntimeWarning,
                stacklevel=2,
            )
    elif name != "cpu":
        known = ", ".join(DEVICES)
        raise ConfigError(f"device: expected one of {known}; got {shorten_value(device)}")

    from crfrefine.engines.cpu import CpuBackend

    return CpuBackend(keeps_kernels)


def may_have_gpu() -> bool:
    """Return whether the system shows a GPU, and the environment does not hide all of them."""
    # The driver is not used: once it is, no process forked from this one can use a GPU.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip()
    if not visible or visible.startswith("-"):
        return False
    for pattern in _GPU_FILES:
        if any(Path("/dev").glob(pattern)):
            return True
    return any(Path("/proc/driver/nvidia").glob("gpus/*"))


def is_available() -> bool:
    """Return whether there is a GPU, and CuPy to drive it; its use may still fail.

    This does not load CuPy, and it loads the driver only if CuPy is installed.
    """
    if importlib.util.find_spec("cupy") is None or not may_have_gpu():
        return False
    from crfrefine.engines.cuda.cupy_device import NO_DEVICE, NO_DRIVER, ask_driver

    count, status = ask_driver()
    return count > 0 or status not in (0, NO_DRIVER, NO_DEVICE)


def unexpected_device(requested: str, device: str) -> str | None:
    """Return a phrase on the device that "auto" chose if a user may expect another one, else None.

    Without a GPU the CPU is expected. `get_backend` has already warned of a GPU that does not work.
    """
    if requested != "auto":
        return None
    if device != "cpu":
        return f"device {device} (auto)"
    if may_have_gpu() and importlib.util.find_spec("cupy") is None:
        return "device cpu (auto: CuPy, which drives the GPU, is not installed)"
    return None


@cache
def _cuda_backend(number: int) -> Backend:
    """Return the backend of a GPU, always the same object: its lock admits one case at a time."""
    from crfrefine.engines.cuda.cupy_device import CupyDevice
    from crfrefine.engines.cuda.kernels import CudaBackend

    return CudaBackend(CupyDevice(number))


# A device does not survive a fork: the child creates it again, or finds that it does not work.
os.register_at_fork(after_in_child=_cuda_backend.cache_clear)


def _load_torch(name: str) -> Backend:
    try:
        from crfrefine.engines.torch.engine import TorchBackend
    except ImportError as error:
        raise BackendUnavailableError(
            f"--device torch needs PyTorch ({error}): pip install 'crfrefine[train]'"
        ) from error
    _, _, device = name.partition(":")
    return TorchBackend(device or "cpu")


# Patterns of all devices but the CPU, and the functions that load their backends.
_TABLE: tuple[tuple[str, Callable[[str], Backend]], ...] = (
    (r"cuda(:[0-9]{1,9})?", lambda name: _cuda_backend(int(name.partition(":")[2] or 0))),
    (r"torch(:cuda(:[0-9]{1,9})?)?", _load_torch),
)
