"""A stand-in for a GPU that holds the engine to a GPU's rules, of which the plain shim knows nothing.

Arrays lie in memory of their own (strict_memory.cpp): aligned to 256 bytes and no more, never zero by chance, not a number once freed.
They do not mix with the host's. Kernels take nothing else, rows of channels only at addresses that one wide load can take.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import cuda_shim
import numpy as np
from numpy.typing import NDArray

from crfrefine.engines.cuda.sources import kernel_source


class StrictError(AssertionError):
    """What a GPU would have answered with garbage, or with an error."""


class StrictArray(np.ndarray):
    """An array on the device: its operands are on the device too, or single numbers."""

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
        for operand in (*inputs, *(out or ())):
            _refuse_host(operand, ufunc.__name__)
        plain = [_plain(operand) for operand in inputs]
        if out is not None:
            options["out"] = tuple(_plain(operand) for operand in out)
        result = getattr(ufunc, method)(*plain, **options)
        return out[0] if out is not None else _strict(result)

    def __array_function__(self, function: Any, types: Any, arguments: Any, options: Any) -> Any:
        return _strict(super().__array_function__(function, types, arguments, options))

    def __setitem__(self, place: Any, value: Any) -> None:
        _refuse_host(value, "assignment")
        super().__setitem__(place, value)


class StrictModule:
    """numpy, whose arrays are the device's."""

    def __getattr__(self, name: str) -> Any:
        function = getattr(np, name)

        def call(*arguments: Any, **options: Any) -> Any:
            for argument in arguments:
                _refuse_host(argument, name)
            return _strict(function(*arguments, **options))

        return call


class StrictDevice(cuda_shim.ShimDevice):
    """The shim, strict. Used inside `strict_memory()`.

    Args:
        limit: bytes that it has; None: any number.
        options: of the shim.

    Attributes:
        launched: source, name and constants of the kernels that were launched.
        uploads: bytes of the host's arrays that were uploaded, one by one.
        downloaded_bytes: of all arrays together.
    """

    def __init__(self, *, limit: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.xp = StrictModule()
        self._limit = limit
        self._used_before = counts()["bytes"]
        self.launched: set[tuple[str, str, Any]] = set()
        self.uploads: list[int] = []
        self.downloaded_bytes = 0

    def launch(self, source: str, kernel: str, constants: Mapping[str, int], num_threads: int, *arguments: Any) -> None:
        self._check(source, kernel, constants, arguments)
        self.launched.add((source, kernel, tuple(sorted(constants.items()))))
        super().launch(source, kernel, constants, num_threads, *[_plain(argument) for argument in arguments])

    def upload(self, array: Any) -> Any:
        if isinstance(array, StrictArray):
            return np.ascontiguousarray(array).view(StrictArray)  # it is there already
        self.uploads.append(int(getattr(array, "nbytes", 0)))
        return _strict(super().upload(array))

    @property
    def uploaded_bytes(self) -> int:
        return sum(self.uploads)

    def download(self, array: Any) -> NDArray[Any]:
        if not isinstance(array, StrictArray):
            raise StrictError("an array of the host is downloaded")
        self.downloaded_bytes += array.nbytes
        return np.frombuffer(bytearray(array.tobytes()), dtype=array.dtype).reshape(array.shape)  # in memory that is not the device's

    def free_bytes(self) -> int | None:
        return None if self._limit is None else self._limit - (counts()["bytes"] - self._used_before)

    def _check(self, source: str, kernel: str, constants: Mapping[str, int], arguments: tuple[Any, ...]) -> None:
        for parameter, argument in zip(kernel_source(source, constants).kernels[kernel], arguments, strict=True):
            if not parameter.is_array or argument is None:
                continue
            where = f"{source}.{kernel}: {parameter.name}"
            if not isinstance(argument, StrictArray) or (argument.nbytes and not block_of(argument)):
                raise StrictError(f"{where} is not in the device's memory")
            _refuse_host(argument, where)
            alignment = argument.dtype.itemsize
            if parameter.is_rows:
                alignment = min(16, alignment * argument.shape[-1])
            if argument.ctypes.data % alignment:
                raise StrictError(f"{where} lies {argument.ctypes.data % 256} bytes behind a multiple of 256; its rows need {alignment}")


@contextmanager
def strict_memory() -> Iterator[None]:
    """All arrays of this thread lie in strict memory."""
    if counts()["bytes"]:
        gc.collect()  # what earlier tests have left in cycles would be given back in the middle of this one, as if there were more room
    handler = ctypes.pythonapi.PyCapsule_New
    handler.restype, handler.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    counts(resets=True)
    before = _set_handler(handler(ctypes.addressof(_handler()), b"mem_handler", None))
    try:
        yield
    finally:
        _set_handler(before)


def counts(*, resets: bool = False) -> dict[str, int]:
    """Allocations so far, bytes in use, the most since the last reset."""
    found = (ctypes.c_int64 * 3)()
    _library().read_counts(found, int(resets))
    return dict(zip(("allocations", "bytes", "most_bytes"), found, strict=True))


def block_of(array: Any) -> int:
    """The number of the block that an array lies in; 0: none."""
    return int(_library().block_of(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)))


def _refuse_host(operand: Any, where: str) -> None:
    if isinstance(operand, np.ndarray) and operand.ndim > 0 and not isinstance(operand, StrictArray):
        raise StrictError(f"{where}: an array of the host among those of the device")


def _plain(value: Any) -> Any:
    return value.view(np.ndarray) if isinstance(value, StrictArray) else value


def _strict(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_strict(item) for item in value)
    return value.view(StrictArray) if isinstance(value, np.ndarray) else value


class _Allocator(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("ctx", "malloc", "calloc", "realloc", "free")]


class _Handler(ctypes.Structure):
    """numpy's `PyDataMem_Handler`."""

    _fields_ = [("name", ctypes.c_char * 127), ("version", ctypes.c_uint8), ("allocator", _Allocator)]


@cache
def _handler() -> _Handler:
    functions = [ctypes.cast(getattr(_library(), f"strict_{name}"), ctypes.c_void_p) for name in ("malloc", "calloc", "realloc", "free")]
    return _Handler(b"strict", 1, _Allocator(None, *(function.value for function in functions)))


def _set_handler(capsule: Any) -> Any:
    """Have numpy allocate through it; what was there before."""
    table = ctypes.pythonapi.PyCapsule_GetPointer
    table.restype, table.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    core = importlib.import_module("numpy._core" if importlib.util.find_spec("numpy._core") else "numpy.core")
    entries = ctypes.cast(table(core._multiarray_umath._ARRAY_API, None), ctypes.POINTER(ctypes.c_void_p))
    return ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(entries[_api_number()])(capsule)


@cache
def _api_number() -> int:
    """The place of `PyDataMem_SetHandler` in numpy's table of functions."""
    text = (Path(np.get_include()) / "numpy" / "__multiarray_api.h").read_text(encoding="utf-8")
    found = re.search(r"#define PyDataMem_SetHandler\b[^#]*?PyArray_API\[(\d+)\]", text)
    assert found is not None
    return int(found[1])


@cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "strict_memory.so"
        source = Path(__file__).with_name("strict_memory.cpp")
        subprocess.run([cuda_shim.compiler(), "-std=c++20", "-O1", "-fPIC", "-shared", "-o", path, source], check=True)
        library = ctypes.CDLL(str(path))
    library.block_of.restype = ctypes.c_int64
    return library
