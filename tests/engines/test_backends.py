"""Which engine runs a device: the table of backends."""

import importlib.util
import sys

import pytest

import crfrefine.engines
from crfrefine.engines import get_backend
from crfrefine.engines.cuda import cupy_device
from crfrefine.engines.cuda.cupy_device import num_driver_devices
from crfrefine.errors import BackendUnavailableError, ConfigError


@pytest.mark.parametrize("device", ["cuda", "cuda:99"])
def test_a_gpu_that_is_not_there_is_refused_and_never_replaced_silently(device):
    """The message says what to do instead."""
    if device == "cuda" and num_driver_devices() > 0:
        pytest.skip("there is a GPU")
    with pytest.raises(BackendUnavailableError, match=rf"--device {device}: .*NVIDIA GPU"):
        get_backend(device)


@pytest.fixture
def broken_cupy(tmp_path, monkeypatch):
    """A machine with a driver and a GPU, and a CuPy that cannot be imported."""
    (tmp_path / "cupy.py").write_text("raise ImportError('no such library')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(cupy_device, "may_have_gpu", lambda: True)
    monkeypatch.setattr(cupy_device, "num_driver_devices", lambda: 1)


@pytest.mark.usefixtures("broken_cupy")
def test_a_gpu_without_cupy_is_refused_with_what_to_install_and_auto_says_why():
    """As where only the extra is missing, or CuPy is for another version of CUDA: one that cannot be imported stands for none."""
    with pytest.raises(BackendUnavailableError, match=r"needs CuPy.*no such library.*install crfrefine\[cuda12\]"):
        cupy_device.CupyDevice()
    with pytest.warns(RuntimeWarning, match=r"auto takes the CPU.*no such library"):
        assert get_backend("auto").name == "cpu"


@pytest.mark.usefixtures("broken_cupy")
def test_auto_says_that_a_forked_process_has_no_gpu(monkeypatch):
    """Its parent has used the driver: the CPU computes, and not without a word."""

    def used_before():
        raise cupy_device.ForkedError

    monkeypatch.setattr(cupy_device, "num_driver_devices", used_before)
    with pytest.warns(RuntimeWarning, match=r"auto takes the CPU.*forked.*'spawn'"):
        assert get_backend("auto").name == "cpu"
    with pytest.raises(BackendUnavailableError, match=r"forked.*--device cpu"):
        get_backend("cuda")


@pytest.mark.parametrize("missing", ["GPU", "CuPy"])
def test_auto_leaves_the_driver_alone_where_something_is_missing(missing, monkeypatch):
    """The driver once asked, no process that is forked later can use a GPU."""

    def asked():
        raise AssertionError("the driver was asked")

    monkeypatch.setattr(cupy_device, "num_driver_devices", asked)
    monkeypatch.setattr(cupy_device, "may_have_gpu", lambda: missing != "GPU")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if missing == "CuPy" else object())
    assert not cupy_device.is_available()


@pytest.mark.parametrize(("visible", "expected"), [(None, True), ("0,1", True), ("", False), (" ", False), ("-1", False)])
def test_gpus_that_the_environment_hides_are_not_there(visible, expected, monkeypatch):
    """As CUDA does: an empty list, or one that begins with a number below 0."""
    monkeypatch.setattr(cupy_device, "_GPU_FILES", ("null",))  # there is such a file on every machine
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cupy_device.may_have_gpu() is expected


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU", ""])
def test_an_unknown_device_is_refused_with_the_known_ones(device):
    """A device is not guessed."""
    with pytest.raises(ConfigError, match=r"device: expected one of auto, cpu, cuda"):
        get_backend(device)


def test_a_gpu_is_one_backend_under_all_its_names(monkeypatch):
    """Two would have two locks, and let two cases into the memory of one GPU."""

    class Device:
        def __init__(self, index):
            self.name = f"fake {index}"

    monkeypatch.setattr(cupy_device, "CupyDevice", Device)
    crfrefine.engines._cuda_backend.cache_clear()
    try:
        first = get_backend("cuda")
        assert get_backend("cuda:0") is first
        assert get_backend("cuda:00") is first
        assert get_backend("cuda:1") is not first
        assert get_backend("cuda:1").name == "fake 1"
    finally:
        crfrefine.engines._cuda_backend.cache_clear()
