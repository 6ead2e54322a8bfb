"""The real device: CuPy allocates, sorts, and compiles the kernels with NVRTC for the GPU at hand."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.backends.cuda.sources import kernel_source, pack_arguments
from crfrefine.errors import BackendUnavailableError

BLOCK = 256
"""Threads of a block; no kernel depends on it."""

_INSTALL = "install crfrefine[cuda12] or crfrefine[cuda13], whichever the driver supports (nvidia-smi shows its CUDA version)"


def num_driver_devices() -> int:
    """Return how many GPUs the driver shows; 0 without a driver. Loads the driver's library alone, nothing else."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def is_available() -> bool:
    """Whether there is a GPU and CuPy to drive it; CuPy itself is not loaded for the answer."""
    return num_driver_devices() > 0 and importlib.util.find_spec("cupy") is not None


class CupyDevice:
    """A CUDA device; see `Device`. Everything goes to CuPy's current stream."""

    def __init__(self, index: int | None = None) -> None:
        """Take a GPU.

        Args:
            index: its number; None: the first one.

        Raises:
            BackendUnavailableError: no driver, no GPU, no such GPU, or no CuPy that fits; says what to install.
        """
        self.name = "cuda" if index is None else f"cuda:{index}"
        count = num_driver_devices()
        if count == 0:
            raise BackendUnavailableError(
                f"--device {self.name}: no NVIDIA GPU was found; install NVIDIA's driver for it, or use --device cpu"
            )
        if index is not None and index >= count:
            raise BackendUnavailableError(f"--device {self.name}: this machine has {count} NVIDIA GPU(s), numbered from 0")
        try:
            self.xp: Any = importlib.import_module("cupy")
        except ImportError as error:
            raise BackendUnavailableError(f"--device {self.name} needs CuPy, which cannot be imported ({error}); {_INSTALL}") from error
        self._number = index or 0
        try:
            with self.active():
                self.xp.zeros(1).sum()
        except self.xp.cuda.runtime.CUDARuntimeError as error:
            raise BackendUnavailableError(f"--device {self.name}: CuPy cannot use the GPU ({error}); {_INSTALL}") from error
        # By the sources' identity: there is one object a text, and it is kept.
        self._functions: dict[tuple[int, str], Any] = {}
        self._modules: dict[int, Any] = {}

    def launch(self, source: str, kernel: str, constants: Mapping[str, int], num_threads: int, *arguments: Any) -> None:
        """Run a kernel; see `Device.launch`."""
        if num_threads == 0:
            return
        text = kernel_source(source, constants)
        function = self._functions.get((id(text), kernel))
        if function is None:
            module = self._modules.get(id(text))
            if module is None:
                module = self._modules[id(text)] = self.xp.RawModule(code=text.text, options=text.options, backend="nvrtc")
            function = self._functions[id(text), kernel] = module.get_function(kernel)
        function((-(-num_threads // BLOCK),), (BLOCK,), tuple(pack_arguments(text, kernel, constants, arguments)))

    def upload(self, array: Any) -> Any:
        """Return it on the device; see `Device.upload`."""
        foreign = not isinstance(array, (np.ndarray, self.xp.ndarray))
        return self.xp.ascontiguousarray(self.xp.from_dlpack(array) if foreign else self.xp.asarray(array))

    def download(self, array: Any) -> NDArray[Any]:
        """Return a copy on the host; see `Device.download`."""
        host: NDArray[Any] = self.xp.asnumpy(array)
        return host

    def synchronize(self) -> None:
        """Wait; see `Device.synchronize`."""
        self.xp.cuda.get_current_stream().synchronize()

    def active(self) -> AbstractContextManager[Any]:
        """Make the GPU the current one; see `Device.active`."""
        context: AbstractContextManager[Any] = self.xp.cuda.Device(self._number)
        return context

    def capture(self, launches: Callable[[], None]) -> Callable[[], None]:
        """Record a CUDA graph; see `Device.capture`."""
        stream = self.xp.cuda.Stream(non_blocking=True)
        with stream:
            stream.begin_capture()
            launches()
            graph = stream.end_capture()
        repeat: Callable[[], None] = graph.launch
        return repeat

    def free_bytes(self) -> int | None:
        """Memory that can still be allocated, what the pool holds unused included; see `Device.free_bytes`."""
        free, _ = self.xp.cuda.runtime.memGetInfo()
        return int(free) + int(self.xp.get_default_memory_pool().free_bytes())
