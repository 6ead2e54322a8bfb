"""Counts how often Python asks PyTorch for numbers that would be on a GPU: each time it waits.

What moves tensors to the CPU by `Tensor.to` is not counted: here all of them are there.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

# What needs numbers, or how many of them there are.
ASKING = {
    "__array__",
    "__bool__",
    "__float__",
    "__int__",
    "allclose",
    "cpu",
    "equal",
    "item",
    "masked_select",
    "nonzero",
    "numpy",
    "tolist",
    "unique",
}


class CountedWaits(TorchFunctionMode):
    """Counts what asks for numbers of some tensors, and of all that are computed from them."""

    def __init__(self, *tensors):
        super().__init__()
        self.num_waits = 0
        self._on_gpu = WeakIdKeyDictionary()
        self._note(tensors)

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        result = function(*arguments, **options)
        if not self._is_on_gpu((*arguments, *options.values())):
            return result
        name = getattr(function, "__name__", "")
        is_choice = name == "__getitem__" and has_choice(arguments[1])
        if name in ASKING or is_choice:
            self.num_waits += 1
        self._note(result)
        return result

    def _note(self, values):
        for tensor in tensors_in(values):
            self._on_gpu[tensor] = True

    def _is_on_gpu(self, values):
        return any(tensor in self._on_gpu for tensor in tensors_in(values))


def has_choice(index):
    """Return whether an index has a mask, whose voxels are counted, or a list, which is copied."""
    parts = index if isinstance(index, tuple) else (index,)
    for part in parts:
        if isinstance(part, list) or (isinstance(part, Tensor) and part.dtype == torch.bool):
            return True
    return False


def tensors_in(values):
    """Yield the tensors among values, in lists and tuples too."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Iterable) and not isinstance(values, str | bytes | dict):
        for value in values:
            yield from tensors_in(value)
