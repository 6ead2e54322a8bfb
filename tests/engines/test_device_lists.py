"""Requests for several GPUs, on pretended machines; and what CUDA's errors mean for a case."""

import re

import pytest

from crfrefine.engines import devices_of, get_backend
from crfrefine.engines.cuda import cupy_device
from crfrefine.engines.cuda.loss import LossWatch
from crfrefine.errors import BackendUnavailableError, CapacityError, ConfigError, DeviceLostError


class CudaError(RuntimeError):
    """Stands for CuPy's."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


EXPECTED = "expected numbers of GPUs separated by commas, such as cuda:0,1, or cuda:all; found"


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cuda:2,0", ("cuda:2", "cuda:0")),
        ("cuda:all", ("cuda:0", "cuda:1", "cuda:2")),
        *((one, (one,)) for one in ("auto", "cuda:7", "nonsense")),
    ],
)
def test_a_list_names_its_gpus_in_its_order(device, expected, monkeypatch):
    """Anything else is left to `get_backend`."""
    monkeypatch.setattr(cupy_device, "num_driver_devices", lambda: 3)
    assert devices_of(device) == expected


@pytest.mark.parametrize(
    ("device", "gpus", "kind", "message"),
    [
        ("cuda:0,0", 2, ConfigError, "--device cuda:0,0: expected each GPU once, found 0 twice; name it once"),
        ("cuda:0,x", 2, ConfigError, f"--device cuda:0,x: {EXPECTED} 'x' in place of a number"),
        ("cuda:0,\u0663", 9, ConfigError, f"{EXPECTED} '\u0663' in place of a number"),
        (
            "cuda:0,7",
            2,
            BackendUnavailableError,
            "expected GPUs from 0 to 1, found 7: this machine has 2 NVIDIA GPUs, numbers 0 to 1; use one of these, cuda:all",
        ),
        ("cuda:0,1", 1, BackendUnavailableError, "expected GPU 0, found 1: this machine has one NVIDIA GPU, number 0; use one of these"),
        ("cuda:all", 0, BackendUnavailableError, "--device cuda:all: no NVIDIA GPU was found; install NVIDIA's driver for it"),
    ],
)
def test_bad_lists_say_what_was_expected(device, gpus, kind, message, monkeypatch):
    monkeypatch.setattr(cupy_device, "num_driver_devices", lambda: gpus)
    with pytest.raises(kind, match=re.escape(message)):
        devices_of(device)


def test_one_engine_is_on_one_device(monkeypatch):
    """`refine`, and all commands but `infer`."""
    with pytest.raises(ConfigError, match=r"--device cuda:all: expected one device, found several; use auto, cpu, cuda or cuda:N"):
        get_backend("cuda:all")
    monkeypatch.setattr(cupy_device, "num_driver_devices", lambda: 2)
    with pytest.raises(BackendUnavailableError, match=r"--device cuda:7: expected GPUs from 0 to 1, found 7: this machine has 2"):
        cupy_device.CupyDevice(7)


def watch(*, answers):
    def ask():
        if not answers:
            raise CudaError(719, "error 719")

    return LossWatch("cuda:1", (CudaError,), ask)


def test_a_gpu_that_does_not_answer_is_lost_for_good():
    """The first error says why, the others that it is so; later work does not touch the GPU."""
    watched = watch(answers=False)
    message = r"--device cuda:1: the GPU stopped working in this case \(error 700\).*--device cpu"
    with pytest.raises(DeviceLostError, match=message), watched.watching():
        raise CudaError(700, "error 700")
    with pytest.raises(DeviceLostError, match=r"stopped working earlier in this process \(error 700\).*--device cpu"), watched.watching():
        raise AssertionError("nothing may run")


def test_a_gpu_that_answers_is_not_lost():
    """What it refused is a fault of the caller; what else is raised is no concern of CUDA."""
    watched = watch(answers=True)
    for error in (CudaError(1, "error 1"), RuntimeError("of a callback"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, watched.watching():
            raise error
        assert caught.value is error
    with watched.watching():
        pass


def test_a_driver_without_memory_is_too_large_a_case():
    """Not a lost GPU: the next case may be smaller."""
    watched, message = watch(answers=False), r"not enough memory on the GPU cuda:1 \(error 2\); use a mask.*--device cpu"
    with pytest.raises(CapacityError, match=message), watched.watching():
        raise CudaError(2, "error 2")
    with watched.watching():
        pass
