"""Tensors of PyTorch for the GPU engine, with a GPU or without."""

import cuda_shim
import pytest
import torch

from crfrefine.engines.cuda.cupy_device import is_available
from crfrefine.layer import autograd, functional, inputs, point_filter


def gpu_tensors(engine, monkeypatch):
    """Where tensors for "cuda" or "cuda-shim" are, and a list of those that the shim is given.

    For the shim they are on the CPU, and go to its device as they would to a GPU.
    """
    if engine == "cuda":
        if not is_available() or not torch.cuda.is_available():
            pytest.skip("needs a GPU, CuPy, and a PyTorch for GPUs")
        return "cuda", []
    if cuda_shim.compiler() is None:
        pytest.skip("no C++ compiler to compile the GPU's kernels with")
    return "cpu", give_tensors(cuda_shim.shim_backend(), monkeypatch)


def give_tensors(backend, monkeypatch):
    """Have a GPU's engine get tensors of the CPU as it would get those of a GPU; return the list of
    those that it has got, beside images.
    """
    shared = []

    def share(tensor):
        return tensor.detach().contiguous()

    def share_and_note(tensor):
        shared.append(tensor)
        return share(tensor)

    monkeypatch.setattr(inputs, "engine_for", lambda *_: backend)
    monkeypatch.setattr(functional, "to_array", share)
    for module in (autograd, point_filter):
        monkeypatch.setattr(module, "to_array", share_and_note)
    return shared
