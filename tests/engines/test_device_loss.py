"""A GPU that a machine does not have, and what CUDA's errors mean for a case."""

import pytest

from crfrefine.engines.cuda import cupy_device
from crfrefine.engines.cuda.loss import LossWatch
from crfrefine.errors import BackendUnavailableError, CapacityError, DeviceLostError


class CudaError(RuntimeError):
    """Stands for CuPy's."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


def test_a_gpu_that_is_not_there_is_named_with_those_that_are(monkeypatch):
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
