"""Tensors of PyTorch for the GPU engine, with a GPU or without."""

import cuda_shim
import pytest
import torch

from crfrefine.engines.cuda.cupy_device import is_available
from crfrefine.layer import autograd, inputs, point_filter


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
    backend = cuda_shim.shim_backend()
    shared = []
    monkeypatch.setattr(inputs, "engine_for", lambda *_: backend)
    for module in (autograd, point_filter):
        monkeypatch.setattr(
            module, "to_array", lambda tensor: shared.append(tensor) or tensor.detach().contiguous()
        )
    return "cpu", shared
