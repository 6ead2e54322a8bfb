"""Single rows of float64 brute force at full size: the oracle, written without any code of the package."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from workers.measure import Workload

ROW_REACH = 5.0  # in theta_alpha: what lies farther has a kernel below e^-12.5


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Over the first axis."""
    exponentials = np.exp(logits - logits.max(axis=0).astype(np.float64))
    return exponentials / exponentials.sum(axis=0)


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
