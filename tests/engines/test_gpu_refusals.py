"""Machines whose GPU cannot be used: without a driver, with one that does not start, with a CuPy for another CUDA, without memory."""

import contextlib
import ctypes
import importlib.util
import sys
from types import SimpleNamespace

import pytest

from crfrefine.engines import get_backend
from crfrefine.engines.cuda import cupy_device
from crfrefine.errors import BackendUnavailableError


class CudaError(RuntimeError):
    """Stands for CuPy's."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


class CompileError(Exception):
    """CuPy's."""


def with_cupy(machine, error):
    """A driver with one GPU, and a CuPy that can be imported, whose first computation raises an error."""

    def arange(count):
        raise error

    cuda = SimpleNamespace(
        compiler=SimpleNamespace(CompileException=CompileError),
        runtime=SimpleNamespace(CUDARuntimeError=CudaError, getDevice=lambda: 0, deviceSynchronize=lambda: None),
        driver=SimpleNamespace(CUDADriverError=CudaError),
    )
    machine.setattr(cupy_device, "num_driver_devices", lambda: 1)
    machine.setattr(importlib.util, "find_spec", lambda name: object())
    machine.setitem(sys.modules, "cupy", SimpleNamespace(arange=arange, cuda=cuda))


@pytest.fixture
def machine(monkeypatch):
    """A machine that shows one GPU."""
    cupy_device_cache = get_backend.__globals__["_cuda_backend"]
    cupy_device_cache.cache_clear()
    monkeypatch.setattr(cupy_device, "may_have_gpu", lambda: True)
    return monkeypatch


OTHER_CUDA = "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (CudaError(35, OTHER_CUDA), rf"CuPy cannot use the GPU \({OTHER_CUDA}\).*crfrefine\[cuda12\] or crfrefine\[cuda13\]"),
        (ImportError("libnvrtc.so.12"), r"CuPy cannot use the GPU \(libnvrtc\.so\.12\).*cupy-cuda12x\[ctk\]"),
        (CompileError("nvrtc: invalid value for --gpu-architecture"), r"CuPy cannot use the GPU \(nvrtc: invalid value.*ctk"),
        (CudaError(2, "cudaErrorMemory"), r"the GPU has no memory left to begin with \(cudaErrorMemory.*nvidia-smi lists them"),
        (MemoryError("Out of memory"), r"the GPU has no memory left to begin with \(Out of memory.*nvidia-smi lists them"),
    ],
    ids=["a driver for an older CUDA", "no NVRTC", "an NVRTC for other GPUs", "no memory for a context", "no memory for an array"],
)
def test_a_gpu_that_cannot_compute_is_refused_and_auto_says_why(error, message, machine):
    """By name it is an error; `auto` takes the CPU with a warning."""
    with_cupy(machine, error)
    with pytest.raises(BackendUnavailableError, match=rf"--device cuda: {message}.*--device cpu"):
        get_backend("cuda:0")
    with pytest.warns(RuntimeWarning, match=rf"--device auto takes the CPU, as the GPU cannot be used \(--device cuda: {message}"):
        assert get_backend("auto").name == "cpu"


def test_a_default_stream_per_thread_is_refused_and_auto_says_why(machine):
    """Copies in one thread rely on the order of launches in another: on one default stream for all."""
    with_cupy(machine, ValueError("opened"))
    message = r"expected one default stream for all threads, found CUPY_CUDA_PER_THREAD_DEFAULT_STREAM='1': .*unset it.*--device cpu"
    machine.setenv("CUPY_CUDA_PER_THREAD_DEFAULT_STREAM", "1")
    with pytest.raises(BackendUnavailableError, match=f"--device cuda: {message}"):
        get_backend("cuda")
    with pytest.warns(RuntimeWarning, match=f"--device auto takes the CPU.*{message}"):
        assert get_backend("auto").name == "cpu"
    machine.setenv("CUPY_CUDA_PER_THREAD_DEFAULT_STREAM", "0")
    with pytest.raises(ValueError, match="opened"):
        get_backend("cuda")


def driver(status):
    def load(name):
        if status is None:
            raise OSError(name)
        return SimpleNamespace(cuInit=lambda flags: status, cuDeviceGetCount=lambda count: 0)

    return load


@pytest.mark.parametrize(
    ("status", "message", "warns"),
    [
        (
            803,
            r"its driver does not start \(error 803 of cuInit\): restart the machine if the driver was updated, and see nvidia-smi",
            True,
        ),
        (100, r"its driver shows none, with CUDA_VISIBLE_DEVICES='7'", False),
        (0, r"install NVIDIA's driver", False),
        (None, r"install NVIDIA's driver", False),  # no driver
    ],
)
def test_a_driver_that_shows_no_gpu_says_why(status, message, warns, machine):
    """One that does not start is no machine without a GPU: `auto` warns."""
    machine.setattr(ctypes, "CDLL", driver(status))
    machine.setenv("CUDA_VISIBLE_DEVICES", "7")
    machine.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(BackendUnavailableError, match=rf"--device cuda:1: no NVIDIA GPU was found; {message}.*or use --device cpu"):
        get_backend("cuda:1")
    with pytest.warns(RuntimeWarning, match=message) if warns else contextlib.nullcontext():
        assert get_backend("auto").name == "cpu"
