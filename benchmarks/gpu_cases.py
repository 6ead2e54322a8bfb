"""The cases that the GPU engine is measured on, and the comparison with another engine that comes before any time."""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from workloads import WORKLOADS, WorkloadArrays, WorkloadSpec, make

import crfrefine
from crfrefine import CrfParameters
from crfrefine.engines.base import Backend, MeanFieldResult, RunContext
from crfrefine.engines.grid_image import GridImage

Arrays = dict[str, NDArray[Any]]

CT = WorkloadSpec("CT", (512, 512, 400), 2, 1, theta_alpha=8.0, theta_beta=0.1, theta_gamma=3.0, spacing=(0.8, 0.8, 1.0))
# The bandwidths of the default preset, which are about those that are learned from real cases.
REAL = replace(WORKLOADS["Lm"], name="Lm-1.5mm", theta_alpha=1.5, theta_beta=0.05, theta_gamma=1.0)
SPECS = {spec.name: spec for spec in (WORKLOADS["Lm"], WORKLOADS["L"], WORKLOADS["Lm-mid"], WORKLOADS["Lm-fine"], REAL, CT)}
SMALL = {"Lm": (31, 40, 27), "L": (36, 30, 25), "CT": (40, 36, 31)}
KIND_OF = {name: "Lm" if spec.brain == "mask" else "CT" if name == "CT" else "L" for name, spec in SPECS.items()}
if "GPU_SHAPE" in os.environ:  # to try the steps out without a GPU: 9x6x11
    _shape = tuple(map(int, os.environ["GPU_SHAPE"].split("x")))
    SPECS, SMALL = {name: replace(spec, grid_shape=_shape) for name, spec in SPECS.items()}, dict.fromkeys(SMALL, _shape)
FILTERS = ("exact", "truncated", "grid", "lattice")
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


def num_vertices(result: MeanFieldResult) -> int | None:
    """Of the lattice that the run has built; None: it has built none."""
    found = re.search(r"(\d+) vertices", result.filters[0])
    return None if found is None else int(found[1])


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
        way: a filter of `FILTERS` or "auto"; "refine", as a caller does; or "layer", PyTorch's tensors and their gradients.

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
    vertices = {} if way == "auto" or num_vertices(result) is None else {"vertices": np.array(num_vertices(result))}
    return {"logits": result.logits, "energy": np.array(result.energy), **vertices}


def _of_layer(backend: Backend, spec: WorkloadSpec, arrays: WorkloadArrays) -> Arrays:
    import torch

    parameters = parameters_of(spec, num_iterations=2)
    layer = crfrefine.CrfRnn(num_labels=spec.num_labels, num_modalities=spec.num_modalities, parameters=parameters, num_iterations=2)
    layer = layer.to(backend.name)
    logits, image = (torch.tensor(array[None], dtype=torch.float32, device=backend.name) for array in (arrays.logits, arrays.image))
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
