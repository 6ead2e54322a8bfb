"""What `gpu_first_run.py` asks of the GPU engine, one thing per process: lines of JSON, appended to the file that -o names, or printed.

gpu.py environment               versions, machine and GPU
gpu.py contact CASE WAY          a small case, computed twice, against the CPU engine, in a way of `gpu_cases.contact`
gpu.py time WORKLOAD [FILTER]    times, if the small case of that kind is right (--once: one run, for a profiler)
gpu.py refine WORKLOAD           crfrefine.refine from raw intensities to label maps
"""

from __future__ import annotations

import argparse
import importlib
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environment
import numpy as np
from gpu_cases import CPU_THREADS, KIND_OF, SPECS, contact, parameters_of, run
from gpu_replay import append
from workloads import make

import crfrefine
from crfrefine.engines import get_backend
from crfrefine.engines.cuda.backend import CudaBackend

Keep = Callable[[dict[str, Any]], None]


def _engine(device: str) -> CudaBackend:
    found = get_backend(device)
    assert isinstance(found, CudaBackend)
    return found


def _environment(options: argparse.Namespace, keep: Keep) -> None:
    found = environment.describe("cupy-cuda13x", "cupy-cuda12x", "torch")
    keep({"environment": found, "cpu_threads": CPU_THREADS})  # whatever the GPU says
    keep({"device": _engine(options.device).device.properties()})


def _torch_has_gpu() -> bool:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def _contact(options: argparse.Namespace, keep: Keep) -> None:
    if options.way == "layer" and not _torch_has_gpu():
        keep({"skipped": "no PyTorch with a GPU"})
        return
    entry = contact(_engine(options.device), get_backend("cpu"), options.workload, options.way)
    keep(entry)
    if "failed" in entry:
        raise SystemExit(entry["failed"])


def _time(options: argparse.Namespace, keep: Keep) -> None:
    gpu, spec = _engine(options.device), SPECS[options.workload]
    if options.once:
        run(gpu, spec, make(spec), parameters_of(spec, num_iterations=2, filter_name=options.way))
        return
    cpu = get_backend("cpu")
    if wrong := contact(gpu, cpu, KIND_OF[spec.name], options.way).get("failed"):
        raise SystemExit(f"nothing is timed, as a small case of this kind is wrong: {wrong}")
    arrays, parameters = make(spec), parameters_of(spec, num_iterations=5, filter_name=options.way)
    for attempt in ("first", "second", "third"):
        started = time.perf_counter()
        result = run(gpu, spec, arrays, parameters)
        seconds = time.perf_counter() - started
        keep({"attempt": attempt, "seconds": seconds, "stage_seconds": dict(result.timings), "filters": list(result.filters)})
    if spec.brain == "mask":  # on more voxels the CPU would take the time of other steps
        started = time.perf_counter()
        run(cpu, spec, arrays, parameters)
        keep({"attempt": "CPU", "seconds": time.perf_counter() - started})


def _refine(options: argparse.Namespace, keep: Keep) -> None:
    spec = SPECS[options.workload]
    arrays = make(spec)
    for attempt in ("first", "second"):
        started = time.perf_counter()
        found = crfrefine.refine(
            arrays.logits, arrays.image, mask=arrays.mask, spacing=spec.spacing, input_type="logits", device=options.device
        )
        labels = found.label_map
        keep({"attempt": attempt, "seconds": time.perf_counter() - started, "labels": np.bincount(labels.ravel()).tolist()})


_STEPS = {"environment": _environment, "contact": _contact, "time": _time, "refine": _refine}


def main() -> None:
    """Do one thing; what goes wrong is a line, too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=_STEPS)
    parser.add_argument("workload", nargs="?", choices=SPECS, default="Lm")
    parser.add_argument("way", nargs="?", default="lattice")
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    what = {
        "step": options.step,
        "workload": options.workload,
        "way": options.way,
        "device": options.device,
        "mode": os.environ.get("CRFREFINE_CUDA", "all"),
    }

    def keep(found: dict[str, Any]) -> None:
        append(options.output, {**what, **found})

    try:
        _STEPS[options.step](options, keep)
    except Exception:
        keep({"failed": traceback.format_exc(limit=-6)})
        raise


if __name__ == "__main__":
    main()
