"""The engine on one GPU: is it right, then how fast is it beside its peers; in lines of JSON.

Each row runs in a process of its own, which is killed at the row's limit. The row `check` comes
first: filters and models of all kinds, with their gradients, beside the engine of the CPU; if it
fails, nothing is timed. The other rows, too, compare a small case of their own kind before they
measure. Peers are MONAI's filter and CRF, if MONAI is installed with its compiled extensions;
commands are measured beside `--device cpu` with all cores and with two. Times are the best of three
after a first call, with tensors on the GPU; peaks are those of PyTorch's allocator, which the
engine uses, too.

    gpu.py -o LINES.jsonl                    # all rows, within six minutes
    gpu.py --rows check crf-S filter-4-2
    gpu.py --device cpu --points 20000 --rows check filter-4-2    # a trial without a GPU
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from report import describe
from scripts import DATA, case_names, new_parser
from workers.measure import model_entries, unit_image
from workloads import WORKLOADS, WorkloadSpec, make

from crfrefine import CrfParameters, CrfRnn
from crfrefine.engines import get_backend
from crfrefine.io import read_labels
from crfrefine.layer.functional import gaussian_filter, mean_field

Line = dict[str, Any]

MAX_DIFFERENCE = 1e-3  # of the largest value, between the engines of GPU and CPU
REPEATS = 3
NUM_TRAINED = 20  # hippocampi
NUM_SMALL = 4000  # points of the small case of a filter
SMALL_GRID = (17, 14, 21)
PEER = "MONAI"


def best_of(function: Callable[[], object], device: object) -> Line:
    """Return the time of a first call, the best of those after it, and their peak of memory."""
    is_gpu = str(device).startswith("cuda")
    times = []
    for number in range(1 + REPEATS):
        if is_gpu and number == 1:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        function()
        if is_gpu:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    line = {"ms": round(min(times[1:]), 3), "first_ms": round(times[0], 1)}
    if is_gpu:
        line["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return line


def require_agreement(
    what: str, function: Callable[..., Sequence[Any]], tensors: Sequence[Any], device: object
) -> Line:
    """Compare what a function returns of tensors on the CPU and on a device.

    Raise SystemExit if a difference exceeds MAX_DIFFERENCE of the largest value.
    """
    expected = function(*tensors)
    found = function(*(tensor.to(device) for tensor in tensors))
    differences = []
    for one, other in zip(found, expected, strict=True):
        difference = (one.detach().cpu().double() - other.double()).abs().max()
        differences.append(float(difference / other.double().abs().max()))
    if not max(differences) <= MAX_DIFFERENCE:
        raise SystemExit(f"{what}: it differs from the engine of the CPU by {differences}")
    return {"what": f"{what}, agreement with the CPU", "differences": differences}


def with_gradients(function: Callable[..., Any], tensors: Sequence[Any]) -> list[Any]:
    """Return the result of a function, and the gradients of the sum of its squares."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    result = function(*leaves)
    return [result.detach(), *torch.autograd.grad(result.square().sum(), leaves)]


# ---- Is it right


def measure_environment(options: Namespace) -> Iterator[Line]:
    """Versions, machine and GPU."""
    line = {"what": "environment", **describe("cupy-cuda13x", "cupy-cuda12x", "torch", "monai")}
    yield {**line, "cores": len(os.sched_getaffinity(0))}
    if options.device != "cpu":
        yield {"what": "device", **get_backend(options.device).device.properties()}


def check(options: Namespace) -> Iterator[Line]:
    """Filters of points, and models with each filter, without and with a volume term."""
    for num_features, method in ((2, "lattice"), (7, "lattice"), (3, "exact")):

        def filtered(*tensors: Any, method: str = method) -> Any:
            return gaussian_filter(*tensors, method=method)

        what = f"gaussian_filter, D {num_features}, {method}"
        points = points_of(NUM_SMALL // 4, num_features, 3)
        yield require_agreement(
            what, lambda *tensors: with_gradients(filtered, tensors), points, options.device
        )

    generator = torch.Generator().manual_seed(1)
    logits = 2.0 * torch.randn(1, 4, *SMALL_GRID, generator=generator)
    image = torch.rand(1, 2, *SMALL_GRID, generator=generator)
    for filter_name in ("lattice", "truncated", "exact"):
        for volume in (0.0, 0.5):

            def refined(
                logits: Any, image: Any, name: str = filter_name, volume: float = volume
            ) -> Any:
                return mean_field(
                    logits,
                    image,
                    bilateral=[(3.0, 1.5, 0.2)],
                    spatial=(1.0, 1.2),
                    spacing=(1.0, 1.2, 0.9),
                    filter=name,
                    volume=volume,
                )

            yield require_agreement(
                f"mean_field, {filter_name}, volume {volume:g}",
                lambda *tensors: with_gradients(refined, tensors),
                (logits, image),
                options.device,
            )


# ---- The filter of points


def points_of(num_points: int, num_features: int, num_values: int) -> tuple[Any, Any]:
    """Values (1, V, N) and features (1, N, D) of points about as dense as voxels."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(1, num_values, num_points, generator=generator)
    features = 3.0 * torch.rand(1, num_points, num_features, generator=generator)
    return values, features


def has_peer() -> bool:
    """Whether MONAI is installed with its compiled extensions."""
    with contextlib.suppress(ImportError):
        from monai.utils import optional_import

        return bool(optional_import("monai._C")[1])
    return False


def measure_peer(name: str, function: Callable[..., Any], tensors: Sequence[Any]) -> Iterator[Line]:
    """Measure a peer's function of tensors, forward, then forward and backward if it can."""
    device = tensors[0].device
    passes = {
        f"{PEER} {name}": lambda: function(*tensors),
        f"{PEER} {name}, forward and backward": lambda: with_gradients(function, tensors),
    }
    for what, run in passes.items():
        try:
            yield {"what": what, **best_of(run, device)}
        except Exception as error:
            yield {"what": what, "failed": f"{type(error).__name__}: {error}"[-300:]}


def measure_filter(options: Namespace, num_features: int, num_values: int) -> Iterator[Line]:
    """`gaussian_filter`, forward, then forward and backward."""

    def filtered(values: Any, features: Any) -> Any:
        return gaussian_filter(values, features, method="lattice")

    small = points_of(min(NUM_SMALL, options.points), num_features, num_values)
    yield require_agreement(
        "gaussian_filter", lambda *both: with_gradients(filtered, both), small, options.device
    )
    large = points_of(options.points, num_features, num_values)
    values, features = (tensor.to(options.device) for tensor in large)
    forward = best_of(lambda: filtered(values, features), options.device)
    yield {"what": "gaussian_filter", **forward}
    both = best_of(lambda: with_gradients(filtered, (values, features)), options.device)
    yield {"what": "gaussian_filter, forward and backward", **both}
    if not has_peer():
        yield {"what": PEER, "failed": "it is not there with its compiled extensions"}
        return
    from monai.networks.layers import PHLFilter

    # MONAI's means are those of normalization after the filter.
    own = gaussian_filter(values, features, method="lattice", normalization="after")
    columns = features.transpose(1, 2).contiguous()
    difference = (own - PHLFilter.apply(values, columns)).square().mean().sqrt()
    yield {"what": f"root mean square from {PEER}'s means", "value": float(difference)}
    yield from measure_peer("PHLFilter", PHLFilter.apply, (values, columns))


# ---- The CRF


def measure_crf(options: Namespace, spec: WorkloadSpec) -> Iterator[Line]:
    """`CrfRnn` with the lattice, kernels included, forward, then forward and backward."""
    entries = model_entries(vars(spec), "lattice") | {"intensity.normalization": "none"}
    parameters = CrfParameters().replace(**entries)
    layer = CrfRnn(spec.num_labels, spec.num_modalities, 3, parameters=parameters)

    def refined(logits: Any, image: Any) -> Any:
        return layer.to(logits.device)(logits, image, spacing=spec.spacing)

    arrays = make(spec)
    logits = torch.from_numpy(arrays.logits)[None]
    image = torch.from_numpy(unit_image(arrays.image))[None]
    corner = (slice(None), slice(None), *(slice(extent // 3) for extent in spec.grid_shape))
    small = (logits[corner].contiguous(), image[corner].contiguous())
    yield require_agreement(
        "CrfRnn", lambda *both: with_gradients(refined, both), small, options.device
    )
    logits = logits.to(options.device)
    image = image.to(options.device)

    def forward() -> Any:
        with torch.no_grad():
            return refined(logits, image)

    def both() -> Any:
        return with_gradients(lambda leaf: refined(leaf, image), (logits,))

    yield {"what": "CrfRnn", **best_of(forward, options.device)}
    yield {"what": "CrfRnn, forward and backward", **best_of(both, options.device)}
    if not has_peer():
        yield {"what": PEER, "failed": "it is not there with its compiled extensions"}
        return
    from monai.networks.blocks import CRF

    # Its axes are in voxels, which are those of these workloads: 1 mm.
    peer = CRF(
        spec.num_iterations,
        spec.bilateral_weight,
        spec.spatial_weight,
        spec.theta_alpha,
        spec.theta_beta,
        spec.theta_gamma,
        update_factor=1.0,
    )
    yield from measure_peer("CRF", lambda leaf: peer(leaf, image), (logits,))


# ---- The commands


def measure_command(options: Namespace, what: str) -> Iterator[Line]:
    """A command on the GPU, with all cores and with two; label maps of `infer` are compared."""
    is_training = what == "train-hippocampus"
    is_brats = what == "infer-brats"
    data = options.data / ("brats2015" if is_brats else "hippocampus")
    with tempfile.TemporaryDirectory() as work:
        inputs = Path(work, "inputs")
        names = tuple(case_names(data)[: 2 if is_brats else NUM_TRAINED])
        for folder in ("images", "logits", "labels"):
            (inputs / folder).mkdir(parents=True)
            for file in (data / folder).iterdir():
                if file.name.startswith(names):
                    (inputs / folder / file.name).symlink_to(file)

        outputs = []
        for device, threads in ((options.device, None), ("cpu", None), ("cpu", 2)):
            output = Path(work, f"out-{len(outputs)}")
            outputs.append(output)
            words = ["-i", inputs / "images", "-p", inputs / "logits", "--device", device, "-q"]
            if is_training:
                words = ["train-crf", *words, "-l", inputs / "labels", "-o", f"{output}.toml"]
            else:
                words = ["infer", *words, "-o", output, "-c", "brats" if is_brats else "default"]
            cores = "all cores"
            if threads is not None:
                cores = f"{threads} threads"
                words += ["--threads", threads]
            command = [sys.executable, "-P", "-m", "crfrefine", *map(str, words)]
            seconds = []
            # The first run of `infer` may compile kernels, and fills the cache of files.
            for _ in range(1 if is_training else 2):
                started = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                seconds.append(round(time.perf_counter() - started, 2))
            line: Line = {"what": f"{what}, {device}, {cores}", "seconds": seconds}
            if is_training:
                report = json.loads(Path(f"{output}.report.json").read_text(encoding="utf-8"))
                line["dice"] = report["final"]["score"]
            yield line
        if not is_training:
            yield {"what": "largest share of voxels that differ", "value": _share(*outputs[:2])}


def _share(one: Path, other: Path) -> float:
    """The largest share of a case's voxels whose labels differ between two folders."""
    shares = []
    for file in sorted(one.glob("*.nii.gz")):
        shares.append(float((read_labels(file).data != read_labels(other / file.name).data).mean()))
    return max(shares)


# ---- Rows, each in a process


class Row(NamedTuple):
    """What a process measures."""

    limit: float  # seconds, after which it is killed
    measure: Callable[[Namespace], Iterator[Line]]


ROWS = {
    "environment": Row(20, measure_environment),
    "check": Row(60, check),
    "filter-4-2": Row(40, lambda options: measure_filter(options, 4, 2)),
    "filter-7-5": Row(60, lambda options: measure_filter(options, 7, 5)),
    "crf-S": Row(40, lambda options: measure_crf(options, WORKLOADS["S"])),
    "crf-S-1.5mm": Row(40, lambda options: measure_crf(options, WORKLOADS["S-1.5mm"])),
    "crf-L": Row(60, lambda options: measure_crf(options, WORKLOADS["L"])),
    "infer-brats": Row(60, lambda options: measure_command(options, "infer-brats")),
    "infer-hippocampus": Row(40, lambda options: measure_command(options, "infer-hippocampus")),
    "train-hippocampus": Row(180, lambda options: measure_command(options, "train-hippocampus")),
}


def run_row(name: str, seconds: float, words: Sequence[str], lines: Any) -> str | None:
    """Run a row in a process of its own, at most so long; return what went wrong."""
    command = [sys.executable, __file__, "--here", "--rows", name, *words]
    # A group of its own, so that the commands that it runs end with it.
    process = subprocess.Popen(
        command, stdout=lines, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"it was killed at its limit of {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode == 0:
        return None
    return f"status {process.returncode}: {said.decode(errors='replace').strip()[-1000:]}"


def main() -> int:
    """Run each row in a process, or with `--here` in this one."""
    parser = new_parser(__doc__)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=360.0, help="for all rows together")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("-o", "--output", type=Path, help="file to which lines are appended")
    parser.add_argument("--here", action="store_true", help="in this process")
    options = parser.parse_args()
    if options.here:
        for name in options.rows:
            for line in ROWS[name].measure(options):
                print(json.dumps({"row": name, **line}), flush=True)
        return 0

    end = time.monotonic() + options.seconds
    words = ["--device", options.device, "--points", str(options.points)]
    words += ["--data", str(options.data)]
    num_failed = 0
    with contextlib.ExitStack() as stack:
        lines = sys.stdout
        if options.output is not None:
            lines = stack.enter_context(options.output.open("a", encoding="utf-8"))
        for name in options.rows:
            left = end - time.monotonic()
            failed: str | None = "not run: the time is up"
            if left > 0.0:
                failed = run_row(name, min(ROWS[name].limit, left), words, lines)
            if failed is None:
                continue
            num_failed += 1
            print(json.dumps({"row": name, "failed": failed}), file=lines, flush=True)
            if name == "check":
                break
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
