"""A machine with several GPUs as CuPy shows it: `CupyDevice` runs as it is, and the GPUs on which a context is opened are recorded.

As in CUDA 12, setting a thread to a GPU opens a context there, and so does what is done on it. Memory is numpy's, kernels run as C++.

PRETENDED_CUPY in the environment of a process says how many GPUs it finds; in the folder PRETENDED_STATE it notes each context, `GPU.PID`.
"""

import os
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import cuda_shim
import numpy as np
from pretended_gpus import SITE, CudaError

from crfrefine.engines import get_backend
from crfrefine.engines.cuda import cupy_device, current_gpu
from crfrefine.engines.cuda.sources import KernelSource, kernel_source, source_names

REFUSED = 46
"""`cudaErrorDevicesUnavailable`."""


class Machine:
    """What CUDA knows."""

    def __init__(self, number):
        self.number = number  # of GPUs
        self.contexts = set()  # GPUs on which this process has one
        self.refusing = set()  # GPUs that another process has for itself
        self.set_to = []  # GPUs that threads were set to, in order
        self.notes = []  # kernels that were launched, and waits for a stream, in order
        self.breaks_in = ""  # the kernel that breaks the GPU, once it runs
        self._is_broken = False
        self._threads = threading.local()

    @property
    def current(self):
        """The GPU of this thread."""
        return getattr(self._threads, "current", 0)

    def set(self, number):
        self.set_to.append(number)
        self._open(number)
        self._threads.current = number

    def use(self):
        """Something happens on the GPU of this thread."""
        self._open(self.current)
        if self._is_broken:
            raise CudaError(700, "cudaErrorIllegalAddress: an illegal memory access was encountered")

    def run(self, kernel, work):
        """Launch a kernel; what it breaks shows later."""
        self.use()
        self.notes.append(kernel)
        work()
        self._is_broken = self._is_broken or kernel == self.breaks_in

    def _open(self, number):
        if number in self.refusing:
            raise CudaError(REFUSED, "cudaErrorDevicesUnavailable: CUDA-capable device(s) is/are busy or unavailable")
        self.contexts.add(number)
        if "PRETENDED_STATE" in os.environ:
            (Path(os.environ["PRETENDED_STATE"]) / f"{number}.{os.getpid()}").touch()


machine = Machine(0)


class Array(np.ndarray):
    """CuPy's, as far as it differs from numpy's."""

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data)

    def set(self, values):
        machine.use()
        self.view(np.ndarray)[...] = values

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        machine.use()
        if out is not None:
            options["out"] = tuple(map(_plain, out))
        return _own(getattr(ufunc, method)(*map(_plain, inputs), **options))

    def __array_function__(self, function, types, arguments, options):
        machine.use()
        return super().__array_function__(function, types, arguments, options)


class Event:
    def __init__(self, **_):
        machine.use()

    def record(self, stream=None):
        machine.use()

    def synchronize(self):
        machine.use()

    def __del__(self):
        machine.use()


class Stream:
    ptr = 1

    def __init__(self, **_):
        machine.use()

    def synchronize(self):
        machine.notes.append("wait")
        machine.use()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Module:
    """CuPy's `RawModule`: its kernels run as C++, with every thread of their blocks."""

    def __init__(self, *, code, options, backend):
        name = next(name for name in source_names() if code.endswith(kernel_source(name, {}).text))
        self._source = KernelSource(name, code, {}, options)

    def get_function(self, kernel):
        is_of_blocks = f"CRF_BLOCK_KERNEL({kernel}," in self._source.text

        def launch(grid, block, arguments, *, shared_mem=0):
            plain = [_plain(value) for value in arguments]
            num_items = grid[0] if is_of_blocks else grid[0] * block[0]
            machine.run(kernel, lambda: cuda_shim.run_packed(self._source, kernel, num_items, plain))

        return launch


class Device:
    """CuPy's context: it sets back to the GPU before."""

    def __init__(self, number):
        self._number = number
        self._before = []

    def __enter__(self):
        self._before.append(machine.current)
        if machine.current != self._number:
            machine.set(self._number)
        return self

    def __exit__(self, *_):
        machine.set(self._before.pop())

    def synchronize(self):
        with self:
            machine.use()


def _memory():
    machine.use()
    return 1 << 34, 1 << 34


class Cupy:
    """The module."""

    __version__ = "0"
    cuda = SimpleNamespace(
        runtime=SimpleNamespace(
            CUDARuntimeError=CudaError,
            getDevice=lambda: machine.current,
            setDevice=lambda number: machine.set(number),
            deviceSynchronize=lambda: machine.use(),
            memGetInfo=_memory,
            getDeviceProperties=lambda number: {"name": b"a stand-in", "totalGlobalMem": 1 << 34, "major": 9, "minor": 0},
            driverGetVersion=lambda: 13000,
            runtimeGetVersion=lambda: 13000,
        ),
        driver=SimpleNamespace(CUDADriverError=CudaError),
        compiler=SimpleNamespace(CompileException=CudaError),
        get_current_stream=lambda: Stream(),
        Event=Event,
        get_elapsed_time=lambda begin, end: 1.0,
        Device=Device,
    )
    RawModule = Module

    def __getattr__(self, name):
        function = getattr(np, name)

        def call(*arguments, **options):
            machine.use()
            return _own(function(*map(_plain, arguments), **options))

        return call

    def asarray(self, values):
        machine.use()
        return values if isinstance(values, Array) else np.array(values).view(Array)

    def asnumpy(self, values):
        machine.use()
        return np.array(_plain(values), order="C")

    def get_default_memory_pool(self):
        return SimpleNamespace(free_bytes=lambda: 0, free_all_blocks=lambda: None, total_bytes=lambda: 0)


def install(number):
    """Have this process find so many GPUs."""
    global machine
    machine = Machine(number)
    sys.modules["cupy"] = Cupy()
    vars(cupy_device).update(num_driver_devices=lambda: number, is_available=lambda: number > 0)


@contextmanager
def installed(number):
    """The GPUs inside the context."""
    before = dict(vars(cupy_device))
    install(number)
    try:
        yield machine
    finally:
        del sys.modules["cupy"]
        vars(cupy_device).update(before)


@contextmanager
def for_a_program(number, monkeypatch):
    """The same for somebody's program, whose engines are new; large arrays are those of 1000 bytes."""
    monkeypatch.setattr(current_gpu, "_is_own_process", False)
    monkeypatch.setattr(cupy_device, "_LARGE", 1000)
    forget_engines()
    with installed(number) as found:
        yield found
    forget_engines()


def forget_engines():
    """Have engines open their GPUs anew."""
    get_backend.__globals__["_cuda_backend"].cache_clear()


def environment(state, number):
    """The environment of a process that finds so many GPUs; `state` is an empty folder."""
    state.mkdir()
    path = os.pathsep.join(filter(None, (str(SITE), os.environ.get("PYTHONPATH", ""))))
    return {**os.environ, "PYTHONPATH": path, "PRETENDED_CUPY": str(number), "PRETENDED_STATE": str(state)}


def contexts_in(state):
    """The GPUs on which each process opened a context."""
    found = {}
    for path in state.iterdir():
        number, _, process = path.name.partition(".")
        found.setdefault(int(process), set()).add(int(number))
    return found


def _plain(value):
    return value.view(np.ndarray) if isinstance(value, Array) else value


def _own(value):
    if isinstance(value, list | tuple):
        return type(value)(map(_own, value))
    return np.asarray(value).view(Array) if isinstance(value, np.ndarray | np.generic) else value
