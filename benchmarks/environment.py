"""What a figure belongs to: versions, machine, and a hash of the sources it was measured on."""

from __future__ import annotations

import hashlib
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peers import ROOT

import crfrefine

_DEPENDENCIES = ("numpy", "scipy", "nibabel", "isal")

_LOAD_BEFORE = os.getloadavg()[0]
"""Before the benchmark's own work: near 0 on a quiet machine."""


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def source_hash() -> str:
    """The first 12 digits of a hash over everything the engine and the command are built from."""
    digest = hashlib.sha256()
    files = [path for folder in ("crfrefine", "kernels", "configs") for path in sorted((ROOT / folder).rglob("*")) if path.is_file()]
    for path in [*files, ROOT / "CMakeLists.txt"]:
        if path.suffix in {".py", ".cpp", ".cu", ".h", ".toml", ".txt"}:
            digest.update(path.relative_to(ROOT).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"  # a checkout on a machine that has only what the benchmark at hand needs


def describe(*packages: str) -> dict[str, Any]:
    """The record's head; `packages` are named in it besides the usual ones."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "source": source_hash(),
        "crfrefine": crfrefine.__version__,
        "python": platform.python_version(),
        "load_before": round(_LOAD_BEFORE, 1),
        "versions": {name: _version(name) for name in (*_DEPENDENCIES, *packages)},
        "machine": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
            "system": f"{platform.system()} {platform.machine()}",
        },
    }
