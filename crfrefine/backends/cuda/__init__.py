"""The GPU engine: kernels/cuda/*.cu, compiled for the device at hand when first needed.

The orchestration (`backend`, `mean_field` and the filters) is written against `device.Device`, of which `cupy_device` is the real one.
"""

from crfrefine.backends.cuda.backend import CudaBackend

__all__ = ["CudaBackend"]
