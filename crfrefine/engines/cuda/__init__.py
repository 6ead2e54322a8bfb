"""The GPU engine: kernels/cuda/*.cu, compiled for the present device when first needed.

Nothing is imported here, since every start checks whether there is a GPU.
"""
