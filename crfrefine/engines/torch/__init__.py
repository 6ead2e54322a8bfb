"""The model in plain tensor operations of PyTorch, on any of its devices: the oracle of the engines, a GPU path without kernels."""
