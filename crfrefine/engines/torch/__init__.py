"""The model in plain tensor operations of PyTorch, on any of its devices.

It is the oracle of the other engines, and a way onto a GPU without kernels.
"""
