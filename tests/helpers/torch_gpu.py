"""Tensors of PyTorch for the GPU engine, with a GPU or without."""

import cuda_shim
import pytest
import torch
from strict_device import StrictArray, StrictDevice
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch_shim import DEVICE, OnShim, TorchShim

from crfrefine.engines import is_available
from crfrefine.engines.cuda.kernels import CudaBackend
from crfrefine.layer import autograd, functional, inputs, known_item, point_filter


class TensorsOnGpu:
    """The device of tensors for the GPU engine.

    Attributes:
        device: to be given to PyTorch.
        shared: the tensors that the stand-in's engine has got, beside images.
        shim: the stand-in for PyTorch, which counts; None with a GPU.
    """

    def __init__(self, device, shim=None):
        self.device = device
        self.shared = []
        self.shim = shim


def gpu_tensors(engine, request):
    """Return where tensors for "cuda" or "cuda-shim" are, until the end of a test."""
    if engine == "cuda":
        if not is_available() or not torch.cuda.is_available():
            pytest.skip("needs a GPU, CuPy, and a PyTorch for GPUs")
        return TensorsOnGpu("cuda")
    if cuda_shim.compiler() is None:
        pytest.skip("no C++ compiler to compile the GPU's kernels with")
    return shim_tensors(StrictDevice(), request)


def shim_tensors(device, request):
    """Have the engine of a stand-in get the tensors on `DEVICE`, until the end of a test."""
    shim = TorchShim()
    shim.__enter__()
    request.addfinalizer(lambda: shim.__exit__(None, None, None))
    tensors = TensorsOnGpu(DEVICE, shim)
    backend = CudaBackend(device)
    engine_of_host = inputs.engine_for
    array_of_host = autograd.to_array
    tensor_of_host = autograd.to_tensor

    def engine_for(where, dtype=torch.float32):
        if where == DEVICE and dtype != torch.float64:
            return backend
        return engine_of_host(where, dtype)

    def to_array(tensor):
        if not isinstance(tensor, OnShim):
            return array_of_host(tensor)
        return tensor.detach().contiguous().host

    def to_array_and_note(tensor):
        array = to_array(tensor)
        if isinstance(tensor, OnShim):
            tensors.shared.append(array)
        return array

    def to_tensor(array):
        if not isinstance(array, StrictArray):
            return tensor_of_host(array)
        with temporarily_clear_interpreter_stack():
            return shim.own(tensor_of_host(array))

    autocasts_on_host = torch.is_autocast_enabled

    def autocasts(device_type="cpu"):
        return device_type != DEVICE.type and autocasts_on_host(device_type)

    patch = request.getfixturevalue("monkeypatch")
    patch.setattr(torch, "is_autocast_enabled", autocasts)
    for name in ("tensor", "as_tensor"):
        patch.setattr(torch, name, shim.made_from(getattr(torch, name)))
    patch.setattr(inputs, "engine_for", engine_for)
    for module in (functional, known_item):
        patch.setattr(module, "to_array", to_array)
    for module in (autograd, point_filter):
        patch.setattr(module, "to_array", to_array_and_note)
        patch.setattr(module, "to_tensor", to_tensor, raising=False)
    return tensors
