"""Which engine runs a device: the table of backends."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from crfrefine.backends import get_backend
from crfrefine.backends.cuda import cupy_device
from crfrefine.backends.cuda.cupy_device import num_driver_devices
from crfrefine.errors import BackendUnavailableError, ConfigError


def test_the_reference_is_always_there() -> None:
    """It needs nothing but numpy."""
    assert get_backend("reference").name == "reference"


@pytest.mark.parametrize("device", ["cuda", "cuda:99"])
def test_a_gpu_that_is_not_there_is_refused_and_never_replaced_silently(device: str) -> None:
    """The message says what to do instead."""
    if device == "cuda" and num_driver_devices() > 0:
        pytest.skip("there is a GPU")
    with pytest.raises(BackendUnavailableError, match=rf"--device {device}: .*NVIDIA GPU"):
        get_backend(device)


def test_a_gpu_without_cupy_is_refused_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a driver, where only the extra is missing: a CuPy that cannot be imported stands for none."""
    (tmp_path / "cupy.py").write_text("raise ImportError('no such library')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(cupy_device, "num_driver_devices", lambda: 1)
    with pytest.raises(BackendUnavailableError, match=r"needs CuPy.*no such library.*install crfrefine\[cuda12\]"):
        cupy_device.CupyDevice()


def test_auto_takes_the_cpu_without_a_gpu() -> None:
    """And says so by its name."""
    if cupy_device.is_available():
        pytest.skip("there is a GPU, and CuPy to drive it")
    assert get_backend("auto").name == "cpu"


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU", ""])
def test_an_unknown_device_is_refused_with_the_known_ones(device: str) -> None:
    """A device is not guessed."""
    with pytest.raises(ConfigError, match=r"device: expected one of auto, cpu, cuda"):
        get_backend(device)
