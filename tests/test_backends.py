"""Which engine runs a device: the table of backends."""

from __future__ import annotations

import pytest

from crfrefine.backends import get_backend
from crfrefine.errors import BackendUnavailableError, ConfigError


def test_the_reference_is_always_there() -> None:
    """It needs nothing but numpy."""
    assert get_backend("reference").name == "reference"


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_is_refused_and_never_replaced_silently(device: str) -> None:
    """The message says what to do instead."""
    with pytest.raises(BackendUnavailableError, match=r"no GPU engine.*--device cpu"):
        get_backend(device)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU", ""])
def test_an_unknown_device_is_refused_with_the_known_ones(device: str) -> None:
    """A device is not guessed."""
    with pytest.raises(ConfigError, match=r"device: expected one of auto, cpu, cuda"):
        get_backend(device)
