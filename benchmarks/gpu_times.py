"""Times and memory of the GPU engine on one workload, beside the bytes it has to move, the CPU engine and others on the same GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gpu_cases import num_vertices, parameters_of, run
from gpu_peers import monai_crf
from workloads import WorkloadArrays, WorkloadSpec, make

from crfrefine.engines.base import Backend
from crfrefine.engines.cuda.backend import CudaBackend
from crfrefine.engines.cuda.device import row_width

MORE_STEPS = 50
STAGES = ("upload", "build", "steps", "download")
_HERE = Path(__file__).resolve().parent


def bytes_a_step(spec: WorkloadSpec, num_voxels: int, vertices: int) -> float:
    """Memory traffic of a step that cannot be avoided, each array read or written once a kernel (docs/decisions/gpu.md)."""
    corners = spec.num_modalities + len(spec.grid_shape) + 1
    width = row_width(spec.num_labels - 1)
    row = 4.0 * width
    splat = num_voxels * (8.0 * corners + row) + vertices * row
    blur = corners * vertices * (8.0 + 2.0 * row)
    slicing = num_voxels * (6.0 * corners + 4.0) + vertices * row  # in the update, to which the spatial kernel hands its message
    box = float(np.prod(spec.grid_shape)) if spec.brain != "mask" else num_voxels * 6.0 / np.pi
    numbers = 8.0 * box if spec.brain == "mask" else 0.0
    spatial = 2.0 * (len(spec.grid_shape) - 1.0) * box * row + num_voxels * (2.0 * row + 8.0) + numbers
    update = num_voxels * (4.0 * spec.num_labels + 3.0 * row + 12.0)
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


def measure(backend: Backend, spec: WorkloadSpec, arrays: WorkloadArrays, *, repeats: int) -> dict[str, Any]:
    """Seconds end to end with 5 steps, of each stage, and of a step: the difference that many more steps make.

    The device is waited for at the end of each stage.
    """
    run(backend, spec, arrays, parameters_of(spec, num_iterations=5))  # compilation and first allocations are not counted
    ends, results = [], {}
    for num_iterations in (5, 5 + MORE_STEPS):
        results[num_iterations] = []
        for _ in range(repeats):
            started = time.perf_counter()
            results[num_iterations].append(run(backend, spec, arrays, parameters_of(spec, num_iterations=num_iterations)))
            if num_iterations == 5:
                ends.append(time.perf_counter() - started)
    few, many = (min(result.timings["steps"] for result in found) for found in results.values())
    stages = {stage: min(result.timings[stage] for result in results[5]) for stage in STAGES}
    return {
        "seconds": min(ends),
        "stage_seconds": stages,
        "seconds_a_step": (many - few) / MORE_STEPS,
        "vertices": num_vertices(results[5][0]),
        "filters": list(results[5][0].filters),
    }


def measure_cpu(cpu: Backend, spec: WorkloadSpec, arrays: WorkloadArrays) -> dict[str, Any]:
    """Seconds of one run with 5 steps, which is long enough to need no repetition."""
    started = time.perf_counter()
    result = run(cpu, spec, arrays, parameters_of(spec, num_iterations=5))
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "stage_seconds": dict(result.timings), "seconds_a_step": result.timings["steps"] / 5}


def time_workload(
    gpu: CudaBackend, cpu: Backend | None, spec: WorkloadSpec, *, repeats: int, keep: Callable[[dict[str, Any]], None]
) -> None:
    """All figures of a workload; `keep` is called with those so far, whenever there are more."""
    arrays, xp = make(spec), gpu.device.xp
    pool = xp.get_default_memory_pool()
    pool.free_all_blocks()
    bandwidth = copy_bandwidth(xp)
    pool.free_all_blocks()
    with warnings.catch_warnings(record=True) as warned, _HostMemory(xp) as host:
        warnings.simplefilter("always", RuntimeWarning)
        found = measure(gpu, spec, arrays, repeats=repeats)
    num_voxels = int(arrays.mask.sum()) if arrays.mask is not None else arrays.logits[0].size
    floor = bytes_a_step(spec, num_voxels, found["vertices"]) / bandwidth
    found |= {
        "grid_shape": list(spec.grid_shape),
        "voxels": num_voxels,
        "copy_bytes_a_second": bandwidth,
        "floor_seconds_a_step": floor,
        "times_the_floor": found["seconds_a_step"] / floor,
        "peak_bytes": int(pool.total_bytes()),
        "host_peak_bytes": host.peak_bytes,
        "pinned_bytes": host.pinned_bytes,
        "warnings": [str(warning.message) for warning in warned],
    }
    keep(found)
    found["compile"] = compile_times(spec)
    keep(found)
    ours = run(gpu, spec, arrays, parameters_of(spec, num_iterations=5)).logits.argmax(axis=0)
    pool.free_all_blocks()  # for those who have a pool of their own
    found["monai"] = monai_crf(spec, arrays, ours)
    keep(found)
    if cpu is not None:
        found["cpu"] = measure_cpu(cpu, spec, arrays)
        keep(found)


class _HostMemory:
    """The most memory of the host that this process has while it is measured, and what CuPy page-locks meanwhile.

    Attributes:
        peak_bytes: the former, with the arrays that were there before; None where the system does not say.
        pinned_bytes: the latter, as asked for by CuPy.
    """

    def __init__(self, xp: Any) -> None:
        self._xp = xp
        self.peak_bytes: int | None = None
        self.pinned_bytes = 0

    def __enter__(self) -> _HostMemory:
        pool = self._xp.get_default_pinned_memory_pool()
        pool.free_all_blocks()

        def allocate(num_bytes: int) -> Any:
            self.pinned_bytes += num_bytes
            return pool.malloc(num_bytes)

        self._xp.cuda.set_pinned_memory_allocator(allocate)
        self._resets = True
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        except OSError:
            self._resets = False
        return self

    def __exit__(self, *_: object) -> None:
        self._xp.cuda.set_pinned_memory_allocator(self._xp.get_default_pinned_memory_pool().malloc)
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        peak = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None)
        if self._resets and peak is not None:
            self.peak_bytes = 1024 * int(peak)


_compiled: dict[tuple[object, ...], dict[str, Any]] = {}


def compile_times(spec: WorkloadSpec) -> dict[str, Any]:
    """Seconds of a first run in a process of its own, with an empty cache of compiled kernels and with the cache that this leaves.

    On a small case of the kind: its kernels are those of the large one. Cases whose kernels are the same are measured once.
    """
    key = len(spec.grid_shape), spec.num_labels, spec.num_modalities, spec.brain
    if key not in _compiled:
        with tempfile.TemporaryDirectory() as cache:
            places = {"CUPY_CACHE_DIR": f"{cache}/cupy", "CUDA_CACHE_PATH": f"{cache}/driver"}
            empty, filled = (_first_run(spec.name, {**os.environ, **places}) for _ in range(2))
            size = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
        _compiled[key] = {"empty_cache": empty, "filled_cache": filled, "cache_bytes": size}
    return _compiled[key]


def _first_run(name: str, environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, str(_HERE / "gpu_first_refine.py"), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        return {"failed": done.stderr[-2000:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
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
    }
