"""Suite `precision`: marginals after all steps against float64 brute force, on cases small enough for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from exact import mean_field
from numpy.typing import NDArray
from peers import BENCH
from processes import run_worker
from workers.measure import Workload
from workloads import precision_spec, store

FILTERS = ("auto", "lattice", "grid", "truncated", "exact")


def _errors(marginals: NDArray[np.float32], exact: NDArray[np.float64]) -> dict[str, float]:
    difference = marginals.reshape(exact.shape) - exact
    return {
        "rms": float(np.sqrt(np.mean(difference**2))),
        "max": float(np.abs(difference).max()),
        "labels_differ": int((marginals.reshape(exact.shape).argmax(axis=0) != exact.argmax(axis=0)).sum()),
    }


def _one_case(folder: Path) -> dict[str, Any]:
    exact = mean_field(Workload(folder))
    saved = BENCH / "results" / f"{folder.name}.npy"
    ours = {}
    for name in FILTERS:
        run = run_worker("crfrefine", folder, save=saved, filter=name)
        ours[name] = _errors(np.load(saved), exact) | {"filters": run["filters"]}
    run_worker("pydensecrf2", folder, save=saved)
    theirs: dict[str, Any] = {"pydensecrf2": _errors(np.load(saved), exact)}
    run_worker("simplecrf", folder, save=saved)
    theirs["simplecrf"] = {"labels_differ": int((np.load(saved).ravel() != exact.argmax(axis=0)).sum())}
    return {"crfrefine": ours, "peers": theirs, "num_voxels": exact.shape[1], "workload": Workload(folder).meta}


def run(*, quick: bool) -> dict[str, Any]:
    """Both regimes; it is quick in any case."""
    del quick
    return {spec.name: _one_case(store(spec, BENCH / "data")) for spec in (precision_spec(fine=False), precision_spec(fine=True))}
