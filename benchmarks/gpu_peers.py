"""What others do on the same GPU: the exact filter in plain PyTorch, and MONAI's CRF."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from workloads import WORKLOADS, WorkloadArrays, WorkloadSpec, make

from crfrefine.engines.base import Backend
from crfrefine.specs import KernelSetSpec, KernelSpec

REPEATS = 5


def _best(function: Callable[[], object], repeats: int = REPEATS) -> float:
    """Seconds of the fastest of several calls, after one that does not count."""
    function()
    times = []
    for _ in range(repeats):
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
        return gpu.message(values, image, None, spec.spacing, kernels).reshape(len(values), -1)

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
