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

from crfrefine.engines.cuda.sources import KernelSource

FLUSHES = "-ftz=true"
CUPYS_OPTIONS = (FLUSHES, "--device-as-default-execution-space")
"""What CuPy 14 adds to the options of a `RawModule`, besides the architecture."""


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes: of a thread, and of a block's shared memory."""

    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int = 0


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
    log, _ = _with_nvcc(architecture, source) if library is None else _with_nvrtc(library, architecture, source)
    usage = {}
    for part in log.split("Compiling entry function '")[1:]:
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert frame is not None, log
        assert registers is not None, log
        shared = re.search(r"(\d+) bytes smem", part)
        usage[part.partition("'")[0]] = Usage(
            int(registers[1]), int(frame[1]), int(frame[2]) + int(frame[3]), int(shared[1]) if shared is not None else 0
        )
    return usage


def intermediate_code(source: KernelSource) -> dict[str, str]:
    """Compile to PTX, the assembler's input; each kernel's text.

    Raises:
        CompilationError: with the compiler's log.
    """
    library = nvrtc_library()
    text = _with_nvcc("compute_80", source)[1] if library is None else _with_nvrtc(library, "compute_80", source)[1]
    return {part.partition("(")[0].strip(): part for part in text.split(".visible .entry ")[1:]}


def _with_nvrtc(library: ctypes.CDLL, architecture: str, source: KernelSource) -> tuple[str, str]:
    """The compiler's log; and PTX for a virtual architecture."""
    program = ctypes.c_void_p()
    created = library.nvrtcCreateProgram(ctypes.byref(program), source.text.encode(), f"{source.name}.cu".encode(), 0, None, None)
    assert created == 0
    is_virtual = architecture.startswith("compute")
    options = [f"--gpu-architecture={architecture}", *([] if is_virtual else ["--ptxas-options=-v"]), *source.options, *CUPYS_OPTIONS]
    failed = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*(option.encode() for option in options)))
    size = ctypes.c_size_t()

    def read(what: str) -> str:
        getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        getattr(library, f"nvrtcGet{what}")(program, text)
        return text.value.decode()

    log = read("ProgramLog")
    code = read("PTX") if is_virtual and not failed else ""
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    library.nvrtcDestroyProgram(ctypes.byref(program))
    if failed or (not is_virtual and size.value == 0):
        raise CompilationError(log)
    return log, code


def _with_nvcc(architecture: str, source: KernelSource) -> tuple[str, str]:
    nvcc = shutil.which("nvcc")
    assert nvcc is not None
    is_virtual = architecture.startswith("compute")
    options = [FLUSHES, *(option for option in source.options if option != "--device-int128")]  # nvcc always has them
    with tempfile.TemporaryDirectory() as folder:
        text, built = Path(folder) / "source.cu", Path(folder) / "built"
        text.write_text(source.text, encoding="utf-8")
        target = ["--ptx"] if is_virtual else ["--cubin", "-Xptxas=-v"]
        command = [nvcc, *target, f"--gpu-architecture={architecture}", *options, "-o", str(built), str(text)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CompilationError(done.stderr)
        return done.stderr, built.read_text(encoding="utf-8") if is_virtual else ""
