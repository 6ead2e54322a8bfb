"""The tests that need a GPU, and compute-sanitizer over every kernel: what they say goes to the screen and to the record as it comes."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peers import ROOT

import crfrefine
from crfrefine.engines.cuda.sources import kernel_source, source_names

TESTS = (
    "tests/engines/test_cuda_gpu.py",
    "tests/engines/test_cuda_held.py",
    "tests/engines/test_cuda_intensity.py",
    "tests/engines/test_cuda_transfers.py",
    "tests/engines/test_mean_field.py",
    "tests/engines/test_filters.py",
    "tests/engines/test_backward.py",
    "tests/engines/test_volume.py",
    "tests/layer/test_compile.py",
    "tests/layer/test_crf_loss.py",
    "tests/layer/test_cuda_layer.py",
    "tests/layer/test_layer_intensity.py",
    "tests/train/test_device.py",
)
# What must not be missing where a GPU is tested. Reading files is no part of it: tests that need nibabel may be left out.
_MISSED = re.compile(r"^SKIPPED .*(?:no NVIDIA GPU|needs a GPU|needs PyTorch|needs a PyTorch|needs CuPy|could not import 'cupy')")
TOOLS = ("memcheck", "initcheck", "racecheck")
_FAULT = 9  # what compute-sanitizer is asked to exit with
_KEPT_LINES = 4000
_SAVED_EVERY = 5.0  # seconds

Keep = Callable[[dict[str, Any]], None]


def tests_environment() -> dict[str, str]:
    """Of pytest: where the package is installed, the source tree must not hide it. In a checkout alone PYTHONPATH leads to it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    if Path(crfrefine.__file__).resolve().parent != ROOT / "crfrefine":
        return {**environment, "PYTHONSAFEPATH": "1"}
    return {**environment, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


def run_tests(keep: Keep) -> None:
    """Run the tests that need a GPU; `keep` is called with the outcome so far."""
    # Other people's warnings are their own business: which there are depends on what else is installed. A graph that could not be
    # recorded is a RuntimeWarning.
    options = [
        "-v",
        "-rs",
        "--tb=short",
        "-k",
        "cuda and not shim",
        "-p",
        "no:cacheprovider",
        "-W",
        "default",
        "-W",
        "error::RuntimeWarning",
    ]
    if importlib.util.find_spec("xdist") is not None:
        options += ["-n", "4"]  # most of the time goes into compiling kernels
    status, lines, found = _stream([sys.executable, "-m", "pytest", *options, *TESTS], tests_environment(), keep, seconds=None)
    found["skipped"] = [line for line in lines if line.startswith("SKIPPED")]
    missed = [line for line in found["skipped"] if _MISSED.match(line)]
    if status != 0:
        found["failed"] = f"pytest ended with status {status}: {lines[-1] if lines else 'it said nothing'}"
    elif missed:
        found["failed"] = f"{len(missed)} tests have not run: {missed[0]}"
    keep(found)


def sanitize(keep: Keep, *, seconds: float = 100.0) -> None:
    """Run every kernel on a small case under compute-sanitizer's tools; faults in CuPy's kernels alone are noted, and no failure."""
    program = find_sanitizer()
    if program is None:
        keep({"skipped": "compute-sanitizer is not installed (it comes with the CUDA toolkit)"})
        sys.stderr.write("  compute-sanitizer is not installed: skipped\n")
        return
    outcome: dict[str, Any] = {}
    own = re.compile(rf"\b(?:{'|'.join(sorted({kernel for name in source_names() for kernel in kernel_source(name, {}).kernels}))})\b")
    for tool in TOOLS:

        def keep_tool(found: dict[str, Any], tool: str = tool) -> None:
            keep({**outcome, tool: found})

        options = ["--tool", tool, "--error-exitcode", str(_FAULT), "--print-limit", "20"]
        script = str(Path(__file__).with_name("gpu_every_kernel.py"))
        command = [program, *options, sys.executable, script]
        status, lines, outcome[tool] = _stream(command, dict(os.environ), keep_tool, seconds=seconds)
        ours = [line for line in lines if line.startswith("=========") and own.search(line)]
        if status == _FAULT and ours:
            outcome.setdefault("failed", f"{tool}: {ours[0]}")
        elif status not in (0, _FAULT):
            outcome.setdefault("failed", f"{tool} did not finish: status {status}")
        outcome[tool]["note"] = "faults in kernels of CuPy's own" if status == _FAULT and not ours else ""
        keep(outcome)


def find_sanitizer() -> str | None:
    """The program: on the path, in a toolkit, or in one of NVIDIA's packages."""
    name = "compute-sanitizer"
    found = shutil.which(name)
    homes = [Path(os.environ[key]) for key in ("CUDA_HOME", "CUDA_PATH") if key in os.environ] + [Path("/usr/local/cuda")]
    spec = importlib.util.find_spec("nvidia")
    for package in [] if spec is None else spec.submodule_search_locations or []:
        homes += sorted(path for path in Path(package).iterdir() if path.is_dir())
    places = [home / folder / name for home in homes for folder in ("bin", "compute-sanitizer")]
    return found or next((str(place) for place in places if os.access(place, os.X_OK)), None)


def _stream(
    command: Sequence[str], environment: dict[str, str], keep: Keep, *, seconds: float | None
) -> tuple[int, list[str], dict[str, Any]]:
    """Run a command: its status, its last lines, and its entry for the record. The lines go to the screen at once."""
    started = saved = time.monotonic()
    lines: deque[str] = deque(maxlen=_KEPT_LINES)
    found: dict[str, Any] = {}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        limit = threading.Timer(seconds, process.kill) if seconds is not None else None
        if limit is not None:
            limit.start()
        for line in process.stdout:
            sys.stderr.write(line)
            lines.append(line.rstrip())
            if time.monotonic() - saved > _SAVED_EVERY:
                saved = time.monotonic()
                keep({"status": None, "seconds": saved - started, "output": list(lines)})
        status = process.wait()
        if limit is not None:
            limit.cancel()
    found |= {"status": status, "seconds": time.monotonic() - started, "output": list(lines)}
    return status, list(lines), found
