"""Suite `torch`: the layer against the same model in plain PyTorch, on a case small enough for a dense matrix.

Each run in a fresh process, systems alternating; that values and gradients agree is checked before times count.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from peers import BENCH
from processes import run_worker
from small_cases import cut
from workloads import WorkloadArrays, WorkloadSpec, store

SPEC = WorkloadSpec("layer-small", (24, 20, 16), 3, 2, theta_alpha=3.0, theta_beta=0.1, theta_gamma=2.0, spacing=(1.0, 1.5, 0.8), peers=())
SYSTEMS = {
    "plain PyTorch, dense": {"engine": "torch"},
    "crfrefine, exact": {"engine": "crfrefine", "filter": "exact"},
    "crfrefine, auto": {"engine": "crfrefine", "filter": "auto"},
    "crfrefine, lattice": {"engine": "crfrefine", "filter": "lattice"},
}
# Single precision, and sums of thousands of terms in another order; slopes along bandwidths are differences of sums that nearly cancel.
MOST_DIFFERENCE = {"theta_alpha": 5e-3, "theta_beta": 5e-3, "theta_gamma": 5e-3}
MOST_DIFFERENCE_ELSEWHERE = 1e-3


def _make(spec: WorkloadSpec) -> WorkloadArrays:
    return cut(spec, [spec.grid_shape], seed=1)[0]


def _differences(own: Path, truth: Path) -> dict[str, float]:
    """Of values and gradients, the norm of the difference over the norm of plain PyTorch's."""
    with np.load(own) as found, np.load(truth) as expected:
        return {name: float(np.linalg.norm(found[name] - expected[name]) / np.linalg.norm(expected[name])) for name in expected}


def _check(differences: dict[str, float]) -> None:
    for name, difference in differences.items():
        if not difference <= MOST_DIFFERENCE.get(name, MOST_DIFFERENCE_ELSEWHERE):
            raise SystemExit(f"benchmark: crfrefine's exact filter and plain PyTorch differ in {name} by {difference:.2g}")


def run(*, quick: bool, threads: int) -> dict[str, Any]:
    """Best of three rounds of three calls (of one round of one when quick), with and without the backward pass."""
    folder = store(SPEC, BENCH / "data", make=_make)
    saved = {name: BENCH / "results" / f"layer-{index}.npz" for index, name in enumerate(SYSTEMS)}
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {name: {"no": [], "yes": []} for name in SYSTEMS}
    for turn in range(1 if quick else 3):
        for backward in ("yes", "no"):
            for name, options in SYSTEMS.items():
                more = {"backward": backward, "threads": str(threads), "repeats": "1" if quick else "3"}
                run = run_worker("layer", folder, save=saved[name] if backward == "yes" else None, **options, **more)
                runs[name][backward].append(run)
                sys.stderr.write(f"  {name}, backward {backward}: {run['seconds']:.3f} s, {run['peak_mib']:.0f} MiB\n")
        if turn == 0:
            reference, exact, *_ = saved
            differences = {name: _differences(saved[name], saved[reference]) for name in saved if name != reference}
            _check(differences[exact])
    summary = {
        name: {
            f"{figure}_{what}": min(run[figure] for run in of_system[backward])
            for backward, what in (("no", "forward"), ("yes", "both"))
            for figure in ("seconds", "peak_mib")
        }
        for name, of_system in runs.items()
    }
    return {
        "threads": threads,
        "grid_shape": SPEC.grid_shape,
        "num_labels": SPEC.num_labels,
        "num_modalities": SPEC.num_modalities,
        "systems": summary,
        "differences": differences,
        "runs": runs,
    }
