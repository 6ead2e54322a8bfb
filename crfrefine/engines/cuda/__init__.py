"""The GPU engine: kernels/cuda/*.cu, compiled for the present device when first needed.

`backend` is the engine; it, `mean_field` and the filters are written against `device.Device`, and `cupy_device` is the real device.
Nothing is imported here, since every start checks whether there is a GPU.
"""
