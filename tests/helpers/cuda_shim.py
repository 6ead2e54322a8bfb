"""The GPU engine without a GPU: its kernels compiled as C++, its arrays numpy's.

Threads run one after the other (with `order` 0 in reverse), in kernels with barriers inside each
phase. Watched, each access of a kernel to memory is looked at (kernel_watch.cpp): outside of the
launch's arrays, where nobody has written, or where two threads meet with no barrier between, it is
a fault. Arithmetic is a GPU's then, and `order` is the seed of the order of threads. Not seen are
an access behind an array that lies within another one, numpy's reads of unwritten memory, and what
threads do to each other through atomics.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from crfrefine.engines.cuda.kernels import CudaBackend
from crfrefine.engines.cuda.launches import Launcher
from crfrefine.engines.cuda.sources import KernelSource
from crfrefine.errors import BackendUnavailableError

# Warnings are errors but for the constants that one of two compilations does not use.
FLAGS = (
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-Wno-unused",
    "-Wno-unused-parameter",
    "-Werror",
)
# The compiler fuses multiplications and additions only where it optimizes more. Without their
# libraries, the sanitizers' calls are ours.
WATCHED_FLAGS = (*FLAGS, "-O2", "-mfma", "-DCRF_WATCHED=1", "-fsanitize=thread,bounds")
_OWN_LIBRARIES = ("-nodefaultlibs", "-lstdc++", "-lm", "-lc", "-lgcc_s")

POISON = 0x7FF3A5C7
"""What new memory is filled with: not a number in any precision, an index beyond every array."""


def compiler():
    """The C++ compiler, if there is one."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


def can_watch():
    """Whether launches can be watched here."""
    return compiler() is not None and sys.platform == "linux" and platform.machine() == "x86_64"


def all_are_watched():
    """Whether the environment asks that every launch of every shim be watched (make
    test-gpu-emulated).
    """
    return os.environ.get("CRFREFINE_TEST_WATCHED") == "1"


@cache
def kernel_source(name, /, **constants):
    """A source for values of its constants, read once."""
    return KernelSource(name, constants)


class KernelFaultError(AssertionError):
    """Threads get in each other's way, take what nobody wrote, or reach beyond their arrays."""


def _build(name, text, *options, libraries=()):
    """Compile a text unless that is done already; several processes may try at once."""
    folder = Path(tempfile.gettempdir()) / f"crfrefine-shim-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    known = hashlib.sha256((text + repr((options, libraries))).encode()).hexdigest()[:24]
    stem, _, suffix = name.partition(".")
    path = folder / f"{stem}-{known}.{suffix}"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            source = Path(work) / "source.cpp"
            built = Path(work) / "built"
            source.write_text(text, encoding="utf-8")
            done = subprocess.run(
                [compiler(), *options, source, *libraries, "-o", built],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            built.replace(path)
    return path


# What stands for a GPU's compiler where kernels are compiled as C++.
_EMULATION = (
    Path(__file__)
    .with_name("emulation.h")
    .read_text(encoding="utf-8")
    .replace("#pragma once\n", "")
)


@cache
def _standard_headers(flags):
    """The standard headers that all kernels need, compiled once: they take most of a compilation's
    time.
    """
    text = "".join(
        line for line in _EMULATION.splitlines(keepends=True) if line.startswith("#include <")
    )
    header = _build("standard.hpp.gch", text, *flags, "-x", "c++-header").with_suffix("")
    if not header.exists():
        header.write_text(text, encoding="utf-8")
    return header


@cache
def _watch():
    """The library that watched kernels call."""
    text = Path(__file__).with_name("kernel_watch.cpp").read_text(encoding="utf-8")
    path = _build("watch.so", text, *FLAGS, "-O2", "-shared")
    return path, ctypes.CDLL(str(path))


@cache
def library(name, text, options, is_watched):
    """A source's kernels, compiled."""
    fuses = is_watched and "--fmad=false" not in options
    flags = (
        *(WATCHED_FLAGS if is_watched else FLAGS),
        f"-ffp-contract={'fast' if fuses else 'off'}",
    )
    libraries = (*_OWN_LIBRARIES, _watch()[0]) if is_watched else ()
    text = text.replace("#include <emulation.h>\n", _EMULATION)
    return ctypes.CDLL(
        str(
            _build(
                f"{name}.so",
                text,
                *flags,
                "-shared",
                "-include",
                _standard_headers(flags),
                libraries=libraries,
            )
        )
    )


def run_kernel(source, kernel, constants, num_items, arguments, *, order=1, is_watched=False):
    """Run a kernel's threads, or its blocks where they share memory; raise KernelFaultError for
    what the watch notices.
    """
    packed = source.pack(kernel, arguments)
    held = [
        np.array(np.uint64(value.ctypes.data) if isinstance(value, np.ndarray) else value)
        for value in packed
    ]
    pointers = (ctypes.c_void_p * len(held))(*(cell.ctypes.data for cell in held))
    run = getattr(library(source.name, source.text, source.options, is_watched), f"launch_{kernel}")
    run.restype = ctypes.c_char_p
    with _WATCHING if is_watched else contextlib.nullcontext():
        if is_watched:
            named = zip(source.kernels[kernel], packed, strict=True)
            _watch_arrays({name: value for name, value in named if isinstance(value, np.ndarray)})
        fault = run(ctypes.c_longlong(num_items), ctypes.c_int(order), pointers)
    if fault is not None:
        raise KernelFaultError(f"{source.name}.{kernel} with {dict(constants)}: {fault.decode()}")


_WATCHING = threading.Lock()  # there is one watch


def _watch_arrays(arrays):
    """Tell the watch where a launch's arrays lie; those that overlap are one."""
    found = []
    for name, array in sorted(
        arrays.items(), key=lambda item: (item[1].ctypes.data, -item[1].nbytes)
    ):
        begin = array.ctypes.data
        end = array.ctypes.data + array.nbytes
        size = array.itemsize
        if found and begin < found[-1][1]:
            before = found.pop()
            begin = before[0]
            end = max(before[1], end)
            size = min(before[2], size)
            name = f"{before[3]} and {name}"
        if end > begin:
            found.append((begin, end, size, name))
    watch_array = _watch()[1].watch_array
    for begin, end, size, name in found:
        watch_array(
            ctypes.c_void_p(begin),
            ctypes.c_size_t(end - begin),
            ctypes.c_size_t(size),
            name.encode(),
        )


class FilledXp:
    """numpy, whose new memory is full of a number of 32 bits."""

    def __init__(self, word):
        self._word = word

    def __getattr__(self, name):
        return getattr(np, name)

    def empty(self, *arguments, **options):
        return self._filled(np.empty(*arguments, **options))

    def empty_like(self, *arguments, **options):
        return self._filled(np.empty_like(*arguments, **options))

    def _filled(self, array):
        words = np.full(array.nbytes // 4 + 1, self._word, dtype=np.uint32)
        ctypes.memmove(array.ctypes.data, words.ctypes.data, array.nbytes)
        return array


class ShimDevice(Launcher):
    """A device made of numpy and a C++ compiler; see `run_kernel`. `is_watched`: where that is
    possible.
    """

    xp: Any = np

    def __init__(self, *, order=1, is_watched=False):
        super().__init__()
        if compiler() is None:
            raise BackendUnavailableError("no C++ compiler to compile the GPU's kernels with")
        self.name = "cuda-shim"
        self._order = order
        self._is_watched = (is_watched and can_watch()) or all_are_watched()
        if self._is_watched:
            self.xp = FilledXp(POISON)

    def pack(self, source, kernel, constants, num_items, arguments):
        return partial(
            run_kernel,
            kernel_source(source, **constants),
            kernel,
            constants,
            num_items,
            arguments,
            order=self._order,
            is_watched=self._is_watched,
        )

    def upload(self, array):
        return (
            np.array(array, order="C")
            if isinstance(array, np.ndarray)
            else np.ascontiguousarray(np.from_dlpack(array))
        )

    def download(self, array):
        return np.array(array, order="C")

    def synchronize(self):
        pass

    synchronize_all = synchronize

    def stream(self):
        return 0

    def active(self):
        return contextlib.nullcontext()


def shim_backend(**options):
    """The GPU engine on a shim device."""
    return CudaBackend(ShimDevice(**options))


def watched_backend(**options):
    """The same, watched where that is possible."""
    return shim_backend(is_watched=True, **options)
