"""The GPU engine beside its peers on one GPU: agreement first, then time, in lines of JSON.

Each row runs in a process of its own, at most `--limit` seconds. Peers are MONAI's `PHLFilter` (if
MONAI is installed with its compiled extensions) and the `torch` engine on the same GPU; commands
are measured beside `--device cpu`. Times are the best of three after a first call, with tensors on
the GPU; peaks are those of PyTorch's allocator, which the engine uses, too.

    gpu_peers.py                     # every row, within six minutes on an H100
    gpu_peers.py --rows crf-S filter-4-2
    gpu_peers.py --device cpu --points 20000 --rows filter-4-2    # a trial without a GPU
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scripts import DATA, case_names, new_parser

MAX_DIFFERENCE = 1e-3
"""Of the largest value, between the engines of GPU and CPU."""

Line = dict[str, Any]


def _best(function: Callable[[], object], device: str) -> Line:
    """Seconds and peak of the best of three calls after a first one."""
    import torch

    is_gpu = device != "cpu"
    first = time.perf_counter()
    function()
    if is_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    first = time.perf_counter() - first
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        function()
        if is_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    line = {"ms": round(1e3 * min(seconds), 3), "first_ms": round(1e3 * first, 1)}
    if is_gpu:
        peak = torch.cuda.max_memory_allocated() - before
        line["peak_mib"] = round(peak / 2**20, 1)
    return line


def _difference(found: Any, expected: Any) -> float:
    """Largest difference of two tensors, as a share of the largest value."""
    found, expected = (tensor.detach().double().cpu() for tensor in (found, expected))
    return float((found - expected).abs().max() / expected.abs().max())


# ---- The filter of points


def _points(num_points: int, num_features: int, num_values: int, device: str) -> tuple[Any, Any]:
    """Values (1, V, N) and features (1, N, D) of points about as dense as voxels."""
    import torch

    generator = torch.Generator().manual_seed(0)
    values = torch.rand(1, num_values, num_points, generator=generator)
    features = 3.0 * torch.rand(1, num_points, num_features, generator=generator)
    return values.to(device), features.to(device)


def _phl_filter() -> Any:
    """MONAI's lattice; None without its compiled extension."""
    with contextlib.suppress(ImportError):
        from monai.networks.layers import PHLFilter
        from monai.utils import optional_import

        _, is_compiled = optional_import("monai._C")
        if is_compiled:
            return PHLFilter
    return None


def measure_filter(options: Namespace, num_features: int, num_values: int) -> Iterator[Line]:
    """`gaussian_filter`, forward, then forward and backward."""
    import torch

    from crfrefine.layer.functional import gaussian_filter

    def with_gradients(values: Any, features: Any) -> tuple[Any, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in (values, features)]
        result = gaussian_filter(*leaves, method="lattice")
        return result.detach(), *torch.autograd.grad(result.square().sum(), leaves)

    small = _points(4000, num_features, num_values, "cpu")
    expected = with_gradients(*small)
    found = with_gradients(*(tensor.to(options.device) for tensor in small))
    differences = [_difference(*pair) for pair in zip(found, expected, strict=True)]
    yield {"what": "agreement with the CPU engine", "differences": differences}
    if max(differences) > MAX_DIFFERENCE:
        raise SystemExit(f"the small case is wrong: {differences}")

    values, features = _points(options.points, num_features, num_values, options.device)
    forward = _best(lambda: gaussian_filter(values, features, method="lattice"), options.device)
    yield {"what": "gaussian_filter", **forward}
    both = _best(lambda: with_gradients(values, features), options.device)
    yield {"what": "gaussian_filter, forward and backward", **both}

    phl_filter = _phl_filter()
    if phl_filter is None or options.device == "cpu":
        return
    points = features.transpose(1, 2).contiguous()
    own = gaussian_filter(values, features, method="lattice", normalization="after")
    theirs = phl_filter.apply(values, points)
    difference = (own - theirs).square().mean().sqrt()
    yield {"what": "root mean square from MONAI's means", "value": float(difference)}
    yield {"what": "MONAI PHLFilter", **_best(lambda: phl_filter.apply(values, points), "cuda")}


# ---- The CRF


def measure_crf(options: Namespace, workload: str, filter_name: str) -> Iterator[Line]:
    """`CrfRnn`, kernels included, forward, then forward and backward."""
    import torch
    from workers.measure import model_entries, unit_image
    from workloads import WORKLOADS, make

    from crfrefine import CrfParameters, CrfRnn

    spec = WORKLOADS[workload]
    entries = model_entries(vars(spec), filter_name) | {"intensity.normalization": "none"}
    parameters = CrfParameters().replace(**entries)

    def layer_on(device: str) -> Any:
        layer = CrfRnn(spec.num_labels, spec.num_modalities, 3, parameters=parameters)
        return layer.to(device)

    arrays = make(spec)
    logits = torch.from_numpy(arrays.logits)[None]
    image = torch.from_numpy(unit_image(arrays.image))[None]
    corner = (slice(None), slice(None), *(slice(extent // 3) for extent in spec.grid_shape))
    refined = []
    for device in ("cpu", options.device):
        with torch.no_grad():
            layer = layer_on(device)
            tensors = (logits[corner].to(device), image[corner].to(device))
            refined.append(layer(*tensors, spacing=spec.spacing))
    difference = _difference(*refined)
    yield {"what": "agreement with the CPU engine", "differences": [difference]}
    if filter_name != "auto" and difference > MAX_DIFFERENCE:
        raise SystemExit(f"the small case is wrong: {difference}")

    logits = logits.to(options.device)
    image = image.to(options.device)
    layer = layer_on(options.device)

    def forward() -> Any:
        with torch.no_grad():
            return layer(logits, image, spacing=spec.spacing)

    def both() -> Any:
        leaf = logits.detach().requires_grad_()
        layer.zero_grad()
        layer(leaf, image, spacing=spec.spacing).square().mean().backward()
        return leaf.grad

    yield {"what": "CrfRnn", **_best(forward, options.device)}
    yield {"what": "CrfRnn, forward and backward", **_best(both, options.device)}
    phl_filter = _phl_filter()
    if phl_filter is not None and options.device != "cpu":
        yield {"what": "MONAI CRF's loop", **_best(_monai_loop(spec, logits, image), "cuda")}


def _monai_loop(spec: Any, logits: Any, image: Any) -> Callable[[], Any]:
    """MONAI's CRF with a spacing: the update of its `CRF`, with features in mm."""
    import torch
    from monai.networks.layers import PHLFilter

    axes = []
    for extent, step in zip(spec.grid_shape, spec.spacing, strict=True):
        axes.append(torch.arange(extent, device=logits.device, dtype=torch.float32) * step)
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]
    bilateral = torch.cat([positions / spec.theta_alpha, image / spec.theta_beta], 1)
    spatial = (positions / spec.theta_gamma).contiguous()
    compatibility = 1.0 - torch.eye(spec.num_labels, device=logits.device)

    def run() -> Any:
        with torch.no_grad():
            marginals = logits.softmax(1)
            for _ in range(spec.num_iterations):
                message = spec.bilateral_weight * PHLFilter.apply(marginals, bilateral)
                message += spec.spatial_weight * PHLFilter.apply(marginals, spatial)
                update = torch.einsum("bk...,kl->bl...", message, compatibility)
                marginals = (logits - update).softmax(1)
            return marginals

    return run


# ---- The commands


def _seconds(words: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-P", "-m", "crfrefine", *words], check=True)
    return time.perf_counter() - started


def measure_command(options: Namespace, what: str) -> Iterator[Line]:
    """A command with the GPU and with the CPU; `infer` three times, first to fill the caches."""
    data = options.data / ("brats2015" if what == "infer-brats" else "hippocampus")
    with tempfile.TemporaryDirectory() as work:
        inputs = Path(work, "inputs")
        names = case_names(data)[: 2 if what == "infer-brats" else 20]
        for folder in ("images", "logits", "labels"):
            (inputs / folder).mkdir(parents=True)
            for file in (data / folder).iterdir():
                if file.name.startswith(tuple(names)):
                    (inputs / folder / file.name).symlink_to(file)
        for device in (options.device, "cpu"):
            output = Path(work, f"out-{device}")
            words = ["-i", str(inputs / "images"), "-p", str(inputs / "logits"), "-q"]
            if what == "train-hippocampus":
                words = ["train-crf", *words, "-l", str(inputs / "labels"), "-o", f"{output}.toml"]
                seconds = [_seconds([*words, "--device", device])]
            else:
                words = ["infer", *words, "--device", device]
                if what == "infer-brats":
                    words += ["-c", "brats"]
                seconds = [_seconds([*words, "-o", f"{output}-{run}"]) for run in range(3)]
            yield {"what": f"{what} on {device}", "seconds": seconds}


ROWS: dict[str, Callable[[Namespace], Iterator[Line]]] = {
    "filter-4-2": lambda options: measure_filter(options, 4, 2),
    "filter-7-5": lambda options: measure_filter(options, 7, 5),
    "crf-S": lambda options: measure_crf(options, "S", "lattice"),
    "crf-S-1.5mm": lambda options: measure_crf(options, "S-1.5mm", "lattice"),
    "crf-S-1.5mm-auto": lambda options: measure_crf(options, "S-1.5mm", "auto"),
    "crf-L": lambda options: measure_crf(options, "L", "lattice"),
    "infer-brats": lambda options: measure_command(options, "infer-brats"),
    "infer-hippocampus": lambda options: measure_command(options, "infer-hippocampus"),
    "train-hippocampus": lambda options: measure_command(options, "train-hippocampus"),
}


def main() -> None:
    """Run each row in a process, or with `--here` a single one in this process."""
    parser = new_parser(__doc__)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of a row")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--here", action="store_true")
    options = parser.parse_args()
    if options.here:
        for row in options.rows:
            for line in ROWS[row](options):
                sys.stdout.write(json.dumps({"row": row, **line}) + "\n")
                sys.stdout.flush()
        return
    for row in options.rows:
        words = ["--here", "--rows", row, "--device", options.device]
        words += ["--points", str(options.points), "--data", str(options.data)]
        try:
            subprocess.run([sys.executable, __file__, *words], check=True, timeout=options.limit)
        except (subprocess.SubprocessError, OSError) as error:
            sys.stdout.write(json.dumps({"row": row, "failed": str(error)[-300:]}) + "\n")


if __name__ == "__main__":
    main()
