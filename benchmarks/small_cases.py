"""Cases of some thousand voxels, small enough for dense matrices: cut from larger workloads, whose smooth noise they keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from workloads import WorkloadArrays, WorkloadSpec, make

WHOLE_SHAPES = {2: (150, 120), 3: (52, 66, 44)}
SMALLEST_SHARE = 0.05  # of a case's voxels in each label


def cut(spec: WorkloadSpec, shapes: Sequence[tuple[int, ...]], seed: int) -> list[WorkloadArrays]:
    """Parts with these shapes of one larger case, each from another place where all labels meet; the spec's own shape does not count."""
    whole_shape = WHOLE_SHAPES[len(spec.spacing)]
    whole = make(replace(spec, grid_shape=whole_shape))
    rng = np.random.default_rng(seed)
    parts = []
    for shape in shapes:
        while True:
            corner = [int(rng.integers(n - extent + 1)) for n, extent in zip(whole_shape, shape, strict=True)]
            box = tuple(slice(begin, begin + extent) for begin, extent in zip(corner, shape, strict=True))
            labels = whole.labels[box]
            if np.bincount(labels.ravel(), minlength=spec.num_labels).min() >= SMALLEST_SHARE * labels.size:
                break
        channels = (slice(None), *box)
        parts.append(
            WorkloadArrays(np.ascontiguousarray(whole.image[channels]), np.ascontiguousarray(whole.logits[channels]), None, labels)
        )
    return parts
