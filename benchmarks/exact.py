"""Float64 brute force, and single rows of it at full size: the oracle, written without any code of the package."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from workers.measure import Workload

ROW_REACH = 5.0  # in theta_alpha: what lies farther has a kernel below e^-12.5


def features(workload: Workload, theta_position: float, theta_intensity: float | None) -> NDArray[np.float64]:
    """(D, N) features of all voxels in C order, divided by their bandwidths."""
    axes = [np.arange(n) * step / theta_position for n, step in zip(workload.grid_shape, workload.meta["spacing"], strict=True)]
    rows = np.stack(np.meshgrid(*axes, indexing="ij")).reshape(len(axes), -1)
    if theta_intensity is None:
        return rows
    return np.concatenate([rows, workload.image.reshape(workload.image.shape[0], -1) / 255.0 / theta_intensity])


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Over the first axis."""
    exponentials = np.exp(logits - logits.max(axis=0).astype(np.float64))
    return exponentials / exponentials.sum(axis=0)


def _symmetric_kernel(points: NDArray[np.float64]) -> NDArray[np.float64]:
    squares = np.einsum("dn,dn->n", points, points)
    kernel = np.exp(-0.5 * np.maximum(squares[:, None] + squares[None, :] - 2.0 * points.T @ points, 0.0))
    scale = 1.0 / np.sqrt(kernel.sum(axis=1))
    kernel *= scale[:, None]
    kernel *= scale[None, :]
    return kernel


def mean_field(workload: Workload) -> NDArray[np.float64]:
    """(L, N) marginals after the workload's steps, all pairs of voxels summed: Potts, symmetric normalization."""
    meta = workload.meta
    logits = workload.logits.reshape(workload.logits.shape[0], -1).astype(np.float64)
    kernel = meta["bilateral_weight"] * _symmetric_kernel(features(workload, meta["theta_alpha"], meta["theta_beta"]))
    kernel += meta["spatial_weight"] * _symmetric_kernel(features(workload, meta["theta_gamma"], None))
    marginals = softmax(logits)
    for _ in range(meta["num_iterations"]):
        message = marginals @ kernel
        marginals = softmax(logits - (message.sum(axis=0) - message))
    return marginals


def sample_voxels(workload: Workload, count: int) -> NDArray[np.int64]:
    """Flat indices of voxels to check, the same each time."""
    inside = np.flatnonzero(workload.mask) if workload.mask is not None else np.arange(workload.image[0].size)
    return np.random.default_rng(20240229).choice(inside, size=min(count, inside.size), replace=False)


def bilateral_rows(workload: Workload, values: NDArray[np.float32], voxels: NDArray[np.int64]) -> NDArray[np.float64]:
    """(V, len(voxels)): (K values) / (K 1) of the bilateral kernel at single voxels."""
    meta = workload.meta
    reach = [int(np.ceil(ROW_REACH * meta["theta_alpha"] / step)) for step in meta["spacing"]]
    result = np.empty((values.shape[0], voxels.size))
    for column, voxel in enumerate(voxels):
        center = np.unravel_index(voxel, workload.grid_shape)
        box = tuple(slice(max(0, c - r), c + r + 1) for c, r in zip(center, reach, strict=True))
        exponent = np.zeros(workload.image[0][box].shape, np.float32)
        for axis, (c, step) in enumerate(zip(center, meta["spacing"], strict=True)):
            offset = (np.arange(box[axis].start, box[axis].start + exponent.shape[axis]) - c) * step / meta["theta_alpha"]
            exponent += (offset**2).reshape([-1 if a == axis else 1 for a in range(exponent.ndim)]).astype(np.float32)
        for channel in workload.image:
            difference = channel[box].astype(np.float32) - np.float32(channel[center])
            exponent += (difference / np.float32(255.0 * meta["theta_beta"])) ** 2
        kernel = np.exp(-0.5 * exponent).astype(np.float64)
        if workload.mask is not None:
            kernel *= workload.mask[box]
        result[:, column] = values[(slice(None), *box)].reshape(len(values), -1) @ kernel.ravel() / kernel.sum()
    return result
