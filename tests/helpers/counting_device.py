"""A stand-in for a GPU that counts: bytes that kernels and array operations are given, launches, and waits of the host.

An operation on arrays counts as one launch, with the bytes of its operands and its result, as CuPy has it; views cost nothing. What is
counted of a kernel is each of its arrays once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import cuda_shim
import numpy as np
from numpy.typing import NDArray

_UNWRITTEN = {"empty", "empty_like"}


class CountedArray(np.ndarray):
    """An array whose arithmetic is counted by the device that made it."""

    device: CountingDevice | None = None

    def __array_finalize__(self, parent: Any) -> None:
        self.device = getattr(parent, "device", None)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
        if out is not None:
            options["out"] = tuple(_plain(operand) for operand in out)
        result = getattr(ufunc, method)(*(_plain(operand) for operand in inputs), **options)
        return _counted(self.device, f"{ufunc.__name__}.{method}", [*inputs, result], result if out is None else out[0])

    def __array_function__(self, function: Any, types: Any, arguments: Any, options: Any) -> Any:
        result = function(*(_deep_plain(argument) for argument in arguments), **{key: _deep_plain(value) for key, value in options.items()})
        return _counted(self.device, function.__name__, [*_arrays(arguments), result], result)

    def __setitem__(self, place: Any, value: Any) -> None:
        super().__setitem__(_plain(place), _plain(value))
        target = self.view(np.ndarray)[_plain(place)]
        _note(self.device, "assignment", [target, value])

    def __getitem__(self, place: Any) -> Any:
        result = super().__getitem__(_plain(place))
        if isinstance(place, np.ndarray):
            _note(self.device, "gather", [place, result, result])
        elif not isinstance(result, np.ndarray):
            _wait(self.device, "an element")
        return result

    def copy(self, order: Any = "C") -> Any:
        result = super().copy(order=order)
        _note(self.device, "copy", [self, result])
        return result

    def astype(self, dtype: Any, *, copy: bool = True) -> Any:
        if not copy and self.dtype == dtype:
            return self
        result = super().astype(dtype)
        _note(self.device, "astype", [self, result])
        return result

    def reshape(self, *shape: Any, **options: Any) -> Any:
        result = super().reshape(*shape, **options)
        if result.size and not np.may_share_memory(_plain(result), _plain(self)):
            _note(self.device, "copy", [self, result])
        return result

    def __float__(self) -> float:
        _wait(self.device, "a number")
        return float(self.view(np.ndarray))

    def __int__(self) -> int:
        _wait(self.device, "a number")
        return int(self.view(np.ndarray))

    def __bool__(self) -> bool:
        _wait(self.device, "a number")
        return bool(self.view(np.ndarray))


class CountingDevice(cuda_shim.ShimDevice):
    """Counts.

    Attributes:
        num_bytes, num_launches: by kernel; operations on arrays are "array:" and their name.
        waits: by what the host waits for.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.xp = _CountingModule(self)
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.num_bytes: Counter[str] = Counter()
        self.num_launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def launch(self, source: str, kernel: str, constants: Mapping[str, int], num_threads: int, *arguments: Any) -> None:
        self.num_bytes[kernel] += sum(argument.nbytes for argument in arguments if isinstance(argument, np.ndarray))
        self.num_launches[kernel] += 1
        super().launch(source, kernel, constants, num_threads, *[_plain(argument) for argument in arguments])

    def upload(self, array: Any) -> Any:
        return self.own(super().upload(array))

    def download(self, array: Any) -> NDArray[Any]:
        self.waits["a download"] += 1
        return np.array(_plain(array), order="C")

    def synchronize(self) -> None:
        self.waits["synchronize"] += 1

    def own(self, value: Any) -> Any:
        """The same, counted."""
        if isinstance(value, list | tuple):
            return type(value)(self.own(item) for item in value)
        if isinstance(value, np.generic):
            value = np.asarray(value)  # CuPy's result would stay on the device
        if not isinstance(value, np.ndarray):
            return value
        found = value.view(CountedArray)
        found.device = self
        return found


class _CountingModule:
    def __init__(self, device: CountingDevice) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        function = getattr(np, name)

        def call(*arguments: Any, **options: Any) -> Any:
            plain = {key: _deep_plain(value) for key, value in options.items()}
            result = function(*(_deep_plain(argument) for argument in arguments), **plain)
            if name in _UNWRITTEN:
                return self._device.own(result)
            return _counted(self._device, name, [*_arrays(arguments), result], result)

        return call


def _counted(device: CountingDevice | None, name: str, operands: list[Any], result: Any) -> Any:
    _note(device, name, operands)
    return result if device is None else device.own(result)


def _note(device: CountingDevice | None, name: str, operands: list[Any]) -> None:
    if device is not None:
        device.num_launches[f"array:{name}"] += 1
        device.num_bytes[f"array:{name}"] += sum(operand.nbytes for operand in operands if isinstance(operand, np.ndarray))


def _wait(device: CountingDevice | None, what: str) -> None:
    if device is not None:
        device.waits[what] += 1


def _arrays(arguments: Any) -> list[Any]:
    found = []
    for argument in arguments:
        found += _arrays(argument) if isinstance(argument, list | tuple) else [argument]
    return found


def _deep_plain(value: Any) -> Any:
    return type(value)(_deep_plain(item) for item in value) if isinstance(value, list | tuple) else _plain(value)


def _plain(value: Any) -> Any:
    return value.view(np.ndarray) if isinstance(value, CountedArray) else value
