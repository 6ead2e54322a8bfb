"""Run the scripts of the study, as `make study` does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TABLES = ("summary", "study", "size", "quality", "calibration", "cost", "label-maps", "paper")
"""The markers of the tables in `docs/reference/results.md`."""


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    # Its own folder, which PYTHONSAFEPATH keeps off the path of imports, and no package from there but what the tests have.
    path = os.pathsep.join([str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, BENCHMARKS / name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=900, env=os.environ | {"PYTHONPATH": path})
