"""Times and memory of the GPU engine on one workload, beside the bytes it has to move, the CPU engine, and others on the same GPU.

The others: the exact filter in plain PyTorch, and MONAI's CRF.
"""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gpu_cases import num_vertices, parameters_of, run
from numpy.typing import NDArray
from workloads import WORKLOADS, WorkloadArrays, WorkloadSpec, make

from crfrefine.engines.base import Backend
from crfrefine.engines.cuda.backend import CudaBackend
from crfrefine.engines.cuda.device import row_width
from crfrefine.engines.grid_image import GridImage
from crfrefine.parameters.specs import KernelSetSpec, KernelSpec

MORE_STEPS = 50
REPEATS, REPEATS_OF_OTHERS = 3, 5
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

    def copy() -> None:
        target[...] = source
        xp.cuda.get_current_stream().synchronize()

    return 2.0 * source.nbytes / _best(copy)


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
    can_tell = host_peak_bytes(anew=True) is not None
    with warnings.catch_warnings(record=True) as warned:
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
        "host_peak_bytes": host_peak_bytes() if can_tell else None,
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


def host_peak_bytes(*, anew: bool = False) -> int | None:
    """The most memory of the host that this process has had; None where the system does not say. With `anew` it begins again."""
    try:
        if anew:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def _best(function: Callable[[], object]) -> float:
    """Seconds of the fastest of several calls, after one that does not count."""
    function()
    times = []
    for _ in range(REPEATS_OF_OTHERS):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def torch_with_gpu() -> Any:
    """PyTorch, or a text that says why not."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return "torch is not installed"
    return torch if torch.cuda.is_available() else "torch has no GPU"


def plain_torch(gpu: Backend) -> dict[str, Any]:
    """One exact bilateral filtering in plain PyTorch, beside ours; or why there is none."""
    torch = torch_with_gpu()
    if isinstance(torch, str):
        return {"skipped": torch}
    spec = replace(WORKLOADS["S"], name="torch", grid_shape=(40, 36, 31))
    arrays = make(spec)
    values = arrays.logits - arrays.logits.mean()
    image = arrays.image.astype(np.float32) / np.float32(255.0)
    axes = np.indices(spec.grid_shape).reshape(3, -1) * (np.array(spec.spacing)[:, None] / spec.theta_alpha)
    features = torch.tensor(np.concatenate([image.reshape(1, -1) / spec.theta_beta, axes]).T, dtype=torch.float32, device="cuda")
    sent = torch.tensor(values.reshape(len(values), -1).T, dtype=torch.float32, device="cuda")

    def run_torch() -> NDArray[np.float32]:
        parts = [torch.exp(-0.5 * torch.cdist(part, features).square()) @ sent for part in features.split(4096)]
        return torch.cat(parts).T.cpu().numpy()

    def run_ours() -> NDArray[np.float32]:
        kernel = KernelSpec((spec.theta_alpha,) * 3, (spec.theta_beta,))
        kernels = KernelSetSpec((kernel,), "none", "exact", num_labels=len(values), num_iterations=1)
        return gpu.message(values, GridImage(image, None, spec.spacing), kernels).reshape(len(values), -1)

    theirs, ours = run_torch(), run_ours()
    difference = float(np.abs(theirs - ours).max() / np.abs(theirs).max())
    # cdist takes differences of large squares: 1e-3 of a sum is what float32 leaves of them.
    if difference > 1e-3:
        return {"failed": f"plain PyTorch's exact filter differs by {difference:.2g}: no time counts"}
    seconds = {"torch": _best(run_torch), "ours": _best(run_ours)}
    return {"torch": torch.__version__, "voxels": features.shape[0], "seconds": seconds, "relative_difference": difference}


def monai_crf(spec: WorkloadSpec, arrays: WorkloadArrays, our_labels: NDArray[Any]) -> dict[str, Any]:
    """Five steps of MONAI's CRF on tensors that are on the GPU already; or why there are none.

    It has no masks, counts positions in voxels, and another normalization: `labels_as_ours` says how far its result is from ours. Its
    compiled extension is not in its wheels (`BUILD_MONAI=1 pip install --no-binary monai monai`).
    """
    torch = torch_with_gpu()
    if isinstance(torch, str):
        return {"skipped": torch}
    if arrays.mask is not None:
        return {"skipped": "it has no masks"}
    try:
        importlib.import_module("monai._C")
        blocks = importlib.import_module("monai.networks.blocks")
    except ImportError as error:
        return {"skipped": f"MONAI with its compiled extension is not installed ({error})"}
    crf = blocks.CRF(
        iterations=5,
        bilateral_weight=spec.bilateral_weight,
        gaussian_weight=spec.spatial_weight,
        bilateral_spatial_sigma=spec.theta_alpha,
        bilateral_color_sigma=spec.theta_beta,
        gaussian_spatial_sigma=spec.theta_gamma,
        update_factor=1.0,
    )
    logits = torch.from_numpy(arrays.logits)[None].cuda()
    image = (torch.from_numpy(arrays.image.astype(np.float32)) / 255.0)[None].cuda()
    torch.cuda.reset_peak_memory_stats()

    def run() -> Any:
        found = crf(logits, image)
        torch.cuda.synchronize()
        return found

    try:
        labels = run()[0].argmax(0).cpu().numpy()
        seconds = _best(run)
    except RuntimeError as error:  # too many labels, features or voxels for what it was compiled for
        return {"skipped": f"MONAI's CRF fails: {str(error).splitlines()[0]}"}
    return {
        "monai": importlib.import_module("monai").__version__,
        "seconds": seconds,
        "labels_as_ours": float((labels == our_labels).mean()),
        "peak_bytes": int(torch.cuda.max_memory_allocated()),
    }
