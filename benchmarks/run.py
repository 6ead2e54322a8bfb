"""Time and memory against other libraries: records in `benchmarks.json`, tables in `benchmarks.md` of `docs/reference`.

Usage: run.py [--quick] [--workloads NAME ...]

One thread each, runs alternating, results checked before times count. crfrefine is also timed with the lower instruction sets that it was
compiled for and that this processor has.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import environment
import numpy as np
import report
from check import MAX_LATTICE_RMS, MAX_MARGINAL_RMS, check_against_exact_rows, check_labels, check_marginals, marginals_rms
from peers import BENCH, ROOT, run_worker
from workers.measure import Workload
from workloads import WORKLOADS, WorkloadSpec, store

from crfrefine.engines.compiled import find_levels

RECORDS = ROOT / "docs" / "reference" / "benchmarks.json"


def _measure(spec: WorkloadSpec, repeats: int) -> dict[str, Any]:
    folder = store(spec, BENCH / "data")
    workload = Workload(folder)
    systems = ("crfrefine", *spec.peers)
    saved = {system: BENCH / "results" / f"{spec.name}-{system}.npy" for system in systems}
    runs: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
    built, _, best = find_levels()
    lower = built[: built.index(best)][::-1]
    of_level: dict[str, list[float]] = {level: [] for level in lower}
    for repeat in range(repeats):
        for system in systems:
            run = run_worker(system, folder, save=saved[system] if repeat == 0 else None)
            runs[system].append(run)
            sys.stderr.write(f"  {spec.name} {system}: {run['seconds']:.2f} s, {run['peak_mib']:.0f} MiB\n")
        for level in lower:
            of_level[level].append(run_worker("crfrefine", folder, level=level)["seconds"])
            sys.stderr.write(f"  {spec.name} crfrefine, {level}: {of_level[level][-1]:.2f} s\n")
        if repeat == 0:
            checks = _check(spec, workload, folder, saved)
    levels = {best: [run["seconds"] for run in runs["crfrefine"]], **of_level}
    num_voxels = math.prod(workload.grid_shape) if workload.mask is None else int(workload.mask.sum())
    described = {"workload": workload.meta, "num_voxels": num_voxels}
    return {"runs": runs, "levels": levels, "checks": checks, **described, **_summarize(spec, runs)}


def _check(spec: WorkloadSpec, workload: Workload, folder: Path, saved: dict[str, Path]) -> dict[str, float]:
    ours = np.load(saved["crfrefine"])
    checks = check_against_exact_rows(workload)
    if "pydensecrf2" in spec.peers:
        theirs = np.load(saved["pydensecrf2"])
        checks["pydensecrf2_difference_rms"] = marginals_rms(ours, theirs)
        # With far more vertices than voxels a lattice is a poor approximation, and what was taken instead, held to exact rows above,
        # differs from it. That both do the same work is then seen from the same lattice: ours, which is not timed.
        most = MAX_MARGINAL_RMS
        if checks["pydensecrf2_difference_rms"] > MAX_MARGINAL_RMS:
            most = MAX_LATTICE_RMS
            run_worker("crfrefine", folder, save=saved["crfrefine"], filter="lattice")
            ours = np.load(saved["crfrefine"])
        checks |= check_marginals(ours, theirs, most)
    if "simplecrf" in spec.peers:
        checks |= check_labels(ours, np.load(saved["simplecrf"]).ravel())
    return checks


def _summarize(spec: WorkloadSpec, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    seconds = {system: min(run["seconds"] for run in of_system) for system, of_system in runs.items()}
    peak_mib = {system: min(run["peak_mib"] for run in of_system) for system, of_system in runs.items()}
    return {
        "seconds": seconds,
        "peak_mib": peak_mib,
        "speedup": min(seconds[peer] for peer in spec.peers) / seconds["crfrefine"],
        "memory_fraction": peak_mib["crfrefine"] / peak_mib["pydensecrf2"],
        "filters": runs["crfrefine"][0]["filters"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure crfrefine against other libraries.")
    parser.add_argument("--quick", action="store_true", help="small workloads, one run each; the documents stay as they are")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), metavar="NAME", help="these alone; the documents stay too")
    options = parser.parse_args()
    start, head = time.perf_counter(), environment.describe()
    names = options.workloads or (("S", "M") if options.quick else WORKLOADS)
    measured = {name: _measure(WORKLOADS[name], repeats=1 if options.quick else 3) for name in names}
    speedups = [record["speedup"] for record in measured.values()]
    figures = {
        "workloads": measured,
        "speedup_geometric_mean": statistics.geometric_mean(speedups),
        "speedup_worst": min(speedups),
        "memory_fraction_worst": max(record["memory_fraction"] for record in measured.values()),
    }
    record = {"environment": head, "took_seconds": time.perf_counter() - start, "figures": figures}
    text = report.tables(record)
    sys.stdout.write(text)
    partial = options.quick or options.workloads is not None
    target = BENCH / "results" / "partial.json" if partial else RECORDS
    target.write_text(json.dumps(record, indent=1) + "\n")
    if not partial:
        report.write_between_markers(ROOT / "docs" / "reference" / "benchmarks.md", "benchmarks", text)
    sys.stderr.write(f"records: {target.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
