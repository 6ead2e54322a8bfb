"""A stand-in for a GPU to PyTorch: tensors that are said to be on another device.

They do not mix with those of the host, and what makes the host wait for them is counted, as well as
what it sends to them. Their numbers are in the host's memory.
"""

from collections import Counter

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")  # It is like a GPU to autograd, and each PyTorch has it.

# The host waits for a number, or for how many there are.
_ASKING = (
    "_local_scalar_dense",
    "_unique2",
    "allclose",
    "bincount",
    "equal",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
)
# Their indices may be the host's, which are sent to the GPU.
_WITH_INDICES = ("index", "index_put", "index_put_", "_index_put_impl_")


class MixedDevicesError(AssertionError):
    """Some operands are on the host, others on the GPU: PyTorch would raise an error."""


class OnShim(Tensor):
    """A tensor of which PyTorch believes that it is on a GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host, shim):
        return Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=DEVICE,
        )

    def __init__(self, host, shim):
        self.host = host
        self._shim = shim

    def __repr__(self):
        return f"OnShim({self.host!r})"

    def tolist(self):
        """Return the numbers; PyTorch asks a subclass in vain."""
        return self.detach().cpu().tolist()

    def new_tensor(self, numbers):
        """Return numbers in a tensor of the same type and device."""
        return torch.tensor(numbers, dtype=self.dtype, device=self.device)

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        """Go to the stand-in in a thread that has not entered its context."""
        leaves = tree_leaves((arguments, options))
        shim = next(leaf._shim for leaf in leaves if isinstance(leaf, cls))
        return shim.__torch_dispatch__(function, types, arguments, options)


class TorchShim(TorchDispatchMode):
    """The context in which there is such a GPU.

    Large uploads wait, too: for what the GPU has begun.

    Attributes:
        waits: how often the host waits for the GPU, by what for.
        uploads: how often it sends something there, by what.
    """

    def __init__(self):
        super().__init__()
        self.reset()

    def reset(self):
        """Count anew."""
        self.waits = Counter()
        self.uploads = Counter()

    def own(self, tensor):
        """Return the host's tensor as one of the GPU; this is not counted."""
        return OnShim(tensor, self)

    def made_from(self, make):
        """Return `make`, to which PyTorch lets no context say where numbers go."""

        def tensor(*arguments, device=None, **options):
            is_host = device is None or torch.device(device) != DEVICE
            if is_host or isinstance(arguments[0], Tensor):
                return make(*arguments, device=device, **options)
            self.uploads["numbers"] += 1
            return self.own(make(*arguments, **options))

        return tensor

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        name = function._schema.name.removeprefix("aten::")
        tensors = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, OnShim)]
        goes_to_us = bool(ours)
        if options.get("device") is not None:
            goes_to_us = torch.device(options["device"]) == DEVICE
            options["device"] = torch.device("cpu")
        if name == "copy_":
            goes_to_us = isinstance(arguments[0], OnShim)
        self._count(name, arguments, tensors, goes_to_us=goes_to_us)

        # Transforms of functions are below this context already, and must not begin anew.
        with temporarily_clear_interpreter_stack():
            result = function(*tree_map(_host, arguments), **tree_map(_host, options))
        if not goes_to_us:
            return result
        known = {id(tensor.host): tensor for tensor in ours}  # Operations in place return these.

        def own(value):
            if not isinstance(value, Tensor):
                return value
            return known[id(value)] if id(value) in known else self.own(value)

        return tree_map(own, result)

    def _count(self, name, arguments, tensors, *, goes_to_us):
        """Count what an operation waits for and sends; raise an error if it mixes devices."""
        are_ours = [isinstance(tensor, OnShim) for tensor in tensors]
        if name in ("_to_copy", "copy_"):
            if goes_to_us and not are_ours[-1]:
                self.uploads["a tensor"] += 1
            if not goes_to_us and are_ours[-1]:
                self.waits["a copy"] += 1
            return
        if not any(are_ours):
            return
        if name in _ASKING:
            self.waits[name] += 1
        if name in _WITH_INDICES:
            for index in arguments[1]:
                if index is None:
                    continue
                if not isinstance(index, OnShim):
                    self.uploads["an index"] += 1
                if index.dtype == torch.bool:
                    self.waits["a mask"] += 1
            tensors = [arguments[0], *arguments[2:3]]
            are_ours = [isinstance(tensor, OnShim) for tensor in tensors]
        for tensor, is_ours in zip(tensors, are_ours, strict=True):
            if not is_ours and tensor.ndim > 0:
                raise MixedDevicesError(f"{name}: a tensor of the host among those of the GPU")


def _host(value):
    return value.host if isinstance(value, OnShim) else value
