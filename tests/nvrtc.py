"""Compiling the GPU's kernels for real, without a GPU: NVRTC from its wheel or a CUDA toolkit through its C API, or else nvcc."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from crfrefine.backends.cuda.sources import KernelSource


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes of a thread."""

    registers: int
    stack_bytes: int
    spill_bytes: int


class CompilationError(Exception):
    """The compiler's log."""


@cache
def nvrtc_library() -> ctypes.CDLL | None:
    """NVRTC, if some package or the system has it."""
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [str(path) for folder in folders for path in sorted(Path(folder).glob("*/lib/libnvrtc.so.*")) if "alt" not in path.name]
    system = ctypes.util.find_library("nvrtc")
    for path in (*found, *([system] if system else [])):
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    return None


def compiler() -> str | None:
    """The compiler that `compile_for` uses."""
    return "nvrtc" if nvrtc_library() is not None else shutil.which("nvcc")


def compile_for(architecture: str, source: KernelSource) -> dict[str, Usage]:
    """Compile to machine code for an architecture such as "sm_90"; what each kernel takes.

    Raises:
        CompilationError: with the compiler's log.
    """
    library = nvrtc_library()
    log = _with_nvcc(architecture, source) if library is None else _with_nvrtc(library, architecture, source)
    usage = {}
    for part in log.split("Compiling entry function '")[1:]:
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert frame is not None, log
        assert registers is not None, log
        usage[part.partition("'")[0]] = Usage(int(registers[1]), int(frame[1]), int(frame[2]) + int(frame[3]))
    return usage


def _with_nvrtc(library: ctypes.CDLL, architecture: str, source: KernelSource) -> str:
    program = ctypes.c_void_p()
    created = library.nvrtcCreateProgram(ctypes.byref(program), source.text.encode(), f"{source.name}.cu".encode(), 0, None, None)
    assert created == 0
    options = [f"--gpu-architecture={architecture}", "--ptxas-options=-v", *source.options]
    failed = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*(option.encode() for option in options)))
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    text = log.value.decode()
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    library.nvrtcDestroyProgram(ctypes.byref(program))
    if failed or size.value == 0:
        raise CompilationError(text)
    return text


def _with_nvcc(architecture: str, source: KernelSource) -> str:
    nvcc = shutil.which("nvcc")
    assert nvcc is not None
    options = [option for option in source.options if option != "--device-int128"]  # nvcc always has them
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "source.cu"
        text.write_text(source.text, encoding="utf-8")
        command = [nvcc, "--cubin", f"--gpu-architecture={architecture}", "-Xptxas=-v", *options, "-o", f"{folder}/built.cubin", str(text)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompilationError(done.stderr)
    return done.stderr
