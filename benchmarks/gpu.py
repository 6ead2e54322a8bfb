"""What `gpu_first_run.py` asks of the GPU engine, one thing per process.

Lines of JSON, appended to the file that -o names, or printed.

    gpu.py environment               # versions, machine and GPU
    gpu.py time WORKLOAD [FILTER]    # times, if the small case of that kind is right
    gpu.py refine WORKLOAD           # crfrefine.refine from raw intensities to label maps
"""

from __future__ import annotations

import argparse
import re
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from gpu_replay import append
from report import describe
from workers.measure import model_entries
from workloads import WORKLOADS, WorkloadArrays, WorkloadSpec, make

import crfrefine
from crfrefine import CrfParameters
from crfrefine.engines import get_backend
from crfrefine.engines.base import Backend, GridImage, MeanFieldResult, RunContext

Keep = Callable[[dict[str, Any]], None]

CT = WorkloadSpec(
    "CT",
    (512, 512, 400),
    2,
    1,
    theta_alpha=8.0,
    theta_beta=0.1,
    theta_gamma=3.0,
    spacing=(0.8, 0.8, 1.0),
)
# The bandwidths of the default preset, which are about those that are learned from real cases.
REAL = replace(WORKLOADS["Lm"], name="Lm-1.5mm", theta_alpha=1.5, theta_beta=0.05, theta_gamma=1.0)
SPECS = {
    spec.name: spec
    for spec in (
        WORKLOADS["Lm"],
        WORKLOADS["L"],
        WORKLOADS["Lm-mid"],
        WORKLOADS["Lm-fine"],
        REAL,
        CT,
    )
}
SMALL_GRID = (36, 30, 25)
CPU_THREADS = 2
# float32 logits of size 10 after five steps whose messages are summed in another order.
MAX_DIFFERENCE = 1e-3


def run(
    backend: Backend, spec: WorkloadSpec, arrays: WorkloadArrays, filter_name: str
) -> MeanFieldResult:
    """One mean field from the host's arrays to the host's logits."""
    parameters = CrfParameters().replace(**model_entries(asdict(spec), filter_name))
    image = arrays.image.astype(np.float32) / np.float32(255.0)
    resolved = parameters.resolve(spec.num_labels, spec.num_modalities, len(spec.grid_shape))
    result = backend.mean_field(
        arrays.logits,
        GridImage(image, arrays.mask, spec.spacing),
        resolved,
        RunContext(threads=CPU_THREADS),
    )
    _ = result.logits  # A GPU keeps them until they are asked for.
    return result


def check_small(gpu: Backend, cpu: Backend, spec: WorkloadSpec, filter_name: str) -> str:
    """Compare a small case with the CPU, and two runs of it bit by bit; return what is wrong."""
    spec = replace(spec, grid_shape=SMALL_GRID, theta_alpha=3.0, theta_beta=0.1, theta_gamma=3.0)
    # Scattered voxels are the mask of a small case, where the large case has a mask.
    mask = np.random.default_rng(0).random(spec.grid_shape) < 0.8 if spec.brain == "mask" else None
    arrays = replace(make(replace(spec, brain="no")), mask=mask)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", RuntimeWarning)
        first, second, expected = (
            run(backend, spec, arrays, filter_name) for backend in (gpu, gpu, cpu)
        )
    ours, theirs = (result.logits - result.logits.max(axis=0) for result in (first, expected))
    energies = np.array([first.energy, expected.energy])
    relative = np.abs(energies[0] - energies[1]).max() / np.abs(energies[1]).max()
    differences = {"logits": float(np.abs(ours - theirs).max()), "energies": float(relative)}
    wrong = [
        f"{name} differ from those expected by {value:.2g}"
        for name, value in differences.items()
        if not value <= MAX_DIFFERENCE
    ]
    vertices = [re.findall(r"(\d+) vertices", result.filters[0]) for result in (first, expected)]
    if filter_name != "auto" and vertices[0] != vertices[1]:
        wrong.append(f"{vertices[0]} vertices, expected {vertices[1]}")
    if first.logits.tobytes() != second.logits.tobytes() or first.energy != second.energy:
        wrong.append("two runs differ")
    wrong += [
        str(warning.message) for warning in warned if issubclass(warning.category, RuntimeWarning)
    ]
    return "; ".join(wrong)


def _environment(options: argparse.Namespace, keep: Keep) -> None:
    found = describe("cupy-cuda13x", "cupy-cuda12x", "torch")
    keep({"environment": found, "cpu_threads": CPU_THREADS})  # whatever the GPU says
    keep({"device": get_backend(options.device).device.properties()})


def _time(options: argparse.Namespace, keep: Keep) -> None:
    gpu = get_backend(options.device)
    cpu = get_backend("cpu")
    spec = SPECS[options.workload]
    if wrong := check_small(gpu, cpu, spec, options.filter):
        raise SystemExit(f"nothing is timed, as a small case of this kind is wrong: {wrong}")
    arrays = make(spec)
    for attempt in ("first", "second", "third"):
        started = time.perf_counter()
        result = run(gpu, spec, arrays, options.filter)
        seconds = time.perf_counter() - started
        keep(
            {
                "attempt": attempt,
                "seconds": seconds,
                "stage_seconds": dict(result.timings),
                "filters": list(result.filters),
            }
        )
    if spec.brain == "mask":  # on more voxels the CPU would take the time of other steps
        started = time.perf_counter()
        run(cpu, spec, arrays, options.filter)
        keep({"attempt": "CPU", "seconds": time.perf_counter() - started})


def _refine(options: argparse.Namespace, keep: Keep) -> None:
    spec = SPECS[options.workload]
    arrays = make(spec)
    settings: dict[str, Any] = {
        "mask": arrays.mask,
        "spacing": spec.spacing,
        "input_type": "logits",
        "device": options.device,
    }
    for attempt in ("first", "second"):
        started = time.perf_counter()
        labels = crfrefine.refine(arrays.logits, arrays.image, **settings).label_map
        keep(
            {
                "attempt": attempt,
                "seconds": time.perf_counter() - started,
                "labels": np.bincount(labels.ravel()).tolist(),
            }
        )


_STEPS = {"environment": _environment, "time": _time, "refine": _refine}


def main() -> None:
    """Do one thing; what goes wrong is a line, too."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=_STEPS)
    parser.add_argument("workload", nargs="?", choices=SPECS, default="Lm")
    parser.add_argument("filter", nargs="?", default="lattice")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    what = {name: getattr(options, name) for name in ("step", "workload", "filter", "device")}

    def keep(line: dict[str, Any]) -> None:
        append(options.output, {**what, **line})

    try:
        _STEPS[options.step](options, keep)
    except Exception:
        keep({"failed": traceback.format_exc(limit=-6)})
        raise


if __name__ == "__main__":
    main()
