"""The table of backends: which engine runs on which device. And requests for several devices."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

from crfrefine.base.text import MOST_OF_A_REASON, shorten, shorten_value
from crfrefine.errors import BackendUnavailableError, ConfigError

if TYPE_CHECKING:
    from crfrefine.engines.base import Backend

DEVICES = ("auto", "cpu", "cuda", "cuda:N", "reference")


def get_backend(device: str, *, also: Sequence[str] = ()) -> Backend:
    """Return the engine for a device; an engine is loaded when first asked for.

    Args:
        device: "auto" (the GPU if there is one and CuPy is installed, else the CPU; warns if both are there but do not work),
            "cpu", "cuda" (the first GPU, the same backend as "cuda:0"), "cuda:N", or "reference" for the slow float64 model.
        also: what the caller takes besides, for the error of a device that does not exist.

    Raises:
        BackendUnavailableError: the device has no engine in this build.
        ConfigError: the device does not exist, or several are named.
    """
    for pattern, load in _TABLE:
        if re.fullmatch(pattern, device):
            return load(device)
    if is_list(device):
        raise ConfigError(
            f"--device {shorten(device, MOST_OF_A_REASON)}: expected one device, found several; "
            "use auto, cpu, cuda or cuda:N (`crfrefine infer` alone shares out cases among several GPUs)"
        )
    raise ConfigError(f"device: expected one of {', '.join((*DEVICES, *also))}; got {shorten_value(device)}")


def _auto(_: str) -> Backend:
    from crfrefine.engines.cuda.cupy_device import is_available

    if is_available():
        try:
            return _cuda("cuda")
        except BackendUnavailableError as error:
            warnings.warn(f"--device auto takes the CPU, as the GPU cannot be used ({error})", RuntimeWarning, stacklevel=3)
    return _cpu("cpu")


def _cpu(_: str) -> Backend:
    from crfrefine.engines.cpu import CpuBackend

    return CpuBackend()


def _cuda(device: str) -> Backend:
    _, _, number = device.partition(":")
    return _cuda_backend(int(number or 0))


@cache
def _cuda_backend(number: int) -> Backend:
    """One backend per GPU, whatever name it is asked for by: its lock admits one case at a time."""
    from crfrefine.engines.cuda.backend import CudaBackend
    from crfrefine.engines.cuda.cupy_device import CupyDevice

    return CudaBackend(CupyDevice(number))


# A device does not survive a fork: the child creates it again, or finds that it does not work.
os.register_at_fork(after_in_child=_cuda_backend.cache_clear)


def _reference(_: str) -> Backend:
    from crfrefine.engines.reference.engine import ReferenceBackend

    return ReferenceBackend()


_TABLE: tuple[tuple[str, Callable[[str], Backend]], ...] = (
    (r"auto", _auto),
    (r"cpu", _cpu),
    (r"cuda(:[0-9]{1,9})?", _cuda),
    (r"reference", _reference),
)


# Requests for several GPUs, such as "cuda:0,1" and "cuda:all". No engine is loaded for them.

ALL = "cuda:all"
FORMS = ("cuda:N,M", ALL)
"""How lists look, for messages."""
EXAMPLES = "numbers of GPUs separated by commas, such as cuda:0,1, or cuda:all"


def is_list(requested: str) -> bool:
    """Whether a request names several GPUs, or tries to."""
    return requested == ALL or (requested.startswith("cuda:") and "," in requested)


def devices_of(requested: str) -> tuple[str, ...]:
    """Return the devices of a request: the GPUs of a list in its order, or the request itself.

    Args:
        requested: "cuda:N,M…", "cuda:all" for all GPUs that the driver shows, or as `get_backend` takes it.

    Raises:
        ConfigError: a list that is not one of different numbers.
        BackendUnavailableError: a GPU of a list does not exist, or there is none.
    """
    if not is_list(requested):
        return (requested,)
    from crfrefine.engines.cuda import cupy_device

    named = () if requested == ALL else _numbers(requested)
    count = cupy_device.num_driver_devices()
    if count == 0:
        raise cupy_device.no_gpu(requested)
    numbers = named or tuple(range(count))
    for number in numbers:
        if number >= count:
            raise cupy_device.missing_gpu(requested, number, count)
    return tuple(f"cuda:{number}" for number in numbers)


def _numbers(requested: str) -> tuple[int, ...]:
    told = shorten(requested, MOST_OF_A_REASON)
    numbers: list[int] = []
    for text in requested.partition(":")[2].split(","):
        if re.fullmatch(r"[0-9]{1,9}", text) is None:
            raise ConfigError(f"--device {told}: expected {EXAMPLES}; found '{shorten(text, MOST_OF_A_REASON)}' in place of a number")
        if int(text) in numbers:
            raise ConfigError(f"--device {told}: expected each GPU once, found {int(text)} twice; name it once")
        numbers.append(int(text))
    return tuple(numbers)
