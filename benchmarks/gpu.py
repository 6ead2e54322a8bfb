"""What `gpu_steps.py` asks of the GPU engine, one thing per process: it appends lines of JSON to the file that -o names, or prints them.

gpu.py environment               versions, machine and GPU
gpu.py contact CASE FILTER       a small case, computed twice, against the CPU engine
gpu.py time WORKLOAD             times, if the small case of that kind is right (--once: one run, for a profiler)
gpu.py refine WORKLOAD           crfrefine.refine from raw intensities to label maps
gpu.py command WORKLOAD          crfrefine infer on files
gpu.py peers                     the exact filter in plain PyTorch
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environment
import numpy as np
from gpu_cases import CPU_THREADS, KIND_OF, SPECS, contact, parameters_of, run
from gpu_peers import plain_torch
from gpu_replay import append
from gpu_times import describe_gpu, time_workload
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
    keep({"device": describe_gpu(_engine(options.device).device.xp)})


def _contact(options: argparse.Namespace, keep: Keep) -> None:
    entry = contact(_engine(options.device), get_backend("cpu"), options.workload, options.filter)
    keep(entry)
    if "failed" in entry:
        raise SystemExit(entry["failed"])


def _time(options: argparse.Namespace, keep: Keep) -> None:
    gpu, spec = _engine(options.device), SPECS[options.workload]
    if options.once:
        run(gpu, spec, make(spec), parameters_of(spec, num_iterations=2, filter_name=options.filter))
        return
    cpu = get_backend("cpu")
    if wrong := contact(gpu, cpu, KIND_OF[spec.name], options.filter).get("failed"):
        raise SystemExit(f"nothing is timed, as a small case of this kind is wrong: {wrong}")
    time_workload(gpu, cpu, spec, options.filter, keep=keep)


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


def _command(options: argparse.Namespace, keep: Keep) -> None:
    import nibabel

    spec = SPECS[options.workload]
    arrays = make(spec)
    affine = np.diag([*spec.spacing, 1.0])
    with tempfile.TemporaryDirectory() as folder:
        images, logits = Path(folder) / "images", Path(folder) / "logits"
        for place in (images, logits):
            place.mkdir()
        for number, modality in enumerate(arrays.image):
            nibabel.save(nibabel.Nifti1Image(modality, affine), images / f"case_{number:04d}.nii")
        nibabel.save(nibabel.Nifti1Image(np.moveaxis(arrays.logits, 0, -1), affine), logits / "case.nii")
        command = [sys.executable, "-m", "crfrefine", "infer", "-i", str(images), "-p", str(logits), "--input-type", "logits"]
        for attempt in ("first", "second"):
            started = time.perf_counter()
            output = ["-o", f"{folder}/{attempt}", "--device", options.device, "-v"]
            done = subprocess.run([*command, *output], capture_output=True, text=True, check=False)
            keep({"attempt": attempt, "seconds": time.perf_counter() - started, "status": done.returncode, "said": done.stderr[-3000:]})
            if done.returncode:
                raise SystemExit(done.stderr[-3000:])


def _peers(options: argparse.Namespace, keep: Keep) -> None:
    keep(plain_torch(_engine(options.device)))


_STEPS = {"environment": _environment, "contact": _contact, "time": _time, "refine": _refine, "command": _command, "peers": _peers}


def main() -> None:
    """Do one thing; what goes wrong is a line, too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=_STEPS)
    parser.add_argument("workload", nargs="?", choices=SPECS, default="Lm")
    parser.add_argument("filter", nargs="?", default="lattice")
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    what = {"step": options.step, "workload": options.workload, "filter": options.filter, "mode": os.environ.get("CRFREFINE_CUDA", "all")}

    def keep(found: dict[str, Any]) -> None:
        line = {**what, **found}
        if options.output is None:
            print(json.dumps(line), flush=True)
        else:
            append(options.output, line)

    try:
        _STEPS[options.step](options, keep)
    except Exception:
        keep({"failed": traceback.format_exc(limit=-6)})
        raise


if __name__ == "__main__":
    main()
