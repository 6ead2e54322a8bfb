"""The GPU engine: checked against the CPU's first, then timed: against the bytes it has to move, the CPU engine, and others on the GPU.

`python benchmarks/gpu.py --tests --write` on a machine with a GPU and CuPy does everything, and needs nothing but this repository.
No time is taken of a result that is wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import environment
import numpy as np
from gpu_peers import monai_crf, plain_torch
from gpu_tables import tables
from peers import ROOT
from report import write_between_markers
from workloads import WORKLOADS, WorkloadArrays, WorkloadSpec, make

from crfrefine import CrfParameters
from crfrefine.engines import get_backend
from crfrefine.engines.base import Backend, MeanFieldResult
from crfrefine.engines.cpu import CpuBackend
from crfrefine.engines.cuda.backend import CudaBackend
from crfrefine.engines.cuda.device import row_width
from crfrefine.errors import BackendUnavailableError

CT = WorkloadSpec("CT", (512, 512, 400), 2, 1, theta_alpha=8.0, theta_beta=0.1, theta_gamma=3.0, spacing=(0.8, 0.8, 1.0))
SPECS = (WORKLOADS["Lm"], WORKLOADS["L"], CT)
SMALL = {"Lm": (31, 40, 27), "L": (36, 30, 25), "CT": (40, 36, 31)}
SMALLER = {"Lm": (13, 16, 11), "L": (12, 14, 10), "CT": (15, 13, 12)}  # for the reference
CPU_THREADS = 2
GPU_TESTS = (
    "test_filters.py",
    "test_mean_field.py",
    "test_backward.py",
    "test_cuda_layer.py",
    "test_cuda_gpu.py",
    "test_training_device.py",
)
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
    return backend.mean_field(arrays.logits, image, arrays.mask, spec.spacing, resolved, threads=CPU_THREADS)


def num_vertices(result: MeanFieldResult) -> int:
    """Of the lattice that the run has built."""
    found = re.search(r"(\d+) vertices", result.filters[0])
    assert found is not None
    return int(found[1])


def require(passed: bool, message: str) -> None:
    """Stop where a result is wrong."""
    if not passed:
        raise SystemExit(f"benchmark: wrong result, so its time does not count: {message}")


def compare(found: MeanFieldResult, expected: MeanFieldResult, what: str) -> float:
    """The largest difference of logits, each voxel's largest taken as zero."""
    difference = float(np.abs((found.logits - found.logits.max(axis=0)) - (expected.logits - expected.logits.max(axis=0))).max())
    require(difference <= MOST_DIFFERENCE, f"{what}: logits differ from those expected by {difference:.2g}")
    return difference


def check(gpu: Backend, cpu: Backend) -> dict[str, float]:
    """Every filter on small cases of each kind: the CPU's vertices and logits, and the same bits twice."""
    found, is_engine = {}, isinstance(cpu, CpuBackend)
    for spec in SPECS:
        small = replace(spec, name=f"{spec.name}-small", grid_shape=(SMALL if is_engine else SMALLER)[spec.name], theta_alpha=3.0)
        arrays = make(replace(small, brain="no"))
        mask = np.random.default_rng(0).random(small.grid_shape) < 0.8 if spec.brain == "mask" else None
        arrays = replace(arrays, mask=mask)
        for filter_name in ("exact", "truncated", "lattice"):
            parameters = parameters_of(small, num_iterations=5, filter_name=filter_name)
            once, twice, expected = (run(backend, small, arrays, parameters) for backend in (gpu, gpu, cpu))
            name = f"{small.name}.{filter_name}"
            require(np.array_equal(once.logits, twice.logits) and once.energy == twice.energy, f"{name}: two runs differ")
            if filter_name == "lattice" and is_engine:
                require(num_vertices(once) == num_vertices(expected), f"{name}: other vertices than the CPU's")
            found[name] = compare(once, expected, name)
    return found


def bytes_a_step(spec: WorkloadSpec, num_voxels: int, vertices: int) -> float:
    """Memory traffic of a step that cannot be avoided, each array read or written once a kernel (docs/decisions/gpu.md)."""
    corners = spec.num_modalities + len(spec.grid_shape) + 1
    width = row_width(spec.num_labels - 1)
    row = 4.0 * width
    splat = num_voxels * (6.0 * corners + row + 4.0) + vertices * row
    blur = corners * vertices * (8.0 + 2.0 * row)
    slicing = num_voxels * (6.0 * corners + 2.0 * row + 4.0) + vertices * row
    box = float(np.prod(spec.grid_shape)) if spec.brain != "mask" else num_voxels * 6.0 / np.pi
    spatial = 2.0 * len(spec.grid_shape) * box * row + num_voxels * (5.0 * row + 24.0)
    update = num_voxels * (4.0 * spec.num_labels + 4.0 * row + 12.0)
    return splat + blur + slicing + spatial + update


def copy_bandwidth(xp: Any) -> float:
    """Bytes a second that copying 1 GB on the device moves."""
    source = xp.zeros(1 << 27, dtype=np.float64)
    target = xp.empty_like(source)
    best = float("inf")
    for _ in range(5):
        xp.cuda.get_current_stream().synchronize()
        started = time.perf_counter()
        target[...] = source
        xp.cuda.get_current_stream().synchronize()
        best = min(best, time.perf_counter() - started)
    return 2.0 * source.nbytes / best


def measure(backend: Backend, spec: WorkloadSpec, arrays: WorkloadArrays, *, repeats: int, num_more: int) -> dict[str, Any]:
    """Seconds end to end with 5 steps, of building, and of a step: the difference that `num_more` more steps make."""
    run(backend, spec, arrays, parameters_of(spec, num_iterations=5))  # compilation and first allocations are not counted
    ends, steps, builds = [], {}, []
    for num_iterations in (5, 5 + num_more):
        results = []
        for _ in range(repeats):
            started = time.perf_counter()
            results.append(run(backend, spec, arrays, parameters_of(spec, num_iterations=num_iterations)))
            if num_iterations == 5:
                ends.append(time.perf_counter() - started)
        steps[num_iterations] = min(result.timings["steps"] for result in results)
        builds += [result.timings["build"] for result in results]
    return {
        "seconds": min(ends),
        "seconds_a_step": (steps[5 + num_more] - steps[5]) / num_more,
        "build_seconds": min(builds),
        "vertices": num_vertices(results[-1]),
    }


def time_workload(gpu: CudaBackend, cpu: Backend | None, spec: WorkloadSpec, device: dict[str, Any], repeats: int) -> dict[str, Any]:
    """All figures of a workload."""
    arrays, xp = make(spec), gpu.device.xp
    pool = xp.get_default_memory_pool()
    pool.free_all_blocks()
    found = measure(gpu, spec, arrays, repeats=repeats, num_more=50)
    num_voxels = int(arrays.mask.sum()) if arrays.mask is not None else arrays.logits[0].size
    floor = bytes_a_step(spec, num_voxels, found["vertices"]) / device["copy_bytes_a_second"]
    found |= {
        "grid_shape": list(spec.grid_shape),
        "voxels": num_voxels,
        "floor_seconds_a_step": floor,
        "times_the_floor": found["seconds_a_step"] / floor,
        "peak_bytes": int(pool.total_bytes()),
    }
    ours = run(gpu, spec, arrays, parameters_of(spec, num_iterations=5)).logits.argmax(axis=0)
    pool.free_all_blocks()  # for those who have a pool of their own
    found["monai"] = monai_crf(spec, arrays, ours)
    if cpu is not None:
        found["cpu"] = measure(cpu, spec, arrays, repeats=1, num_more=5)
    return found


def describe_gpu(xp: Any) -> dict[str, Any]:
    """What the figures belong to."""
    properties = xp.cuda.runtime.getDeviceProperties(xp.cuda.Device().id)
    return {
        "gpu": properties["name"].decode(),
        "memory_gib": round(properties["totalGlobalMem"] / 2**30, 1),
        "driver": xp.cuda.runtime.driverGetVersion(),
        "runtime": xp.cuda.runtime.runtimeGetVersion(),
        "cupy": xp.__version__,
        "copy_bytes_a_second": copy_bandwidth(xp),
    }


def run_tests() -> None:
    """The tests that need a GPU; stop where one fails or has not run."""
    # Other people's warnings are their own business: which there are depends on what else is installed.
    warned = ["-W", "default", "-W", "error::RuntimeWarning"]
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-k", "cuda and not shim", "-p", "no:cacheprovider", *warned]
    done = subprocess.run([*command, *(f"tests/{name}" for name in GPU_TESTS)], cwd=ROOT, capture_output=True, text=True, check=False)
    sys.stderr.write(done.stdout[-4000:] + done.stderr[-2000:])
    missed = re.findall(r"^SKIPPED .*(?:no NVIDIA GPU|needs a GPU|needs PyTorch|needs a PyTorch|needs CuPy).*", done.stdout, re.MULTILINE)
    require(done.returncode == 0 and not missed, f"a test fails, or has not run: {missed[:3]}")


def yardstick() -> Backend:
    """What results are compared with: the CPU engine, or where it was not built the slow reference, on smaller cases."""
    try:
        return get_backend("cpu")
    except BackendUnavailableError as error:
        sys.stderr.write(f"  {error}: compared with the reference instead; no times of the CPU\n")
        return get_backend("reference")


def main() -> None:
    """Check, time, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write; without it, the record goes to the standard output")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tests", action="store_true", help="run the tests that need a GPU first")
    parser.add_argument("--write", action="store_true", help="write gpu_benchmarks.json and its section of benchmarks.md in docs/reference")
    parser.add_argument("--check-only", action="store_true", help="no times")
    names = [spec.name for spec in SPECS]
    parser.add_argument("--workloads", nargs="+", choices=names, default=names, help="which ones to time; the default is all")
    parser.add_argument("--no-cpu", action="store_true", help="do not time the CPU engine")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    try:
        gpu = get_backend(options.device)
    except BackendUnavailableError as error:
        raise SystemExit(f"benchmark: nothing to measure: {error}") from error
    assert isinstance(gpu, CudaBackend)
    cpu = yardstick()
    if options.tests:
        run_tests()
    record: dict[str, Any] = {"environment": environment.describe(), "cpu_threads": CPU_THREADS, "check": check(gpu, cpu)}
    record["compared_with"] = "CPU engine" if isinstance(cpu, CpuBackend) else "reference"
    times_cpu = isinstance(cpu, CpuBackend) and not options.no_cpu
    sys.stderr.write(f"  {len(record['check'])} results agree with those of the {record['compared_with']}\n")
    if not options.check_only:
        xp = gpu.device.xp
        record["device"], record["plain_torch"], record["workloads"] = describe_gpu(xp), plain_torch(gpu), {}
        for spec in (spec for spec in SPECS if spec.name in options.workloads):
            record["workloads"][spec.name] = found = time_workload(gpu, cpu if times_cpu else None, spec, record["device"], options.repeats)
            sys.stderr.write(f"  {spec.name}: {json.dumps(found)}\n")
    text = json.dumps(record, indent=1) + "\n"
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")
    elif not options.write:
        sys.stdout.write(text)
    if options.write and "workloads" in record:
        (ROOT / "docs" / "reference" / "gpu_benchmarks.json").write_text(text, encoding="utf-8")
        write_between_markers(ROOT / "docs" / "reference" / "benchmarks.md", "gpu", tables(record))


if __name__ == "__main__":
    main()
