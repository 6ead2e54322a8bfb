"""The cases that the GPU engine is measured on, and the comparison with another engine that comes before any time."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
from workloads import WORKLOADS, WorkloadArrays, WorkloadSpec, make

from crfrefine import CrfParameters
from crfrefine.engines.base import Backend, MeanFieldResult

CT = WorkloadSpec("CT", (512, 512, 400), 2, 1, theta_alpha=8.0, theta_beta=0.1, theta_gamma=3.0, spacing=(0.8, 0.8, 1.0))
# The bandwidths of the default preset, which are about those that are learned from real cases.
REAL = replace(WORKLOADS["Lm"], name="Lm-1.5mm", theta_alpha=1.5, theta_beta=0.05, theta_gamma=1.0)
SPECS = {spec.name: spec for spec in (WORKLOADS["Lm"], WORKLOADS["L"], WORKLOADS["Lm-mid"], WORKLOADS["Lm-fine"], REAL, CT)}
SMALL = {"Lm": (31, 40, 27), "L": (36, 30, 25), "CT": (40, 36, 31)}
KIND_OF = {name: "Lm" if spec.brain == "mask" else "CT" if name == "CT" else "L" for name, spec in SPECS.items()}
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


def num_vertices(result: MeanFieldResult) -> int | None:
    """Of the lattice that the run has built; None: it has built none."""
    found = re.search(r"(\d+) vertices", result.filters[0])
    return None if found is None else int(found[1])


def small(spec: WorkloadSpec, shape: tuple[int, ...]) -> tuple[WorkloadSpec, WorkloadArrays]:
    """The same kind of case on a small grid, with a mask of scattered voxels where the large one has a mask."""
    found = replace(spec, name=f"{spec.name}-small", grid_shape=shape, theta_alpha=3.0)
    mask = np.random.default_rng(0).random(shape) < 0.8 if spec.brain == "mask" else None
    return found, replace(make(replace(found, brain="no")), mask=mask)


def contact(gpu: Backend, cpu: Backend, kind: str, filter_name: str) -> dict[str, Any]:
    """A small case against the CPU: its vertices and logits, the same bits twice, and no warning.

    Returns:
        The largest difference of a logit, and what is wrong, if anything is.
    """
    spec, arrays = small(SPECS[kind], SMALL[kind])
    parameters = parameters_of(spec, num_iterations=5, filter_name=filter_name)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", RuntimeWarning)
        entry = _compare(*(run(backend, spec, arrays, parameters) for backend in (gpu, gpu, cpu)))
    texts = [str(warning.message) for warning in warned if issubclass(warning.category, RuntimeWarning)]
    return {**entry, "failed": "; ".join([*filter(None, [entry.get("failed")]), *texts])} if texts else entry


def _compare(once: MeanFieldResult, twice: MeanFieldResult, expected: MeanFieldResult) -> dict[str, Any]:
    difference = largest_difference(once, expected)
    entry: dict[str, Any] = {"difference": difference}
    if not difference <= MOST_DIFFERENCE:
        entry["failed"] = f"logits differ from those expected by {difference:.2g}"
    elif not (np.array_equal(once.logits, twice.logits) and once.energy == twice.energy):
        entry["failed"] = "two runs differ"
    elif "vertices" in once.filters[0] and num_vertices(once) != num_vertices(expected):
        entry["failed"] = f"{num_vertices(once)} vertices, not the CPU's {num_vertices(expected)}"
    return entry


def largest_difference(found: MeanFieldResult, expected: MeanFieldResult) -> float:
    """Of logits, each voxel's largest taken as zero."""
    return float(np.abs((found.logits - found.logits.max(axis=0)) - (expected.logits - expected.logits.max(axis=0))).max())
