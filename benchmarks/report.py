"""What pages of figures share: tables in Markdown, and where figures belong to.

And the tables of `docs/reference/benchmarks.md`.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from scripts import ROOT

import crfrefine

_LOAD_BEFORE = os.getloadavg()[0]  # before the benchmark's own work: near 0 on a quiet machine


def source_hash() -> str:
    """The first 12 digits of a hash over everything the engine and the command are built from."""
    digest = hashlib.sha256()
    files = [
        path
        for folder in ("crfrefine", "kernels", "configs")
        for path in sorted((ROOT / folder).rglob("*"))
    ]
    for path in [*files, ROOT / "CMakeLists.txt"]:
        if path.is_file() and path.suffix in {".py", ".cpp", ".cu", ".h", ".toml", ".txt"}:
            digest.update(path.relative_to(ROOT).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        # A checkout on a machine that has only what the benchmark needs.
        return "not installed"


def describe(*packages: str) -> dict[str, Any]:
    """The record's head; `packages` are named in it besides the usual ones."""
    models = re.findall(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "source": source_hash(),
        "crfrefine": crfrefine.__version__,
        "python": platform.python_version(),
        "load_before": round(_LOAD_BEFORE, 1),
        "versions": {
            name: _version(name) for name in ("numpy", "scipy", "nibabel", "isal", *packages)
        },
        "machine": {
            "cpu": models[0] if models else platform.processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(
                os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1
            ),
            "system": f"{platform.system()} {platform.machine()}",
        },
    }


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A header and rows of cells as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def provenance(environment: dict[str, Any]) -> str:
    """What `describe` has found, in lines of at most 100 columns."""
    machine = environment["machine"]
    versions = environment["versions"]
    torch = f", torch {versions['torch']}" if "torch" in versions else ""
    load = f" (load before: {environment['load_before']})" if "load_before" in environment else ""
    origin = (
        f"*{environment['date']}, sources {environment['source']}, {machine['cpu']}, "
        f"{machine['cores']} cores{load}, "
        f"Python {environment['python']}, numpy {versions['numpy']}{torch}.*"
    )
    return textwrap.fill(origin, 100) + "\n"


def write_between_markers(document: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`."""
    begin = f"<!-- {name}:begin -->\n"
    end = f"<!-- {name}:end -->"
    before, _, rest = document.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{document.name} has no markers {begin.strip()} and {end}")
    document.write_text(before + begin + "\n" + text.strip() + "\n\n" + end + after)


def tables(record: dict[str, Any]) -> str:
    """The record of `run.py` as Markdown."""
    figures = record["figures"]
    workloads = record["figures"]["workloads"]
    mean, worst, memory = (
        figures[key] for key in ("speedup_geometric_mean", "speedup_worst", "memory_fraction_worst")
    )
    return (
        f"### Speed and memory, one thread\n\n{_speed(workloads)}\n"
        f"Speed-ups: {mean:.1f}× in the geometric mean, {worst:.1f}× at worst. At most "
        f"1/{1 / memory:.1f} of pydensecrf2's memory.\n\n"
        "By instruction set (`CRFREFINE_CPU_LEVEL`), with the speed-up over the faster "
        f"peer:\n\n{_levels(workloads)}\n"
        "Checks before the times "
        f"counted:\n\n{_checks(workloads)}\n{provenance(record['environment'])}"
    )


def _speed(workloads: dict[str, Any]) -> str:
    rows = []
    for name, record in workloads.items():
        workload = record["workload"]
        seconds = record["seconds"]
        peak = record["peak_mib"]
        of = "×".join(map(str, workload["grid_shape"])) + (
            " (brain in it)" if workload["brain"] == "mask" else ""
        )
        rows.append(
            [
                f"{name}: {of}",
                f"{len(workload['grid_shape']) + workload['num_modalities']}, "
                f"{workload['num_labels']}",
                f"{workload['theta_alpha']:g}, {workload['theta_beta']:g}, "
                f"{workload['theta_gamma']:g}",
                f"**{seconds['crfrefine']:.3f} s**, {peak['crfrefine']:.0f} MiB",
                f"{seconds['pydensecrf2']:.2f} s, {peak['pydensecrf2']:.0f} MiB",
                f"{seconds['simplecrf']:.2f} s, {peak['simplecrf']:.0f} MiB"
                if "simplecrf" in seconds
                else "has no masks",
                f"**{record['speedup']:.1f}×**",
                f"1/{1 / record['memory_fraction']:.1f}",
                record["filters"][0].split(": ", 1)[-1],
            ]
        )
    header = [
        "workload",
        "D, labels",
        "theta_alpha, theta_beta, theta_gamma",
        "crfrefine",
        "pydensecrf2",
        "SimpleCRF",
    ]
    header += [
        "speed-up over the faster peer",
        "memory relative to pydensecrf2's",
        "appearance filter",
    ]
    return markdown_table(header, rows)


def _levels(workloads: dict[str, Any]) -> str:
    """A column per instruction set."""
    names = list(next(iter(workloads.values()))["levels"])
    rows = []
    speedups = {name: [] for name in names}
    for workload, record in workloads.items():
        row = [workload]
        for name in names:
            seconds = min(record["levels"][name])
            speedups[name].append(record["speedup"] * record["seconds"]["crfrefine"] / seconds)
            row.append(f"{seconds:.3f} s, {speedups[name][-1]:.1f}×")
        rows.append(row)
    for title, of_all in (("geometric mean", statistics.geometric_mean), ("worst", min)):
        rows.append([title, *(f"**{of_all(own):.1f}×**" for own in speedups.values())])
    return markdown_table(["workload", *names], rows)


def _checks(workloads: dict[str, Any]) -> str:
    rows = []
    for name, record in workloads.items():
        checks = record["checks"]
        shares = [checks.get(f"{peer}_label_agreement") for peer in ("pydensecrf2", "simplecrf")]
        distances = [
            f"{checks[f'pydensecrf2_{what}_rms']:.4f}" for what in ("difference", "marginals")
        ]
        agreements = ["–" if share is None else f"{100 * share:.2f} %" for share in shares]
        rows.append(
            [name, f"{100 * checks['message_relative_rms']:.2f} %", *distances, *agreements]
        )
    header = [
        "workload",
        "one message against exact rows, relative RMS",
        "marginals against pydensecrf2's, RMS",
        "the same with our lattice, if another filter was used and the difference is above 0.03",
        "labels equal to pydensecrf2's",
        "labels equal to SimpleCRF's",
    ]
    return markdown_table(header, rows)
