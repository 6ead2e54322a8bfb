"""The table of backends: which engine runs a device."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from crfrefine.errors import BackendUnavailableError, ConfigError

if TYPE_CHECKING:
    from crfrefine.backends.base import Backend

DEVICES = ("auto", "cpu", "cuda", "cuda:N", "reference")


def get_backend(device: str) -> Backend:
    """Return the engine for a device; nothing is loaded before it is asked for.

    Args:
        device: "auto" (takes the CPU engine), "cpu", "cuda", "cuda:N", or "reference" for the slow float64 model.

    Raises:
        BackendUnavailableError: the device has no engine in this build.
        ConfigError: there is no such device.
    """
    for pattern, load in _TABLE:
        if re.fullmatch(pattern, device):
            return load()
    raise ConfigError(f"device: expected one of {', '.join(DEVICES)}; got '{device}'")


def _cpu() -> Backend:
    from crfrefine.backends.cpu import CpuBackend

    return CpuBackend()


def _cuda() -> Backend:
    raise BackendUnavailableError("this build of crfrefine has no GPU engine yet; use --device cpu")


def _reference() -> Backend:
    from crfrefine.backends.reference import ReferenceBackend

    return ReferenceBackend()


_TABLE: tuple[tuple[str, Callable[[], Backend]], ...] = (
    (r"auto|cpu", _cpu),
    (r"cuda(:\d+)?", _cuda),
    (r"reference", _reference),
)
