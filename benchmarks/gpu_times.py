"""Times and memory of the GPU engine on one workload, beside the bytes it has to move, the CPU engine and others on the same GPU."""

from __future__ import annotations

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
REPEATS = 3
STAGES = ("upload", "build", "steps", "download")


def bytes_a_step(spec: WorkloadSpec, num_voxels: int, vertices: int) -> float:
    """Memory traffic of a step that cannot be avoided, each array read or written once a kernel (docs/decisions/gpu.md)."""
    corners = spec.num_modalities + len(spec.grid_shape) + 1
    width = row_width(spec.num_labels - 1)
    row = 4.0 * width
    splat = num_voxels * (6.0 * corners + row + 4.0) + vertices * (row + 8.0)
    blur = corners * vertices * (8.0 + 2.0 * row)
    slicing = num_voxels * (6.0 * corners + row + 4.0) + vertices * row
    box = float(np.prod(spec.grid_shape)) if spec.brain != "mask" else num_voxels * 6.0 / np.pi
    numbers = 4.0 * len(spec.grid_shape) * box if spec.brain == "mask" else 0.0
    spatial = 2.0 * (len(spec.grid_shape) - 1.0) * box * row + num_voxels * (3.0 * row + 8.0) + numbers
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


def measure(backend: Backend, spec: WorkloadSpec, arrays: WorkloadArrays, filter_name: str) -> dict[str, Any]:
    """Seconds end to end with 5 steps, of each stage, and of a step: the difference that many more steps make.

    The device is waited for at the end of each stage.
    """
    started = time.perf_counter()
    run(backend, spec, arrays, parameters_of(spec, num_iterations=5, filter_name=filter_name))
    first = time.perf_counter() - started  # with first allocations, and compilation as far as the small case left any
    ends, results = [], {}
    for num_iterations in (5, 5 + MORE_STEPS):
        results[num_iterations] = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            parameters = parameters_of(spec, num_iterations=num_iterations, filter_name=filter_name)
            results[num_iterations].append(run(backend, spec, arrays, parameters))
            if num_iterations == 5:
                ends.append(time.perf_counter() - started)
    few, many = (min(result.timings["steps"] for result in found) for found in results.values())
    stages = {stage: min(result.timings[stage] for result in results[5]) for stage in STAGES}
    return {
        "seconds": min(ends),
        "first_seconds": first,
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


def time_workload(gpu: CudaBackend, cpu: Backend, spec: WorkloadSpec, filter_name: str, *, keep: Callable[[dict[str, Any]], None]) -> None:
    """All figures of a workload; `keep` is called with more of them as they come."""
    arrays, xp = make(spec), gpu.device.xp
    pool = xp.get_default_memory_pool()
    pool.free_all_blocks()
    bandwidth = copy_bandwidth(xp)
    pool.free_all_blocks()
    with warnings.catch_warnings(record=True) as warned, _HostMemory(xp) as host:
        warnings.simplefilter("always", RuntimeWarning)
        found = measure(gpu, spec, arrays, filter_name)
    num_voxels = int(arrays.mask.sum()) if arrays.mask is not None else arrays.logits[0].size
    if found["vertices"] is not None:
        floor = bytes_a_step(spec, num_voxels, found["vertices"]) / bandwidth
        found |= {"floor_seconds_a_step": floor, "times_the_floor": found["seconds_a_step"] / floor}
    found |= {
        "grid_shape": list(spec.grid_shape),
        "voxels": num_voxels,
        "copy_bytes_a_second": bandwidth,
        "peak_bytes": int(pool.total_bytes()),
        "host_peak_bytes": host.peak_bytes,
        "pinned_bytes": host.pinned_bytes,
        "warnings": [str(warning.message) for warning in warned],
    }
    keep(found)
    if filter_name != "lattice":
        return
    ours = run(gpu, spec, arrays, parameters_of(spec, num_iterations=5)).logits.argmax(axis=0)
    pool.free_all_blocks()  # for those who have a pool of their own
    keep({"monai": monai_crf(spec, arrays, ours)})
    if spec.brain == "mask":  # on more voxels the CPU would take the time of other steps
        keep({"cpu": measure_cpu(cpu, spec, arrays)})


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
