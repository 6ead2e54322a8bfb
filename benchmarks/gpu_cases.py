"""The cases that the GPU engine is measured on, and the comparison with another engine that comes before any time."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from workloads import WORKLOADS, WorkloadArrays, WorkloadSpec, make

from crfrefine import CrfParameters
from crfrefine.engines.base import Backend, MeanFieldResult
from crfrefine.engines.cpu import CpuBackend
from crfrefine.engines.cuda.grid import MOST_MODALITIES

CT = WorkloadSpec("CT", (512, 512, 400), 2, 1, theta_alpha=8.0, theta_beta=0.1, theta_gamma=3.0, spacing=(0.8, 0.8, 1.0))
# The bandwidths of the default preset, which are about those that are learned from real cases.
REAL = replace(WORKLOADS["Lm"], name="Lm-1.5mm", theta_alpha=1.5, theta_beta=0.05, theta_gamma=1.0)
SPECS = {spec.name: spec for spec in (WORKLOADS["Lm"], WORKLOADS["L"], WORKLOADS["Lm-mid"], WORKLOADS["Lm-fine"], REAL, CT)}
SMALL = {"Lm": (31, 40, 27), "L": (36, 30, 25), "CT": (40, 36, 31)}
SMALLER = {"Lm": (13, 16, 11), "L": (12, 14, 10), "CT": (15, 13, 12)}  # for the reference
CPU_THREADS = 2
# float32 logits of size 10 after five steps whose messages are summed in another order.
MOST_DIFFERENCE = 1e-3


def parameters_of(spec: WorkloadSpec, *, num_iterations: int, filter_name: str = "lattice") -> CrfParameters:
    """The workload's model, all steps taken."""
    return CrfParameters().replace(
        **{
            "bilateral.weight": spec.bilateral_weight,
            "bilateral.theta_alpha": spec.theta_alpha,
            "bilateral.theta_beta": spec.theta_beta,
            "spatial.weight": spec.spatial_weight,
            "spatial.theta_gamma": spec.theta_gamma,
            "mean_field.num_iterations": num_iterations,
            "mean_field.tolerance": 0.0,
            "mean_field.filter": filter_name,
        }
    )


def run(backend: Backend, spec: WorkloadSpec, arrays: WorkloadArrays, parameters: CrfParameters) -> MeanFieldResult:
    """One mean field from the host's arrays to the host's logits."""
    image = arrays.image.astype(np.float32) / np.float32(255.0)
    resolved = parameters.resolve(spec.num_labels, spec.num_modalities, len(spec.grid_shape))
    result = backend.mean_field(arrays.logits, image, arrays.mask, spec.spacing, resolved, threads=CPU_THREADS)
    _ = result.logits  # A GPU keeps them until they are asked for.
    return result


def num_vertices(result: MeanFieldResult) -> int:
    """Of the lattice that the run has built."""
    found = re.search(r"(\d+) vertices", result.filters[0])
    assert found is not None
    return int(found[1])


def small(spec: WorkloadSpec, shape: tuple[int, ...]) -> tuple[WorkloadSpec, WorkloadArrays]:
    """The same kind of case on a small grid, with a mask of scattered voxels where the large one has a mask."""
    found = replace(spec, name=f"{spec.name}-small", grid_shape=shape, theta_alpha=3.0)
    mask = np.random.default_rng(0).random(shape) < 0.8 if spec.brain == "mask" else None
    return found, replace(make(replace(found, brain="no")), mask=mask)


def check(gpu: Backend, expected: Backend, keep: Callable[[dict[str, Any]], None]) -> None:
    """Every filter on small cases of each kind: the CPU's vertices and logits, the same bits twice, and no warning.

    Each is tried, whatever comes of the others: its entry has the largest difference of a logit, or what is wrong. `keep` is called
    with the entries so far.
    """
    is_engine = isinstance(expected, CpuBackend)
    found: dict[str, dict[str, Any]] = {}
    for name, shape in (SMALL if is_engine else SMALLER).items():
        spec, arrays = small(SPECS[name], shape)
        has_grid = is_engine and spec.num_modalities <= MOST_MODALITIES  # the reference has no grid
        for filter_name in ("exact", "truncated", *(["grid"] if has_grid else []), "lattice"):
            parameters = parameters_of(spec, num_iterations=5, filter_name=filter_name)
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always", RuntimeWarning)
                try:
                    entry = _compare(*(run(backend, spec, arrays, parameters) for backend in (gpu, gpu, expected)), is_engine=is_engine)
                except Exception:  # of a driver or a compiler: what it says is what the record is for
                    entry = {"failed": traceback.format_exc(limit=-6)}
            texts = [str(warning.message) for warning in warned if issubclass(warning.category, RuntimeWarning)]
            if texts:
                entry = {**entry, "failed": "; ".join([*filter(None, [entry.get("failed")]), *texts])}
            found[f"{spec.name}.{filter_name}"] = entry
            keep(found)


def _compare(once: MeanFieldResult, twice: MeanFieldResult, expected: MeanFieldResult, *, is_engine: bool) -> dict[str, Any]:
    difference = largest_difference(once, expected)
    entry: dict[str, Any] = {"difference": difference}
    if not difference <= MOST_DIFFERENCE:
        entry["failed"] = f"logits differ from those expected by {difference:.2g}"
    elif not (np.array_equal(once.logits, twice.logits) and once.energy == twice.energy):
        entry["failed"] = "two runs differ"
    elif is_engine and "vertices" in once.filters[0] and num_vertices(once) != num_vertices(expected):
        entry["failed"] = f"{num_vertices(once)} vertices, not the CPU's {num_vertices(expected)}"
    return entry


def largest_difference(found: MeanFieldResult, expected: MeanFieldResult) -> float:
    """Of logits, each voxel's largest taken as zero."""
    return float(np.abs((found.logits - found.logits.max(axis=0)) - (expected.logits - expected.logits.max(axis=0))).max())
