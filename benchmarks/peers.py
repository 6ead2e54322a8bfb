"""The other libraries: each has an environment of its own, and is measured in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts import BENCH, ROOT

WORKERS = Path(__file__).resolve().parent / "workers"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

INSTALLS: dict[str, tuple[tuple[str, ...], ...]] = {
    "pydensecrf2": (("pydensecrf2", "numpy"),),
    "simplecrf": (
        ("numpy<2", "setuptools", "wheel"),
        ("--no-build-isolation", "SimpleCRF==0.2.1.1"),
    ),
}


def interpreter(system: str) -> Path:
    """The Python that runs a system's worker, this one but for the peers.

    Installs a peer that is not there yet.
    """
    if system not in INSTALLS:
        return Path(sys.executable)
    home = BENCH / "env" / system
    python = home / "bin" / "python"
    complete = home / "complete"
    if not complete.exists():
        sys.stderr.write(f"installing {system} into {home.relative_to(ROOT)}\n")
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        for requirements in INSTALLS[system]:
            subprocess.run(
                [
                    python,
                    "-m",
                    "pip",
                    "install",
                    "--quiet",
                    "--disable-pip-version-check",
                    *requirements,
                ],
                check=True,
            )
        complete.touch()
    return python


def run_measured(command: Sequence[str | Path]) -> dict[str, Any]:
    """Run a process on one thread; return the figures of the last line that it prints."""
    done = subprocess.run(
        command, env=os.environ | ONE_THREAD, check=True, stdout=subprocess.PIPE, text=True
    )
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def run_worker(
    system: str, workload: Path, *, save: Path | None = None, **options: str
) -> dict[str, Any]:
    """Run a system once on a stored workload.

    Return seconds, peak_mib, the result's hash and the system's version.
    """
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    command: list[str | Path] = [
        interpreter(system),
        WORKERS / f"run_{system}.py",
        workload,
        *words,
    ]
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        command += ["--save", save]
    return run_measured(command)
