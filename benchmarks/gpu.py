"""What `gpu_first_run.py` asks of the GPU engine, one thing per process: lines of JSON, appended to the file that -o names, or printed.

gpu.py environment               versions, machine and GPU
gpu.py contact CASE WAY          a small case, computed twice, against the CPU engine, in a way of `contact`
gpu.py time WORKLOAD [FILTER]    times, if the small case of that kind is right
gpu.py refine WORKLOAD           crfrefine.refine from raw intensities to label maps
"""

from __future__ import annotations

import argparse
import os
import re
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import environment
import numpy as np
from gpu_replay import append
from numpy.typing import NDArray
from workloads import WORKLOADS, WorkloadArrays, WorkloadSpec, make

import crfrefine
from crfrefine import CrfParameters
from crfrefine.engines import get_backend
from crfrefine.engines.base import Backend, GridImage, MeanFieldResult, RunContext

Keep = Callable[[dict[str, Any]], None]
Arrays = dict[str, NDArray[Any]]

CT = WorkloadSpec("CT", (512, 512, 400), 2, 1, theta_alpha=8.0, theta_beta=0.1, theta_gamma=3.0, spacing=(0.8, 0.8, 1.0))
# The bandwidths of the default preset, which are about those that are learned from real cases.
REAL = replace(WORKLOADS["Lm"], name="Lm-1.5mm", theta_alpha=1.5, theta_beta=0.05, theta_gamma=1.0)
SPECS = {spec.name: spec for spec in (WORKLOADS["Lm"], WORKLOADS["L"], WORKLOADS["Lm-mid"], WORKLOADS["Lm-fine"], REAL, CT)}
SMALL = {"Lm": (31, 40, 27), "L": (36, 30, 25), "CT": (40, 36, 31)}
KIND_OF = {name: "Lm" if spec.brain == "mask" else "CT" if name == "CT" else "L" for name, spec in SPECS.items()}
CPU_THREADS = 2
# float32 logits of size 10 after five steps whose messages are summed in another order. Gradients: a share of the largest; those of
# bandwidths lose digits to squares that all but cancel.
MAX_DIFFERENCE, MAX_OF_BANDWIDTHS = 1e-3, 5e-3


def parameters_of(spec: WorkloadSpec, *, num_iterations: int, filter_name: str = "lattice") -> CrfParameters:
    """The workload's model, all steps taken."""
    return CrfParameters().replace(
        **{
            "bilateral.weight": spec.bilateral_weight,
            "bilateral.theta_alpha": spec.theta_alpha,
            "bilateral.theta_beta": spec.theta_beta,
            "spatial.weight": spec.spatial_weight,
            "spatial.theta_gamma": spec.theta_gamma,
            "mean_field.num_iterations": num_iterations,
            "mean_field.tolerance": 0.0,
            "mean_field.filter": filter_name,
        }
    )


def run(backend: Backend, spec: WorkloadSpec, arrays: WorkloadArrays, parameters: CrfParameters) -> MeanFieldResult:
    """One mean field from the host's arrays to the host's logits."""
    image = arrays.image.astype(np.float32) / np.float32(255.0)
    resolved = parameters.resolve(spec.num_labels, spec.num_modalities, len(spec.grid_shape))
    result = backend.mean_field(arrays.logits, GridImage(image, arrays.mask, spec.spacing), resolved, RunContext(threads=CPU_THREADS))
    _ = result.logits  # A GPU keeps them until they are asked for.
    return result


def small(spec: WorkloadSpec, shape: tuple[int, ...]) -> tuple[WorkloadSpec, WorkloadArrays]:
    """The same kind of case on a small grid, with a mask of scattered voxels where the large one has a mask."""
    found = replace(spec, name=f"{spec.name}-small", grid_shape=shape, theta_alpha=3.0)
    mask = np.random.default_rng(0).random(shape) < 0.8 if spec.brain == "mask" else None
    return found, replace(make(replace(found, brain="no")), mask=mask)


def contact(gpu: Backend, cpu: Backend, kind: str, way: str) -> dict[str, Any]:
    """A small case against the CPU, twice for the same bits, without a warning.

    Args:
        gpu: the engine in question.
        cpu: the one that it is compared with.
        kind: name in `SMALL`.
        way: a filter or "auto"; "refine", as a caller does; or "layer", PyTorch's tensors and their gradients.

    Returns:
        The largest difference, and what is wrong, if anything is.
    """
    spec, arrays = small(SPECS[kind], SMALL[kind])
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", RuntimeWarning)
        once, twice, expected = (_results(backend, spec, arrays, way) for backend in (gpu, gpu, cpu))
    differences = {name: _difference(name, once[name], value) for name, value in expected.items()}
    most = {name: MAX_OF_BANDWIDTHS if "theta" in name else MAX_DIFFERENCE for name in expected}
    wrong = [f"{name} differ from those expected by {value:.2g}" for name, value in differences.items() if not value <= most[name]]
    wrong += [f"two runs differ in {name}" for name in {"logits", "energy"} & once.keys() if once[name].tobytes() != twice[name].tobytes()]
    wrong += [str(warning.message) for warning in warned if issubclass(warning.category, RuntimeWarning)]
    return {"difference": max(differences.values()), **({"failed": "; ".join(wrong)} if wrong else {})}


def _results(backend: Backend, spec: WorkloadSpec, arrays: WorkloadArrays, way: str) -> Arrays:
    """What is to be the same on all engines."""
    if way == "layer":
        return _of_layer(backend, spec, arrays)
    if way == "refine":
        parameters = parameters_of(spec, num_iterations=5)
        options: dict[str, Any] = {"spacing": spec.spacing, "parameters": parameters, "input_type": "logits", "device": backend.name}
        return {"logits": crfrefine.refine(arrays.logits, arrays.image, mask=arrays.mask, **options).logits}
    result = run(backend, spec, arrays, parameters_of(spec, num_iterations=5, filter_name=way))
    built = None if way == "auto" else re.search(r"(\d+) vertices", result.filters[0])
    return {"logits": result.logits, "energy": np.array(result.energy), **({"vertices": np.array(int(built[1]))} if built else {})}


def _of_layer(backend: Backend, spec: WorkloadSpec, arrays: WorkloadArrays) -> Arrays:
    import torch

    parameters = parameters_of(spec, num_iterations=2)
    layer = crfrefine.CrfRnn(num_labels=spec.num_labels, num_modalities=spec.num_modalities, parameters=parameters, num_iterations=2)
    layer = layer.to(backend.name)
    # A percentile's gradient goes to one voxel among those of equal intensity, and engines choose
    # different ones.
    distinct = arrays.image + np.random.default_rng(1).random(arrays.image.shape)
    logits, image = (torch.tensor(array[None], dtype=torch.float32, device=backend.name) for array in (arrays.logits, distinct))
    given = {"logits": logits.requires_grad_(), "image": image.requires_grad_()}
    refined = layer(logits, image, spacing=spec.spacing, mask=None if arrays.mask is None else torch.tensor(arrays.mask))
    refined.square().mean().backward()
    slopes = {f"slopes of {name}": value.grad for name, value in [*given.items(), *layer.named_parameters()]}
    return {name: value.detach().cpu().numpy() for name, value in {"logits": refined[0], **slopes}.items() if value is not None}


def _difference(name: str, found: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest: of logits as it is, each voxel's largest taken as zero; of numbers of vertices; else as a share of the largest."""
    if name == "logits":
        found, expected = found - found.max(axis=0), expected - expected.max(axis=0)
    scale = 1.0 if name in ("logits", "vertices") else max(float(np.abs(expected).max(initial=0.0)), 1e-30)
    return float(np.abs(found - expected).max(initial=0.0)) / scale


def _environment(options: argparse.Namespace, keep: Keep) -> None:
    found = environment.describe("cupy-cuda13x", "cupy-cuda12x", "torch")
    keep({"environment": found, "cpu_threads": CPU_THREADS})  # whatever the GPU says
    keep({"device": get_backend(options.device).device.properties()})


def _contact(options: argparse.Namespace, keep: Keep) -> None:
    entry = contact(get_backend(options.device), get_backend("cpu"), options.workload, options.way)
    keep(entry)
    if "failed" in entry:
        raise SystemExit(entry["failed"])


def _time(options: argparse.Namespace, keep: Keep) -> None:
    gpu, spec = get_backend(options.device), SPECS[options.workload]
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
