"""Engines by device, and the errors for a GPU that is hidden, missing, not usable here, or lost
while it works.
"""

import contextlib
import ctypes
import importlib.util
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest

import crfrefine.engines
from crfrefine.engines import get_backend
from crfrefine.engines.cuda import cupy_device
from crfrefine.engines.cuda.mean_field import MeanFieldRun
from crfrefine.engines.cuda.one_stream import OneStream
from crfrefine.errors import BackendUnavailableError, CapacityError, ConfigError, DeviceLostError
from crfrefine.parameters.specs import MeanFieldSpec


class CudaError(RuntimeError):
    """Stands for CuPy's."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


class CompileError(Exception):
    """CuPy's."""


def show_gpu(monkeypatch, visible="0"):
    """Have the system show a GPU, which the environment may hide."""
    monkeypatch.setattr(crfrefine.engines, "_GPU_FILES", ("null",))  # Every machine has it.
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


def lack(missing, monkeypatch, tmp_path):
    """Have a machine with a GPU and a CuPy to import, but for what is missing."""
    show_gpu(monkeypatch, "" if missing == "GPU" else "0")
    monkeypatch.setitem(sys.modules, "cupy", None)
    if missing != "CuPy":
        (tmp_path / "cupy.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "cupy")


@pytest.fixture
def machine(monkeypatch):
    """A machine that shows one GPU."""
    crfrefine.engines._cuda_backend.cache_clear()
    show_gpu(monkeypatch)
    monkeypatch.setattr(cupy_device, "ask_driver", lambda: (1, 0))
    yield monkeypatch
    crfrefine.engines._cuda_backend.cache_clear()


def raising(error):
    def call(*_):
        raise error

    return call


def with_cupy(machine, error):
    """A CuPy that can be imported, whose first computation raises an error, if it is not None."""
    cuda = SimpleNamespace(
        compiler=SimpleNamespace(CompileException=CompileError),
        runtime=SimpleNamespace(
            CUDARuntimeError=CudaError, getDevice=lambda: 0, deviceSynchronize=lambda: None
        ),
        driver=SimpleNamespace(CUDADriverError=CudaError),
        get_current_stream=lambda: SimpleNamespace(ptr=0),
    )
    machine.setattr(importlib.util, "find_spec", lambda name: object())
    machine.setitem(
        sys.modules,
        "cupy",
        SimpleNamespace(arange=np.arange if error is None else raising(error), cuda=cuda),
    )


def check_refused(message, device="cuda:0", *, warns=True):
    """By name it is an error; `auto` takes the CPU with a warning."""
    with pytest.raises(
        BackendUnavailableError,
        match=rf"--device {device.removesuffix(':0')}:? {message}.*--device cpu",
    ):
        get_backend(device)
    with (
        pytest.warns(RuntimeWarning, match=rf"auto takes the CPU.*{message}")
        if warns
        else contextlib.nullcontext()
    ):
        assert get_backend("auto").name == "cpu"


OLD_DRIVER = (
    "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"
)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            CudaError(35, OLD_DRIVER),
            rf"CuPy cannot use the GPU \({OLD_DRIVER}\)"
            r".*crfrefine\[cuda12\] or crfrefine\[cuda13\]",
        ),
        (
            ImportError("libnvrtc.so.12"),
            r"CuPy cannot use the GPU \(libnvrtc\.so\.12\).*cupy-cuda12x\[ctk\]",
        ),
        (
            CompileError("nvrtc: invalid value for --gpu-architecture"),
            r"CuPy cannot use the GPU \(nvrtc: invalid value.*ctk",
        ),
        (
            MemoryError("Out of memory"),
            r"CuPy cannot use the GPU \(Out of memory.*memory is full.*nvidia-smi lists them",
        ),
    ],
    ids=[
        "a driver for an older CUDA",
        "no NVRTC",
        "an NVRTC for other GPUs",
        "no memory for a context or an array",
    ],
)
def test_a_gpu_that_cannot_compute_is_refused_and_auto_says_why(error, message, machine):
    with_cupy(machine, error)
    check_refused(message)


def test_a_gpu_without_cupy_is_refused_with_what_to_install(machine, tmp_path):
    """As where only the extra is missing, or CuPy is for another version of CUDA: one that cannot
    be imported stands for none.
    """
    (tmp_path / "cupy.py").write_text("raise ImportError('no such library')\n", encoding="utf-8")
    machine.syspath_prepend(tmp_path)
    machine.delitem(sys.modules, "cupy", raising=False)
    check_refused(r"needs CuPy.*no such library.*install crfrefine\[cuda12\]")


def test_forked_processes_and_default_streams_per_thread_are_refused(machine):
    """The parent of a forked process has used the driver.

    Copies in one thread rely on the order of launches in another.
    """
    with_cupy(machine, ValueError("opened"))
    machine.setattr(cupy_device, "ask_driver", lambda: (0, 3))
    check_refused(r".*forked.*'spawn'")
    machine.setattr(cupy_device, "ask_driver", lambda: (1, 0))
    machine.setenv("CUPY_CUDA_PER_THREAD_DEFAULT_STREAM", "1")
    check_refused(
        r"expected one default stream for all threads, found "
        r"CUPY_CUDA_PER_THREAD_DEFAULT_STREAM=1; unset it"
    )
    machine.setenv("CUPY_CUDA_PER_THREAD_DEFAULT_STREAM", "0")
    with pytest.raises(ValueError, match="opened"):
        get_backend("cuda")


@pytest.mark.parametrize(
    ("status", "message", "warns"),
    [
        (
            803,
            r"status 803 of cuInit, CUDA_VISIBLE_DEVICES=7\); see nvidia-smi"
            r".*restart the machine if it was updated",
            True,
        ),
        (100, r"status 100 of cuInit, CUDA_VISIBLE_DEVICES=7\)", False),
        (None, r"no driver.*install NVIDIA's driver", False),
    ],
)
def test_a_driver_that_shows_no_gpu_says_why(status, message, warns, monkeypatch, tmp_path):
    """One that does not start is no machine without a GPU: `auto` warns."""
    driver = SimpleNamespace(cuInit=lambda flags: status, cuDeviceGetCount=lambda count: 0)
    lack(None, monkeypatch, tmp_path)
    monkeypatch.setattr(
        ctypes, "CDLL", raising(OSError("no library")) if status is None else lambda name: driver
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    check_refused(
        rf"not among the 0 NVIDIA GPUs that were found \({message}", "cuda:1", warns=warns
    )


def test_devices_that_are_not_there_are_refused_with_those_that_are(machine):
    machine.setattr(cupy_device, "ask_driver", lambda: (2, 0))
    with pytest.raises(
        BackendUnavailableError,
        match=r"--device cuda:7: not among the 2 NVIDIA GPUs that were found.*use another GPU",
    ):
        get_backend("cuda:7")
    for device in ("gpu", "cuda:", "cuda:x", "CPU", "", None):
        with pytest.raises(ConfigError, match=r"device: expected one of auto, cpu, cuda"):
            crfrefine.refine(np.zeros((2, 3, 4)), np.zeros((3, 4)), device=device)


@pytest.mark.parametrize("missing", ["GPU", "CuPy"])
def test_auto_leaves_the_driver_alone_where_something_is_missing(missing, monkeypatch, tmp_path):
    """The driver once asked, no process that is forked later can use a GPU."""
    monkeypatch.setattr(cupy_device, "ask_driver", raising(AssertionError("the driver was asked")))
    lack(missing, monkeypatch, tmp_path)
    assert not crfrefine.engines.is_available()


@pytest.mark.parametrize(
    ("requested", "device", "missing", "words"),
    [
        ("auto", "cpu", "GPU", None),
        ("auto", "cpu", "CuPy", "device cpu (auto: CuPy, which drives the GPU, is not installed)"),
        ("auto", "cuda", None, "device cuda (auto)"),
        ("cuda:0", "cuda", None, None),
        ("cpu", "cpu", "CuPy", None),
    ],
)
def test_a_device_is_told_only_where_another_one_may_be_expected(
    requested, device, missing, words, monkeypatch, tmp_path
):
    lack(missing, monkeypatch, tmp_path)
    assert crfrefine.engines.unexpected_device(requested, device) == words


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, True), ("0,1", True), ("", False), (" ", False), ("-1", False)]
)
def test_gpus_that_the_environment_hides_are_not_there(visible, expected, monkeypatch):
    """As CUDA does: an empty list, or one that begins with a number below 0."""
    show_gpu(monkeypatch, visible)
    assert crfrefine.engines.may_have_gpu() is expected


def test_a_gpu_that_does_not_answer_is_lost_for_good(machine):
    """The first error says why, the others that it is so; later work does not touch the GPU.

    A lack of memory is no loss.
    """
    with_cupy(machine, None)
    device = get_backend("cuda").device
    stream = OneStream(device, "for an array of shape {shape}", "use a mask")
    array = np.zeros((9, 8))
    message = r"not enough memory on cuda for an array of shape \(9, 8\) \(error 2\); use a mask"
    with pytest.raises(CapacityError, match=message), stream.working(array):
        raise CudaError(2, "error 2")
    with pytest.raises(CudaError, match="error 1"), stream.working(array):  # The GPU answers.
        raise CudaError(1, "error 1")
    machine.setattr(
        sys.modules["cupy"].cuda.runtime, "deviceSynchronize", raising(CudaError(719, "error 719"))
    )
    message = r"--device cuda: the GPU stopped working in this case \(error 700\).*--device cpu"
    with pytest.raises(DeviceLostError, match=message), stream.working(array):
        raise CudaError(700, "error 700")
    with (
        pytest.raises(
            DeviceLostError,
            match=r"stopped working earlier in this process \(error 700\).*--device cpu",
        ),
        device.active(),
    ):
        raise AssertionError("nothing may run")


def test_an_option_of_the_mean_field_that_the_engine_does_not_know_is_refused():
    """Unless it has its default: nothing is left out without an error."""

    @dataclass(frozen=True, eq=False)
    class Longer(MeanFieldSpec):
        new: float = 1.0

    spec = Longer(np.ones((1, 2)), 1.0 - np.eye(2), 5, new=0.5)
    with pytest.raises(ConfigError, match=r"new: --device cuda has 1\.0 only; use --device cpu"):
        MeanFieldRun(None, [], spec, None)
    replace(spec, new=1.0).require_known(["weights", "compatibility", "num_iterations"], "cuda")
