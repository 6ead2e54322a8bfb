"""The GPU engine: kernels/cuda/*.cu, compiled when first needed.

Nothing is imported here, since every start looks for a GPU.
"""
