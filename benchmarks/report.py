"""Benchmark records to the tables of `docs/reference/benchmarks.md`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A header and rows of cells as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _speed(figures: dict[str, Any]) -> str:
    rows = []
    for name, record in figures["workloads"].items():
        workload = record["workload"]
        of = "×".join(map(str, workload["grid_shape"])) + (" (brain in it)" if workload["brain"] == "mask" else "")
        seconds, peak = record["seconds"], record["peak_mib"]
        rows.append(
            [
                f"{name}: {of}",
                f"{len(workload['grid_shape']) + workload['num_modalities']}, {workload['num_labels']}",
                f"{workload['theta_alpha']:g}, {workload['theta_beta']:g}, {workload['theta_gamma']:g}",
                f"**{seconds['crfrefine']:.3f} s**, {peak['crfrefine']:.0f} MiB",
                f"{seconds['pydensecrf2']:.2f} s, {peak['pydensecrf2']:.0f} MiB",
                f"{seconds['simplecrf']:.2f} s, {peak['simplecrf']:.0f} MiB" if "simplecrf" in seconds else "has no masks",
                f"**{record['speedup']:.1f}×**",
                f"1/{1 / record['memory_fraction']:.1f}",
                record["filters"][0].split(": ", 1)[-1],
            ]
        )
    header = ["workload", "D, labels", "theta_alpha, theta_beta, theta_gamma", "crfrefine", "pydensecrf2", "SimpleCRF"]
    header += ["speed-up over the faster peer", "memory relative to pydensecrf2's", "appearance filter"]
    mean, worst, memory = (figures[key] for key in ("speedup_geometric_mean", "speedup_worst", "memory_fraction_worst"))
    summary = f"Speed-ups: {mean:.1f}× in the geometric mean, {worst:.1f}× at worst. At most 1/{1 / memory:.1f} of pydensecrf2's memory.\n"
    more = _levels(figures) + _checks(figures)
    return "### Speed and memory, one thread\n\n" + markdown_table(header, rows) + "\n" + summary + "\n" + more


def _levels(figures: dict[str, Any]) -> str:
    """A column per instruction set."""
    workloads = figures["workloads"]
    names = list(next(iter(workloads.values()))["levels"])
    rows, speedups = [], {name: [] for name in names}
    for workload, record in workloads.items():
        row = [workload]
        for name in names:
            seconds = min(record["levels"][name])
            speedups[name].append(record["speedup"] * record["seconds"]["crfrefine"] / seconds)
            row.append(f"{seconds:.3f} s, {speedups[name][-1]:.1f}×")
        rows.append(row)
    rows.append(["geometric mean", *(f"**{statistics.geometric_mean(of):.1f}×**" for of in speedups.values())])
    rows.append(["worst", *(f"**{min(of):.1f}×**" for of in speedups.values())])
    title = "By instruction set (`CRFREFINE_CPU_LEVEL`), with the speed-up over the faster peer:\n\n"
    return title + markdown_table(["workload", *names], rows) + "\n"


def _checks(figures: dict[str, Any]) -> str:
    rows = []
    for name, record in figures["workloads"].items():
        checks = record["checks"]
        rows.append(
            [
                name,
                f"{100 * checks['message_relative_rms']:.2f} %",
                f"{checks['pydensecrf2_difference_rms']:.4f}",
                f"{checks['pydensecrf2_marginals_rms']:.4f}",
                f"{100 * checks['pydensecrf2_label_agreement']:.2f} %",
                f"{100 * checks['simplecrf_label_agreement']:.2f} %" if "simplecrf_label_agreement" in checks else "–",
            ]
        )
    header = [
        "workload",
        "one message against exact rows, relative RMS",
        "marginals against pydensecrf2's, RMS",
        "the same with our lattice, if another filter was used and the difference is above 0.03",
    ]
    return "Checks before the times counted:\n\n" + markdown_table(
        [*header, "labels equal to pydensecrf2's", "labels equal to SimpleCRF's"], rows
    )


def provenance(record: dict[str, Any]) -> str:
    environment = record["environment"]
    machine, versions = environment["machine"], environment["versions"]
    torch = f", torch {versions['torch']}" if "torch" in versions else ""
    load = f" (load before: {environment['load_before']})" if "load_before" in environment else ""
    return (
        f"*{environment['date']}, sources {environment['source']}, {machine['cpu']}, {machine['cores']} cores{load}, "
        f"Python {environment['python']}, numpy {versions['numpy']}{torch}.*\n"
    )


def tables(record: dict[str, Any]) -> str:
    """The record of `run.py` as Markdown."""
    return f"{_speed(record['figures'])}\n{provenance(record)}"


def write_between_markers(document: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`."""
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    before, _, rest = document.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{document.name} has no markers {begin.strip()} and {end}")
    document.write_text(before + begin + "\n" + text.strip() + "\n\n" + end + after)
