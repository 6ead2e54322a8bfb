"""Fresh processes: one measured run of a worker, or one timed or measured command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers import WORKERS, interpreter

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def run_worker(system: str, workload: Path, *, save: Path | None = None, **options: str) -> dict[str, Any]:
    """Run a system once on a stored workload.

    Returns:
        What the worker measured: seconds, peak_mib, stages, the result's hash and the system's version.
    """
    command: list[str | Path] = [interpreter(system), WORKERS / f"run_{system}.py", workload]
    for name, value in options.items():
        command += [f"--{name}", value]
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        command += ["--save", save]
    done = subprocess.run(command, env=os.environ | ONE_THREAD, check=True, stdout=subprocess.PIPE, text=True)
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def measure_command(command: Sequence[str | Path]) -> dict[str, Any]:
    """What a command and its children need, start-up included: seconds, processor_seconds, peak_mib; `error`, its last line, if it fails.

    A small process starts it, because a child's peak counts from what its parent had resident.
    """
    launcher = [sys.executable, "-S", "-I", WORKERS / "run_command.py", *command]
    done = subprocess.run(launcher, check=True, stdout=subprocess.PIPE, text=True)
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def time_command(command: Sequence[str | Path]) -> float:
    """Wall seconds of a command, start-up included; an error if it fails."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return time.perf_counter() - start
