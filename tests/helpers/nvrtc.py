"""Compiling the GPU's kernels for real, without a GPU: NVRTC from its wheel or a CUDA toolkit,
through its C API.
"""

import ctypes
import ctypes.util
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

CUPYS_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")
"""What CuPy 14 adds to the options of a `RawModule`, besides the architecture."""


class Usage(NamedTuple):
    """What a compiled kernel takes: of a thread, and of a block's shared memory."""

    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int


class CompilationError(Exception):
    """The compiler's log."""


@cache
def nvrtc_library():
    """NVRTC, if some package or the system has it."""
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [
        str(path)
        for folder in folders
        for path in sorted(Path(folder).glob("*/lib/libnvrtc.so.*"))
        if "alt" not in path.name
    ]
    system = ctypes.util.find_library("nvrtc")
    for path in (*found, *([system] if system else [])):
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    return None


def compile_for(architecture, source):
    """Compile to machine code for an architecture such as "sm_90"; what each kernel takes."""
    log, _ = _compile(architecture, source)
    usage = {}
    for part in log.split("Compiling entry function '")[1:]:
        what = (
            "registers",
            "bytes stack frame",
            "bytes spill stores",
            "bytes spill loads",
            "bytes smem",
        )
        found = (re.search(rf"(\d+) {name}", part) for name in what)
        registers, stack, stores, loads, shared = (
            int(number[1]) if number else 0 for number in found
        )
        assert registers, log
        usage[part.partition("'")[0]] = Usage(registers, stack, stores + loads, shared)
    return usage


def intermediate_code(source):
    """Compile to PTX, the assembler's input; each kernel's text."""
    text = _compile("compute_80", source)[1]
    return {part.partition("(")[0].strip(): part for part in text.split(".visible .entry ")[1:]}


def _compile(architecture, source):
    """The compiler's log, and PTX for a virtual architecture; CompilationError has the log."""
    library = nvrtc_library()
    assert library is not None
    program = ctypes.c_void_p()
    created = library.nvrtcCreateProgram(
        ctypes.byref(program), source.text.encode(), f"{source.name}.cu".encode(), 0, None, None
    )
    assert created == 0
    is_virtual = architecture.startswith("compute")
    options = [
        f"--gpu-architecture={architecture}",
        *([] if is_virtual else ["--ptxas-options=-v"]),
        *source.options,
        *CUPYS_OPTIONS,
    ]
    failed = library.nvrtcCompileProgram(
        program,
        len(options),
        (ctypes.c_char_p * len(options))(*(option.encode() for option in options)),
    )
    size = ctypes.c_size_t()

    def read(what):
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
