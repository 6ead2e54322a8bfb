"""Suite `threads`: one thread against two, on the masked brain; the answers must be the same bit for bit."""

from __future__ import annotations

from typing import Any

from peers import BENCH
from processes import run_worker
from workloads import WORKLOADS, store


def run(*, quick: bool) -> dict[str, Any]:
    """Alternating runs, best of 3 (of 1 when quick)."""
    folder = store(WORKLOADS["Lm"], BENCH / "data")
    runs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for _ in range(1 if quick else 3):
        for threads, of_count in runs.items():
            of_count.append(run_worker("crfrefine", folder, threads=str(threads)))
    if len({run["sha256"] for of_count in runs.values() for run in of_count}) != 1:
        raise SystemExit("benchmark: one and two threads, or two runs, gave different answers")
    best = {threads: min(run["seconds"] for run in of_count) for threads, of_count in runs.items()}
    return {"seconds": {str(t): s for t, s in best.items()}, "speedup": best[1] / best[2], "runs": {str(t): r for t, r in runs.items()}}
