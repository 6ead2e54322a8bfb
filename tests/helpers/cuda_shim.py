"""The GPU engine without a GPU: its kernels compiled as C++, its arrays numpy's.

The same orchestration and the same kernel sources run as on a device. Its threads run one after the other (`num_workers` 1), in reverse
order (0), or on several of the processor's at once: whatever depended on who comes first would show. In kernels with barriers that is
so of blocks, and of threads inside each phase; what a block shares is watched (emulation.h).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.engines.cuda.backend import CudaBackend
from crfrefine.engines.cuda.sources import KernelSource, kernel_source, pack_arguments
from crfrefine.errors import BackendUnavailableError

# No contraction into fused multiply-adds, as on the device where it matters; warnings are errors but for the constants that one of two
# compilations does not use.
FLAGS = (
    "-std=c++20",
    "-O1",
    "-ffp-contract=off",
    "-fPIC",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-Wno-unused",
    "-Wno-unused-parameter",
    "-Werror",
)


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


class KernelFaultError(AssertionError):
    """Threads of a block that get in each other's way, or take what nobody wrote."""


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"crfrefine-shim-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _build(path: Path, text: str, *options: str) -> Path:
    """Compile a text unless that is done already; several processes may try at once."""
    if not path.exists():
        found = compiler()
        assert found is not None
        with tempfile.TemporaryDirectory(dir=path.parent) as work:
            source, built = Path(work) / "source.cpp", Path(work) / "built"
            source.write_text(text, encoding="utf-8")
            done = subprocess.run([found, *FLAGS, *options, "-o", built, source], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            built.replace(path)
    return path


@cache
def _emulation() -> str:
    """What stands for a GPU's compiler where kernels are compiled as C++."""
    return Path(__file__).with_name("emulation.h").read_text(encoding="utf-8").replace("#pragma once\n", "")


@cache
def _standard_headers() -> Path:
    """The standard headers that all kernels need, compiled once: they take most of a compilation's time."""
    text = "".join(line for line in _emulation().splitlines(keepends=True) if line.startswith("#include <"))
    header = _folder() / f"standard-{_hash(text)}.hpp"
    _build(header.with_suffix(".hpp.gch"), text, "-x", "c++-header")
    if not header.exists():
        header.write_text(text, encoding="utf-8")
    return header


def _hash(text: str) -> str:
    return hashlib.sha256((text + repr(FLAGS)).encode()).hexdigest()[:24]


@cache
def _library(source: KernelText) -> ctypes.CDLL:
    path = _folder() / f"{source.name}-{_hash(source.text)}.so"
    return ctypes.CDLL(str(path if path.exists() else _build(path, source.text, "-shared", "-include", str(_standard_headers()))))


class KernelText:
    """A source that can be a key: two of the same text are the same."""

    def __init__(self, source: KernelSource) -> None:
        self.name, self.text = source.name, source.text.replace("#include <emulation.h>\n", _emulation())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KernelText) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)


def run_kernel(
    source: KernelSource, kernel: str, constants: Mapping[str, int], num_items: int, arguments: Sequence[Any], *, num_workers: int = 1
) -> None:
    """Run a kernel's threads, or its blocks where they share memory.

    Raises:
        KernelFaultError: one that the emulation notices.
    """
    run_packed(source, kernel, num_items, pack_arguments(source, kernel, constants, arguments), num_workers=num_workers)


def run_packed(source: KernelSource, kernel: str, num_items: int, packed: Sequence[Any], *, num_workers: int = 1) -> None:
    """Run a kernel with arguments in the driver's form; see `run_kernel`."""
    cells = [np.uint64(value.ctypes.data) if isinstance(value, np.ndarray) else value for value in packed]
    held = [np.array(cell) for cell in cells]
    pointers = (ctypes.c_void_p * len(held))(*(cell.ctypes.data for cell in held))
    run = getattr(_library(KernelText(source)), f"launch_{kernel}")
    run.restype = ctypes.c_char_p
    fault = run(ctypes.c_longlong(num_items), ctypes.c_int(num_workers), pointers)
    if fault is not None:
        raise KernelFaultError(f"{source.name}.{kernel}: {fault.decode()}")


class ShimDevice:
    """A device made of numpy and a C++ compiler."""

    xp: Any = np

    def __init__(self, *, num_workers: int = 1, free_bytes: int | None = None) -> None:
        if compiler() is None:
            raise BackendUnavailableError("no C++ compiler to compile the GPU's kernels with")
        self.name = "cuda-shim"
        self._num_workers = num_workers
        self._free_bytes = free_bytes

    def launch(self, source: str, kernel: str, constants: Mapping[str, int], num_threads: int, *arguments: Any) -> None:
        run_kernel(kernel_source(source, constants), kernel, constants, num_threads, arguments, num_workers=self._num_workers)

    def launch_blocks(self, source: str, kernel: str, constants: Mapping[str, int], num_blocks: int, *arguments: Any) -> None:
        self.launch(source, kernel, constants, num_blocks, *arguments)  # an item of a launch is a block here

    def upload(self, array: Any) -> Any:
        return np.array(array, order="C") if isinstance(array, np.ndarray) else np.ascontiguousarray(np.from_dlpack(array))

    def download(self, array: Any) -> NDArray[Any]:
        return np.array(array, order="C")

    def synchronize(self) -> None:
        pass

    def active(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def free_bytes(self) -> int | None:
        return self._free_bytes


def shim_backend(**options: Any) -> CudaBackend:
    """The GPU engine on a shim device."""
    return CudaBackend(ShimDevice(**options))
