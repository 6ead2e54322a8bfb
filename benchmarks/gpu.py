"""What `gpu_first_run.py` asks of the GPU engine, one thing per process.

Lines of JSON, appended to the file that -o names, or printed.

    gpu.py environment               # versions, machine and GPU
    gpu.py time WORKLOAD [FILTER]    # times, if the small case of that kind is right
    gpu.py refine WORKLOAD           # crfrefine.refine from raw intensities to label maps
"""

from __future__ import annotations

import re
import time
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from gpu_replay import append
from report import describe
from scripts import new_parser
from workers.measure import model_entries, unit_image
from workloads import WORKLOADS, WorkloadArrays, WorkloadSpec, make

import crfrefine
from crfrefine import CrfParameters
from crfrefine.engines import get_backend
from crfrefine.engines.base import Backend, GridImage, MeanFieldResult, RunContext

Keep = Callable[[dict[str, Any]], None]

SPECS = {name: WORKLOADS[name] for name in ("Lm", "L", "Lm-mid", "Lm-fine")}
# The bandwidths of the default preset, which are about those that are learned from real cases.
SPECS["Lm-1.5mm"] = replace(
    SPECS["Lm"], name="Lm-1.5mm", theta_alpha=1.5, theta_beta=0.05, theta_gamma=1.0
)
SPECS["CT"] = WorkloadSpec("CT", (512, 512, 400), 2, 1, 8.0, 0.1, 3.0, spacing=(0.8, 0.8, 1.0))
SMALL_GRID = (36, 30, 25)
CPU_THREADS = 2
# float32 logits of size 10 after five steps whose messages are summed in another order.
MAX_DIFFERENCE = 1e-3


def run(
    backend: Backend, spec: WorkloadSpec, arrays: WorkloadArrays, filter_name: str
) -> MeanFieldResult:
    """One mean field from the host's arrays to the host's logits."""
    parameters = CrfParameters().replace(**model_entries(asdict(spec), filter_name))
    resolved = parameters.resolve(spec.num_labels, spec.num_modalities, len(spec.grid_shape))
    image = GridImage(unit_image(arrays.image), arrays.mask, spec.spacing)
    result = backend.mean_field(arrays.logits, image, resolved, RunContext(threads=CPU_THREADS))
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
        first = run(gpu, spec, arrays, filter_name)
        second = run(gpu, spec, arrays, filter_name)
        expected = run(cpu, spec, arrays, filter_name)
    wrong = []
    ours, theirs = (result.logits - result.logits.max(axis=0) for result in (first, expected))
    energies = np.array([first.energy, expected.energy])
    relative = np.abs(energies[0] - energies[1]).max() / np.abs(energies[1]).max()
    for name, value in (("logits", np.abs(ours - theirs).max()), ("energies", relative)):
        if not value <= MAX_DIFFERENCE:
            wrong.append(f"{name} differ from those expected by {value:.2g}")
    vertices = [re.findall(r"(\d+) vertices", result.filters[0]) for result in (first, expected)]
    if filter_name != "auto" and vertices[0] != vertices[1]:
        wrong.append(f"{vertices[0]} vertices, expected {vertices[1]}")
    if first.logits.tobytes() != second.logits.tobytes() or first.energy != second.energy:
        wrong.append("two runs differ")
    wrong += [str(one.message) for one in warned if issubclass(one.category, RuntimeWarning)]
    return "; ".join(wrong)


def _environment(options: Namespace, keep: Keep) -> None:
    found = describe("cupy-cuda13x", "cupy-cuda12x", "torch")
    keep({"environment": found, "cpu_threads": CPU_THREADS})  # whatever the GPU says
    keep({"device": get_backend(options.device).device.properties()})


def _time(options: Namespace, keep: Keep) -> None:
    gpu = get_backend(options.device)
    cpu = get_backend("cpu")
    spec = SPECS[options.workload]
    if wrong := check_small(gpu, cpu, spec, options.filter):
        raise SystemExit(f"nothing is timed, as a small case of this kind is wrong: {wrong}")
    arrays = make(spec)
    for attempt in ("first", "second", "third"):
        started = time.perf_counter()
        result = run(gpu, spec, arrays, options.filter)
        line = {"attempt": attempt, "seconds": time.perf_counter() - started}
        stages = dict(result.timings)
        keep({**line, "stage_seconds": stages, "filters": list(result.filters)})
    if spec.brain == "mask":  # on more voxels the CPU would take the time of other steps
        started = time.perf_counter()
        run(cpu, spec, arrays, options.filter)
        keep({"attempt": "CPU", "seconds": time.perf_counter() - started})


def _refine(options: Namespace, keep: Keep) -> None:
    spec = SPECS[options.workload]
    arrays = make(spec)
    settings: dict[str, Any] = {"input_type": "logits", "device": options.device}
    settings |= {"mask": arrays.mask, "spacing": spec.spacing}
    for attempt in ("first", "second"):
        started = time.perf_counter()
        labels = crfrefine.refine(arrays.logits, arrays.image, **settings).label_map
        line = {"attempt": attempt, "seconds": time.perf_counter() - started}
        keep({**line, "labels": np.bincount(labels.ravel()).tolist()})


_STEPS = {"environment": _environment, "time": _time, "refine": _refine}


def main() -> None:
    """Do one thing; what goes wrong is a line, too."""
    parser = new_parser(__doc__)
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
