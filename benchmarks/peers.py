"""The other libraries, each installed from the package index into an environment of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / ".bench"
WORKERS = Path(__file__).resolve().parent / "workers"

INSTALLS: dict[str, tuple[tuple[str, ...], ...]] = {
    "pydensecrf2": (("pydensecrf2", "numpy"),),
    "simplecrf": (("numpy<2", "setuptools", "wheel"), ("--no-build-isolation", "SimpleCRF==0.2.1.1")),
}


def interpreter(system: str) -> Path:
    """The Python that runs a system's worker, this one but for the peers; installs a peer that is not there yet."""
    if system not in INSTALLS:
        return Path(sys.executable)
    home = BENCH / "env" / system
    python = home / "bin" / "python"
    complete = home / "complete"
    if not complete.exists():
        sys.stderr.write(f"installing {system} into {home.relative_to(ROOT)}\n")
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        for requirements in INSTALLS[system]:
            subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements], check=True)
        complete.touch()
    return python
