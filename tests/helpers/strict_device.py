"""A stand-in for a GPU that holds the engine to a GPU's rules, of which the plain shim knows
nothing.

Its arrays do not mix with the host's, and hold no numbers when they are new. Kernels take nothing
else, and rows of channels only at addresses that one wide load can take. What arrays take is
counted as they come and go, and more than there is cannot be had.
"""

import weakref
from collections import Counter
from functools import partialmethod

import cuda_shim
import numpy as np

import crfrefine.engines
from crfrefine import CrfParameters
from crfrefine.engines.cuda.current_gpu import GpuMemoryError


class StrictError(AssertionError):
    """What a GPU would have answered with garbage, or with an error."""


class StrictArray(np.ndarray):
    """An array on the device that made it: its operands are there too, or single numbers."""

    device = None

    def __array_finalize__(self, parent):
        self.device = getattr(parent, "device", None)

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        for operand in (*inputs, *(out or ())):
            _refuse_host(operand, ufunc.__name__)
        if out is not None:
            options["out"] = tuple(_plain(operand) for operand in out)
        self._count(ufunc.__name__)
        result = getattr(ufunc, method)(*(_plain(operand) for operand in inputs), **options)
        return self._own(result if out is None else out[0])

    def __array_function__(self, function, types, arguments, options):
        self._count(function.__name__)
        return self._own(
            function(
                *map(_plain, arguments), **{key: _plain(value) for key, value in options.items()}
            )
        )

    def __setitem__(self, place, value):
        _refuse_host(value, "assignment")
        self._count("assignment")
        self.view(np.ndarray)[_plain(place)] = _plain(value)

    def __getitem__(self, place):
        result = super().__getitem__(_plain(place))
        if isinstance(place, np.ndarray):
            self._count("gather")
            return self._own(result)
        if not isinstance(result, np.ndarray):
            self._wait("an element")
        return result

    def copy(self, order="C"):
        self._count("copy")
        return self._own(super().copy(order=order))

    def astype(self, dtype, *, copy=True):
        if not copy and self.dtype == dtype:
            return self
        self._count("astype")
        return self._own(super().astype(dtype))

    def reshape(self, *shape, **options):
        result = super().reshape(*shape, **options)
        return result if np.may_share_memory(_plain(result), _plain(self)) else self._own(result)

    def _number(self, kind):
        self._wait("a number")
        return kind(self.view(np.ndarray))

    __float__ = partialmethod(_number, float)
    __int__ = partialmethod(_number, int)
    __bool__ = partialmethod(_number, bool)

    def _count(self, operation):
        if self.device is not None:
            self.device.operations[operation] += 1

    def _own(self, result):
        return result if self.device is None else self.device.own(result)

    def _wait(self, what):
        if self.device is not None:
            self.device.waits[what] += 1


class StrictDevice(cuda_shim.ShimDevice):
    """The shim, strict, with `limit` bytes."""

    def __init__(self, limit=1 << 40, **options):
        super().__init__(**options)
        self.limit = limit
        self.used = 0
        self._alive = set()
        self.xp = _Module(self)
        self.reset()

    def reset(self):
        """Count anew."""
        self.waits = Counter()  # by what the host waits for
        self.launches = Counter()  # of the engine's kernels, by their names
        self.operations = Counter()  # of the array module, each a launch or more, by their names
        self.num_allocations = 0
        self.most = self.used

    def pack(self, source, kernel, constants, num_items, arguments):
        for name, kind in cuda_shim.kernel_source(source, **constants).kernels[kernel].items():
            argument = arguments[name]
            if not kind.endswith("*") or argument is None:
                continue
            where = f"{source}.{kernel}: {name}"
            if not isinstance(argument, StrictArray):
                raise StrictError(f"{where} is not in the device's memory")
            # numpy's memory is aligned to 16 bytes.
            alignment = min(
                16, argument.dtype.itemsize * (argument.shape[-1] if kind == "Channels*" else 1)
            )
            if argument.ctypes.data % alignment:
                raise StrictError(
                    f"{where} lies {argument.ctypes.data % 16} bytes behind a multiple of 16; its "
                    f"rows need {alignment}"
                )
        plain = {name: _plain(argument) for name, argument in arguments.items()}
        run = super().pack(source, kernel, constants, num_items, plain)

        def launch():
            self.launches[f"{source}.{kernel}"] += 1
            run()

        return launch

    def upload(self, array):
        if isinstance(array, StrictArray):
            return self.own(np.ascontiguousarray(_plain(array)))  # it is there already
        return self.own(super().upload(array))

    def download(self, array):
        if not isinstance(array, StrictArray):
            raise StrictError("an array of the host is downloaded")
        self.waits["a download"] += 1
        return np.array(_plain(array), order="C")

    def synchronize(self):
        self.waits["synchronize"] += 1

    synchronize_all = synchronize

    def own(self, value):
        """The same, on the device."""
        if isinstance(value, list | tuple):
            return type(value)(self.own(item) for item in value)
        if isinstance(value, np.generic):
            value = np.asarray(value)  # CuPy's result would stay on the device
        if not isinstance(value, np.ndarray):
            return value
        owner = found = value.view(StrictArray)
        found.device = self
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        place = id(owner)
        size = owner.nbytes
        if place in self._alive:
            return found
        if self.used + size > self.limit:
            raise GpuMemoryError(f"{size} bytes where {self.limit - self.used} are free")

        def release():
            self._alive.discard(place)
            self.used -= size

        self._alive.add(place)
        self.num_allocations += 1
        self.used += size
        self.most = max(self.most, self.used)
        weakref.finalize(owner, release)
        return found


# Functions of the array module that allocate, or make another view, and launch nothing.
_WITHOUT_LAUNCH = ("empty", "empty_like")
# The host waits for the sizes of their results.
_WITH_SIZE = ("flatnonzero", "unique")


class _Module:
    """numpy, whose arrays are the device's."""

    def __init__(self, device):
        self._device = device
        self._numpy = cuda_shim.FilledXp(cuda_shim.POISON)

    def __getattr__(self, name):
        function = getattr(self._numpy, name)

        def call(*arguments, **options):
            for argument in arguments:
                _refuse_host(argument, name)
            if name not in _WITHOUT_LAUNCH:
                self._device.operations[name] += 1
            if name in _WITH_SIZE:
                self._device.waits[name] += 1
            return self._device.own(
                function(
                    *map(_plain, arguments),
                    **{key: _plain(value) for key, value in options.items()},
                )
            )

        return call


PARAMETERS = CrfParameters().replace(
    **{
        "spatial.weight": 0.5,
        "bilateral.theta_alpha": 1.6,
        "bilateral.theta_beta": 0.3,
        "mean_field.filter": "truncated",
    }
)
"""A model that is soon computed."""


def serve(monkeypatch, devices, load):
    """Have the devices whose names match a pattern mean what a function makes of the name."""
    table = ((devices, load), *crfrefine.engines._TABLE)
    monkeypatch.setattr(crfrefine.engines, "_TABLE", table)


def use(engine, monkeypatch):
    """Have `device="cuda"` mean this engine."""
    serve(monkeypatch, "cuda.*", lambda _: engine)


def _refuse_host(operand, where):
    if (
        isinstance(operand, np.ndarray)
        and operand.ndim > 0
        and not isinstance(operand, StrictArray)
    ):
        raise StrictError(f"{where}: an array of the host among those of the device")


def _plain(value):
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value.view(np.ndarray) if isinstance(value, StrictArray) else value
