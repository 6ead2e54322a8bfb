"""The GPU: CuPy allocates, sorts, and compiles the kernels with NVRTC for the present device."""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from crfrefine.base.array_types import Array
from crfrefine.base.text import MAX_OF_A_REASON, shorten
from crfrefine.engines.cuda.current_gpu import OUT_OF_MEMORY, GpuMemoryError, on_gpu
from crfrefine.engines.cuda.launches import Launch, Launcher
from crfrefine.engines.cuda.sources import KernelSource
from crfrefine.errors import BackendUnavailableError, DeviceLostError


@dataclass(frozen=True)
class _Borrowed:
    """A stream of PyTorch in the form in which CuPy takes external streams."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


@contextmanager
def following(cupy: Any, array: Any, owner: int | None) -> Iterator[None]:
    """Work on PyTorch's current stream and in its memory, if an array is a tensor on a GPU.

    Arrays allocated inside may outlive the context: each goes back to PyTorch, to the stream that
    it was allocated for. This is the `owner`; None means the current stream.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(array, torch.Tensor) or array.device.type != "cuda":
        yield
        return
    device = int(array.device.index)
    pointer = torch.cuda.current_stream(device).cuda_stream
    stream = cupy.cuda.Stream.null
    if pointer:
        stream = cupy.cuda.Stream.from_external(_Borrowed(pointer))
    # PyTorch cannot use the memory that CuPy still holds from work without PyTorch.
    cupy.get_default_memory_pool().free_all_blocks()

    def allocate(size: int, device: int) -> int:
        try:
            stream = pointer if owner is None else owner
            return int(torch.cuda.caching_allocator_alloc(size, device, stream))
        except torch.cuda.OutOfMemoryError as error:
            raise GpuMemoryError(str(error)) from error

    def free(address: int, _: int) -> None:
        # At exit PyTorch may be unloaded already, and the memory ends with the process.
        if not sys.is_finalizing():
            torch.cuda.caching_allocator_delete(address)

    memory = cupy.cuda.using_allocator(cupy.cuda.PythonFunctionAllocator(allocate, free).malloc)
    # PyTorch shares no tensor of another device, and allocates on the current device.
    with torch.cuda.device(device), stream, memory:
        yield


BLOCK = 256  # threads; no kernel depends on it
# Uploads of at least so many bytes bypass CuPy's staging memory, which is rounded up, page-locked
# and kept for good.
_LARGE = 1 << 20
_INSTALL = (
    "install crfrefine[cuda12] or crfrefine[cuda13], whichever the driver supports "
    "(nvidia-smi shows its CUDA version), or use --device cpu"
)
_TOOLKIT = (
    "where no CUDA toolkit is installed: pip install 'cupy-cuda12x[ctk]' or 'cupy-cuda13x[ctk]'"
)
_STREAM_PER_THREAD = "CUPY_CUDA_PER_THREAD_DEFAULT_STREAM"  # CuPy reads it when it is imported
NO_DRIVER = -1
_FORKED = (
    "--device {}: the GPU cannot be used in a process that was forked from one that had used it; "
    "start processes by 'spawn' (multiprocessing.set_start_method), or use --device cpu in them"
)
# Statuses of CUDA; a forked process gets the first one if its parent has used the driver.
_NOT_INITIALIZED = 3
NO_DEVICE = 100


def ask_driver() -> tuple[int, int]:
    """Return how many GPUs the driver shows, and its status: 0 if it works, -1 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0, NO_DRIVER
    count = ctypes.c_int(0)
    status = driver.cuInit(0)
    if status == 0:
        status = driver.cuDeviceGetCount(ctypes.byref(count))
    return count.value, status


class CupyDevice(Launcher):
    """A CUDA device, on which kernels run in the order of their launches.

    They run on CuPy's current stream. Its `name` is "cuda" for the first GPU, else "cuda:N"; `xp`
    is the array module, CuPy.
    """

    def __init__(self, index: int = 0) -> None:
        """Open the GPU of that number.

        Raises BackendUnavailableError, which says what to do, if that is not possible.
        """
        super().__init__()
        self.name = f"cuda:{index}" if index else "cuda"
        self._number = index
        self._process = os.getpid()
        self._loss: str | None = None  # why the GPU stopped working in this process
        # Of each kernel and its constants: the source, the function, and whether it has blocks.
        self._compiled: dict[Hashable, tuple[KernelSource, Any, bool]] = {}
        self._require_usable()
        try:
            self.xp = importlib.import_module("cupy")
        except (ImportError, OSError) as error:
            # An OSError comes if CuPy cannot create its folder for compiled kernels.
            raise BackendUnavailableError(
                f"--device {self.name} needs CuPy, which cannot be imported ({error}); {_INSTALL}"
            ) from error
        cuda = self.xp.cuda
        self._errors = cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError
        try:
            with on_gpu(cuda.runtime, index):
                # Compiled with NVRTC, so a missing part of the CUDA toolkit is found now.
                int((self.xp.arange(3) + 1).sum())
        except (
            cuda.compiler.CompileException,
            RuntimeError,
            ImportError,
            OSError,
            MemoryError,
        ) as error:
            raise BackendUnavailableError(
                f"--device {self.name}: CuPy cannot use the GPU ({error}); where its memory is "
                "full, end the programs that use it (nvidia-smi lists them); "
                f"{_TOOLKIT}; {_INSTALL}"
            ) from error

    def _require_usable(self) -> None:
        """Raise BackendUnavailableError if driver or environment do not let the GPU be used."""
        count, status = ask_driver()
        if status == _NOT_INITIALIZED:
            raise BackendUnavailableError(_FORKED.format(self.name))
        if self._number >= count:
            driver = "no driver" if status == NO_DRIVER else f"status {status} of cuInit"
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            raise BackendUnavailableError(
                f"--device {self.name}: not among the {count} NVIDIA GPUs that were found "
                f"({driver}, CUDA_VISIBLE_DEVICES={visible}); see nvidia-smi, install NVIDIA's "
                "driver, restart the machine if it was updated, or use another GPU or "
                "--device cpu"
            )
        streams = os.environ.get(_STREAM_PER_THREAD, "")
        if streams.strip() not in ("", "0"):
            raise BackendUnavailableError(
                f"--device {self.name}: expected one default stream for all threads, found "
                f"{_STREAM_PER_THREAD}={streams}; unset it before CuPy is imported, or use "
                "--device cpu"
            )

    def properties(self) -> dict[str, Any]:
        """Return what `crfrefine info` shows of the GPU and its software.

        The memory is in bytes; `driver` and `runtime` are the versions of CUDA that they have.
        """
        runtime = self.xp.cuda.runtime
        found = runtime.getDeviceProperties(self._number)
        return {
            "name": found["name"].decode(errors="replace"),
            "memory": found["totalGlobalMem"],
            "compute_capability": f"{found['major']}.{found['minor']}",
            "driver": runtime.driverGetVersion(),
            "runtime": runtime.runtimeGetVersion(),
            "cupy": self.xp.__version__,
        }

    def pack(
        self,
        source: str,
        kernel: str,
        constants: Mapping[str, int],
        num_items: int,
        arguments: Mapping[str, Any],
    ) -> Launch:
        """Check and pack the arguments of a launch; see `Launcher.launch`."""
        key = (source, kernel, *constants.items())
        compiled = self._compiled.get(key)
        if compiled is None:
            text = KernelSource(source, constants)
            # CuPy caches compiled kernels on disk by their text.
            module = self.xp.RawModule(code=text.text, options=text.options, backend="nvrtc")
            compiled = (text, module.get_function(kernel), text.has_blocks(kernel))
            self._compiled[key] = compiled
        text, function, has_blocks = compiled
        packed = text.pack(kernel, arguments)
        if has_blocks:
            block = constants["CRF_THREADS"]
            grid = num_items
        else:
            block = BLOCK
            grid = -(-num_items // BLOCK)
        return partial(function, (grid,), (block,), tuple(packed))

    def upload(self, array: Any) -> Any:
        """Return the array on the device in C order.

        A numpy array is copied; an array on the device is shared by DLPack.
        """
        if isinstance(array, np.ndarray):
            if array.nbytes < _LARGE:
                return self.xp.ascontiguousarray(self.xp.asarray(array))
            target = self.xp.empty(array.shape, dtype=array.dtype)
            # On the current stream; the driver has copied the host memory when this returns.
            target.set(np.ascontiguousarray(array))
            return target
        if not isinstance(array, self.xp.ndarray):
            array = self.xp.from_dlpack(array)
        return self.xp.ascontiguousarray(array)

    def download(self, array: Any) -> Array:
        """Return a copy on the host after all launches so far are done."""
        return self.xp.asnumpy(array)

    def synchronize(self) -> None:
        """Wait until all launches on the current stream are done."""
        self.xp.cuda.get_current_stream().synchronize()

    def synchronize_all(self) -> None:
        """Wait until all launches on all streams are done."""
        self.xp.cuda.runtime.deviceSynchronize()

    def stream(self) -> int:
        """Return a number for the current stream, on which launches run."""
        return int(self.xp.cuda.get_current_stream().ptr)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Return the context of all work on the device.

        Raises GpuMemoryError, or DeviceLostError if the GPU stopped working. Most errors of CUDA,
        such as a wrong address or a GPU that has left the bus, are for good: all later calls fail.
        """
        if os.getpid() != self._process:
            raise BackendUnavailableError(_FORKED.format(self.name))
        if self._loss is not None:
            raise DeviceLostError(
                f"--device {self.name}: the GPU stopped working earlier in this process "
                f"({self._loss}); start again once nvidia-smi shows it, or use --device cpu"
            )
        runtime = self.xp.cuda.runtime
        try:
            with on_gpu(runtime, self._number):
                yield
        except self._errors as error:
            if error.status == OUT_OF_MEMORY:
                raise GpuMemoryError(str(error)) from error
            try:
                with on_gpu(runtime, self._number):
                    runtime.deviceSynchronize()
            except self._errors:
                self._loss = shorten(error, MAX_OF_A_REASON)
            if self._loss is None:  # The GPU still works.
                raise
            raise DeviceLostError(
                f"--device {self.name}: the GPU stopped working in this case ({self._loss}); "
                "nvidia-smi and the system's log may say why; start again, or use --device cpu"
            ) from error
