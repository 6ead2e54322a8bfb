"""Suite `steps`: seconds of building a model's kernels, of a step forth, and of a step back with more and more gradients."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from peers import BENCH
from workers.measure import Workload
from workloads import WORKLOADS, WorkloadSpec, store

from crfrefine.engines import get_backend
from crfrefine.parameters.specs import KernelSetSpec, KernelSpec, MeanFieldSpec

TRUNCATED = WorkloadSpec(
    "layer-truncated", (60, 60, 50), 3, 1, theta_alpha=1.5, theta_beta=0.1, theta_gamma=2.0, spacing=(1.0, 1.0, 1.2), peers=()
)
CASES = ((WORKLOADS["Lm"], "auto"), (TRUNCATED, "truncated"))
BACKWARD = {
    "logits, weights": {"wants_theta": False, "wants_image": False},
    "and bandwidths": {"wants_theta": True, "wants_image": False},
    "and image": {"wants_theta": True, "wants_image": True},
}


def _seconds(call: Callable[..., Any], *arguments: Any, **more: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call(*arguments, **more)
    return time.perf_counter() - start, result


def _measure(spec: WorkloadSpec, filter_name: str, rounds: int, threads: int) -> dict[str, Any]:
    workload = Workload(store(spec, BENCH / "data"))
    image = workload.image.astype(np.float32) / np.float32(255.0)
    num_axes = len(spec.spacing)
    kernels_wanted = KernelSpec((spec.theta_alpha,) * num_axes, (spec.theta_beta,) * len(image)), KernelSpec((spec.theta_gamma,) * num_axes)
    wanted = KernelSetSpec(kernels_wanted, "symmetric", filter_name, spec.num_labels, spec.num_iterations)
    weights = np.repeat([[spec.bilateral_weight], [spec.spatial_weight]], spec.num_labels, axis=1)
    run = MeanFieldSpec(weights, 1.0 - np.eye(spec.num_labels), spec.num_iterations)
    gradient = np.random.default_rng(0).standard_normal(workload.logits.shape, dtype=np.float32)
    runs: dict[str, list[float]] = {name: [] for name in ("build", "forward", *BACKWARD)}
    for turn in range(rounds):
        seconds, kernels = _seconds(
            get_backend("cpu").kernels,
            image,
            workload.mask,
            spec.spacing,
            wanted,
            threads=threads,
        )
        runs["build"].append(seconds)
        seconds, tape = _seconds(kernels.forward, workload.logits, run)
        runs["forward"].append(seconds)
        found = []
        for name, wants in BACKWARD.items():
            seconds, gradients = _seconds(kernels.backward, tape, workload.logits, gradient, run, **wants)
            runs[name].append(seconds)
            found.append(gradients.logits)
        if not all(np.array_equal(found[0], other) for other in found):
            raise SystemExit("benchmark: the logits' gradient depends on which others are wanted")
        line = ", ".join(f"{name} {values[-1]:.3f} s" for name, values in runs.items())
        sys.stderr.write(f"  {spec.name} {turn + 1}: {line}\n")
    return {
        "workload": asdict(spec),
        "num_voxels": kernels.num_voxels,
        "filters": list(kernels.filters),
        "seconds": {name: min(values) for name, values in runs.items()},
        "runs": runs,
    }


def run(*, quick: bool, threads: int) -> dict[str, Any]:
    """Best of five rounds (of one when quick), each of them everything once."""
    cases = {spec.name: _measure(spec, filter_name, 1 if quick else 5, threads) for spec, filter_name in CASES}
    return {"threads": threads, "cases": cases}
