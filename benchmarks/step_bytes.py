"""The least that one step of the mean field moves through memory, beside the time that it takes.

Every array is counted once, read or written, as if all that is done in between stayed in the caches.
"""

from __future__ import annotations

import re
import time
from typing import Any

import numpy as np
from markdown_table import markdown_table

_FLOAT = 4
_LATTICE_LINK = 4  # bytes of one corner of a voxel's simplex: its vertex in the tile and its weight, 16 bits each
_COPIED = 1 << 28  # bytes, far more than caches hold


def copy_speed() -> float:
    """Bytes per second that a copy of a large array reads and writes, one thread, best of five."""
    source, target = np.ones(_COPIED // 8), np.empty(_COPIED // 8)
    seconds = []
    for _ in range(6):  # the first touches the target's memory
        start = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - start)
    return 2 * _COPIED / min(seconds[1:])


def least_bytes(workload: dict[str, Any], num_voxels: int, filters: list[str]) -> int:
    """Bytes of one step: logits and marginals, factors of the normalization, and what the appearance filter reads and fills.

    Args:
        workload: its `workload.json`.
        num_voxels: in the mask.
        filters: as `RefinementResult.filters` names them.
    """
    num_labels, num_modalities = workload["num_labels"], workload["num_modalities"]
    num_channels = num_labels - 1  # the last label's marginals follow from the others
    has_mask = workload["brain"] == "mask"
    appearance = filters[0]
    # Logits; marginals from the step before and of this one; the appearance kernel's factors, and the spatial one's, which are a product
    # of three rows without a mask.
    of_voxel = _FLOAT * (num_labels + 2 * num_channels + 1 + has_mask)
    if "lattice" in appearance:
        of_voxel += _LATTICE_LINK * (len(workload["grid_shape"]) + num_modalities + 1)
        rows = _count(appearance, "vertices")
    else:
        of_voxel += _FLOAT * num_modalities
        rows = _count(appearance, "cells") if "grid" in appearance else 0
    return of_voxel * num_voxels + 2 * _FLOAT * num_channels * rows  # written by the splat, read by the slice


def _count(description: str, what: str) -> int:
    found = re.search(rf"(\d+) {what}", description)
    if found is None:
        raise ValueError(f"{description} does not name its {what}")
    return int(found[1])


def step_table(figures: dict[str, Any]) -> str:
    """A row per workload; nothing in older records."""
    if "copy_bytes_per_second" not in figures:
        return ""
    speed, rows = figures["copy_bytes_per_second"], []
    for name, record in figures["workloads"].items():
        workload, runs = record["workload"], record["runs"]["crfrefine"]
        step = min(run["engine_seconds"]["steps"] for run in runs) / workload["num_iterations"]
        moved = least_bytes(workload, record["num_voxels"], record["filters"])
        factor = step * speed / moved
        rows.append([name, f"{1e3 * step:.0f} ms", f"{moved / 2**20:.0f} MiB", f"{1e3 * moved / speed:.1f} ms", f"{factor:.0f}×"])
    title = (
        f"One step, and the least that it moves through memory: each array once. A copy of a large array reads and writes "
        f"{speed / 1e9:.1f} GB per second:\n\n"
    )
    header = ["workload", "one step, one thread", "moves at least", "in which time, at the speed of a copy", "a step takes"]
    return title + markdown_table(header, rows) + "\n"
