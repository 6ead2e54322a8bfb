"""The GPU engine: kernels/cuda/*.cu, compiled when first needed; nothing is imported here, since every start looks for a GPU."""
