"""Requests for several GPUs, such as "cuda:0,1" and "cuda:all". No engine is loaded here."""

from __future__ import annotations

import re

from crfrefine.base.text import MOST_OF_A_REASON, shorten
from crfrefine.errors import ConfigError

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
