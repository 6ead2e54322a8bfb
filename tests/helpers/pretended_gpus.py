"""A machine with GPUs for a run: the shim in place of CuPy, with what may happen to a GPU in a run.

PRETENDED_GPUS in the environment says how many there are; PRETENDED_STATE is a folder in which faults are noted. PRETENDED_FAULTS
has words such as `cuda:1=error`:

| fault | what happens in the first case of the device |
| --- | --- |
| `gone` | a CUDA error, and from then on in this process |
| `full` | the driver has no memory left, once |
| `small` | not in a case: it never has more than 32 kB free |
"""

import os
from pathlib import Path

import cuda_shim

from crfrefine.engines.cuda import cupy_device
from crfrefine.engines.cuda.loss import LossWatch
from crfrefine.errors import BackendUnavailableError

SITE = Path(__file__).with_name("pretended_site")


class CudaError(RuntimeError):
    """Stands for CuPy's."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


class PretendedGpu(cuda_shim.ShimDevice):
    """A GPU by its number, as `CupyDevice` opens it."""

    def __init__(self, index=0):
        if index >= num_gpus():
            raise BackendUnavailableError(f"--device cuda:{index}: no such NVIDIA GPU")
        faults = dict(word.split("=") for word in os.environ.get("PRETENDED_FAULTS", "").split())
        super().__init__(free_bytes=32_000 if faults.get(f"cuda:{index}") == "small" else None)
        self.name = f"cuda:{index}" if index else "cuda"
        self._fault = faults.get(f"cuda:{index}", "")
        self._is_broken = False
        self._loss = LossWatch(self.name, (CudaError,), self._ask)

    def active(self):
        return self._loss.watching()

    def download(self, array):
        self._ask()
        if self._fault not in ("", "small") and not self._has_happened():
            self._happen()
        return super().download(array)

    def _happen(self):
        (self._state() / f"{self.name}.fault").touch()
        if self._fault == "full":
            raise CudaError(2, "cudaErrorMemoryAllocation: out of memory")
        self._is_broken = True
        self._ask()

    def _ask(self):
        if self._is_broken:
            raise CudaError(719, "cudaErrorLaunchFailure: unspecified launch failure")

    def _has_happened(self):
        return (self._state() / f"{self.name}.fault").exists()

    @staticmethod
    def _state():
        return Path(os.environ["PRETENDED_STATE"])


def num_gpus():
    return int(os.environ["PRETENDED_GPUS"])


def replacements():
    """What of `cupy_device` finds the GPUs."""
    has_any = lambda: num_gpus() > 0  # noqa: E731
    return {"num_driver_devices": num_gpus, "may_have_gpu": has_any, "is_available": has_any, "CupyDevice": PretendedGpu}


def install():
    """Have this process find the GPUs."""
    vars(cupy_device).update(replacements())


def environment(state, number, faults=""):
    """The environment of a process that finds so many GPUs; `state` is an empty folder."""
    state.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, (str(SITE), os.environ.get("PYTHONPATH", ""))))
    return {**os.environ, "PYTHONPATH": path, "PRETENDED_GPUS": str(number), "PRETENDED_STATE": str(state), "PRETENDED_FAULTS": faults}
