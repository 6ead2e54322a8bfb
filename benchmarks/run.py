"""Time and memory against other libraries.

Records in `benchmarks.json`, tables in `benchmarks.md` of `docs/reference`.

Usage: run.py [--quick] [--workloads NAME ...]

One thread each, runs alternating, results checked before times count. crfrefine is also timed with
the lower instruction sets that it was compiled for and that this processor has.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from typing import Any

import numpy as np
from check import check_result
from numpy.typing import NDArray
from peers import run_worker
from report import describe, tables, write_between_markers
from scripts import BENCH, ROOT
from workers.measure import Workload
from workloads import WORKLOADS, WorkloadSpec, store

from crfrefine.engines.cpu import CpuBackend, built_levels, load_engine

RECORDS = ROOT / "docs" / "reference" / "benchmarks.json"


def _measure(spec: WorkloadSpec, repeats: int) -> dict[str, Any]:
    folder = store(spec, BENCH / "data")
    workload = Workload(folder)
    saved = {
        system: BENCH / "results" / f"{spec.name}-{system}.npy"
        for system in ("crfrefine", *spec.peers)
    }
    runs: dict[str, list[dict[str, Any]]] = {system: [] for system in saved}
    built = built_levels(load_engine())
    best = CpuBackend().level
    lower = built[: built.index(best)][::-1]
    of_level: dict[str, list[float]] = {level: [] for level in (best, *lower)}

    def our_lattice() -> NDArray[Any]:
        run_worker("crfrefine", folder, save=saved["crfrefine"], filter="lattice")
        return np.load(saved["crfrefine"])

    for repeat in range(repeats):
        for system, file in saved.items():
            run = run_worker(system, folder, save=file if repeat == 0 else None)
            runs[system].append(run)
            sys.stderr.write(
                f"  {spec.name} {system}: {run['seconds']:.2f} s, {run['peak_mib']:.0f} MiB\n"
            )
        of_level[best].append(runs["crfrefine"][-1]["seconds"])
        for level in lower:
            of_level[level].append(run_worker("crfrefine", folder, level=level)["seconds"])
            sys.stderr.write(f"  {spec.name} crfrefine, {level}: {of_level[level][-1]:.2f} s\n")
        if repeat == 0:
            checks = check_result(
                workload, {system: np.load(file) for system, file in saved.items()}, our_lattice
            )
    seconds, peak_mib = (
        {system: min(run[what] for run in own) for system, own in runs.items()}
        for what in ("seconds", "peak_mib")
    )
    return {
        "runs": runs,
        "levels": of_level,
        "checks": checks,
        "workload": workload.meta,
        "num_voxels": math.prod(workload.grid_shape)
        if workload.mask is None
        else int(workload.mask.sum()),
        "seconds": seconds,
        "peak_mib": peak_mib,
        "speedup": min(seconds[peer] for peer in spec.peers) / seconds["crfrefine"],
        "memory_fraction": peak_mib["crfrefine"] / peak_mib["pydensecrf2"],
        "filters": runs["crfrefine"][0]["filters"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure crfrefine against other libraries.")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small workloads, one run each; the documents stay as they are",
    )
    parser.add_argument(
        "--workloads",
        nargs="+",
        choices=list(WORKLOADS),
        metavar="NAME",
        help="these alone; the documents stay too",
    )
    options = parser.parse_args()
    start = time.perf_counter()
    head = describe()
    names = options.workloads or (("S", "M") if options.quick else WORKLOADS)
    measured = {
        name: _measure(WORKLOADS[name], repeats=1 if options.quick else 3) for name in names
    }
    speedups = [record["speedup"] for record in measured.values()]
    figures = {
        "workloads": measured,
        "speedup_geometric_mean": statistics.geometric_mean(speedups),
        "speedup_worst": min(speedups),
        "memory_fraction_worst": max(record["memory_fraction"] for record in measured.values()),
    }
    record = {"environment": head, "took_seconds": time.perf_counter() - start, "figures": figures}
    text = tables(record)
    sys.stdout.write(text)
    partial = options.quick or options.workloads is not None
    target = BENCH / "results" / "partial.json" if partial else RECORDS
    target.write_text(json.dumps(record, indent=1) + "\n")
    if not partial:
        write_between_markers(ROOT / "docs" / "reference" / "benchmarks.md", "benchmarks", text)
    sys.stderr.write(f"records: {target.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
