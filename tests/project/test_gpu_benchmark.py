"""The benchmark of the GPU as far as it goes without one: steps and limits, comparison, tables, and that every kernel is run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_shim
import numpy as np
import pytest
from script_imports import importing_from

from crfrefine.engines import get_backend

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
SITE = ROOT / "tests" / "helpers" / "pretended_site"

needs_compiler = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")


@pytest.fixture
def load() -> Iterator[Any]:
    """Imports a module of the benchmarks, which are no package."""
    with importing_from(BENCHMARKS) as found:
        yield found


def _run(*command: object, site: Path = BENCHMARKS, **changes: str) -> subprocess.CompletedProcess[str]:
    """Python, with the package that the tests have on the path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(BENCHMARKS), *sys.path[1:]]), **changes}
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": False, "timeout": 300, "env": environment}
    return subprocess.run([sys.executable, *map(str, command)], **options)


@pytest.mark.long
@needs_compiler
def test_with_a_gpu_each_step_finds_what_it_is_for(load: Any, tmp_path: Path) -> None:
    """On a stand-in for CuPy, whose memory is numpy's: what runs behind "a GPU is there", and tables."""
    lines = tmp_path / "lines.jsonl"
    for step in ("environment", "contact Lm refine", "time Lm-1.5mm lattice", "refine Lm"):
        done = _run(BENCHMARKS / "gpu.py", *step.split(), "-o", lines, site=SITE, PRETENDED_CUPY="1", GPU_SHAPE="7x5x6")
        assert done.returncode == 0, (step, done.stdout, done.stderr)
    tables = load("gpu_tables")
    found = tables.gathered([lines])
    assert found["contact"]["Lm refine"].keys().isdisjoint({"failed", "skipped"})
    assert found["workloads"]["Lm-1.5mm"]["cpu"]["seconds"] > 0.0
    assert "| Lm-1.5mm: 7×5×6 |" in tables.tables(found)
    assert [line["attempt"] for line in tables.read_lines([lines]) if line["step"] == "refine"] == ["first", "second"]
    other, page = tmp_path / "other.jsonl", ROOT / "docs" / "reference" / "benchmarks.md"
    before = page.read_bytes()
    other.write_text(json.dumps({"step": "run", "name": "a step", "outcome": "ended at its limit"}) + '\n{"step": "ti', encoding="utf-8")
    with pytest.raises(SystemExit, match=r"other\.jsonl: no step found a GPU|a step: ended at its limit"):
        tables.write(tables.gathered([lines, other]))
    other.write_text(json.dumps({"device": {"name": "another GPU"}}) + "\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="another GPU"):
        tables.gathered([lines, other])
    assert page.read_bytes() == before


def test_every_call_ends_in_time(load: Any, tmp_path: Path) -> None:
    """With every step at its limit. Nothing is timed beside anything else."""
    steps = load("gpu_first_run")
    found = steps.calls(tmp_path / "lines.jsonl", tmp_path / "record.npz", [tmp_path / "a.whl"], tmp_path)
    assert sorted(found) == [1, 2, 3]
    for call in found.values():
        assert steps.longest(call) <= steps.MOST_SECONDS < 560
        names = [step.name for together in call for step in together]
        assert len(set(names)) == len(names)
        assert all(len(together) == 1 for together in call if together[0].name.startswith(("time", "replay")))
    modes = [
        {step.environment.get("CRFREFINE_CUDA", "all") for step in together}
        for together in found[1]
        if together[0].name.startswith("contact")
    ]
    assert modes == [{"plain"}, {"all"}]


def test_a_step_that_hangs_is_ended_with_all_that_it_started(load: Any, tmp_path: Path) -> None:
    """The steps beside and after it run, and each has a line."""
    steps = load("gpu_first_run")
    hangs = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    lines = tmp_path / "call.jsonl"
    python = [sys.executable, "-S", "-c"]
    call = [
        [steps.Step("hangs", 2, [*python, hangs]), steps.Step("beside", 30, [*python, "print('there')"])],
        [steps.Step("fails", 30, [*python, "raise SystemExit('wrong')"])],
        [steps.Step("absent", 30, [])],
        [steps.Step("no program", 30, [tmp_path / "none"])],
        [steps.Step("after", 30, [*python, "import os; print(os.environ['B'])"], {"B": "2"})],
    ]
    steps.run_call(call, lines)
    found = {line["name"]: line for line in steps.read_lines([lines])}
    assert {name: line["outcome"] for name, line in found.items()} == {
        "beside": "done",
        "hangs": "ended at its limit",
        "fails": "failed",
        "absent": "skipped",
        "no program": "failed",
        "after": "done",
    }
    assert found["fails"]["said"] == "wrong"
    assert steps.failed_runs(found.values()) == ["hangs: ended at its limit", "fails: failed", "no program: failed"]
    state = Path(f"/proc/{int(found['hangs']['said'])}/stat")
    assert not state.exists() or state.read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z"
    assert "==== after: done, status 0\n2\n" in (tmp_path / "call.log").read_text(encoding="utf-8")


@pytest.mark.long
def test_no_test_for_a_gpu_is_missed(load: Any, tmp_path: Path) -> None:
    """Call 2 has all files that `gpu_tests` finds; of a file that it does not find, or that has no marker, this very test run complains."""
    found = load("gpu_first_run").calls(tmp_path, tmp_path, [], tmp_path)[2]
    names = {step.name for together in found for step in together}
    assert {"test engines/test_spatial", "test engines/test_cuda_gpu", "test train/test_device", "test arrays/test_padding"} <= names
    assert "test project/test_gpu_benchmark" not in names
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    path = f"pythonpath={ROOT / 'tests' / 'helpers'}"
    options = ["-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, "-o", path, "-p", "no:cacheprovider"]
    test, skip = tmp_path / "test_it.py", "import pytest\n\ndef test_it():\n    pytest.skip('needs a GPU and CuPy')\n"
    for text, status, message in (
        (skip.replace("def", "@pytest.mark." + "gpu\ndef"), 4, "tests for a GPU that gpu_tests.files() does not find"),
        (skip, 1, "a test that needs a GPU has no marker"),
    ):
        test.write_text(text, encoding="utf-8")
        done = _run("-m", "pytest", *options, test)
        assert (done.returncode, message in done.stdout + done.stderr) == (status, True), done.stdout


@needs_compiler
def test_results_that_differ_are_named(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels as C++ against the CPU engine; then with logits that are off by more than rounding, and with a warning."""
    cases = load("gpu_cases")
    monkeypatch.setattr(cases, "SMALL", {"CT": (8, 6, 7)})
    shim, cpu = cuda_shim.shim_backend(), get_backend("cpu")
    for name in ("exact", "grid"):
        entry = cases.contact(shim, cpu, "CT", name)
        assert entry.keys() == {"difference"}, entry
        assert entry["difference"] < 1e-3

    class Wrong:
        def mean_field(self, *arguments: Any, **options: Any) -> Any:
            warnings.warn("something about the GPU", RuntimeWarning, stacklevel=1)
            found = shim.mean_field(*arguments, **options)
            found.logits[1] += np.float32(0.01)
            return found

    text = "logits differ from those expected by 0.01"
    assert cases.contact(Wrong(), cpu, "CT", "exact")["failed"].startswith(f"{text}; something about the GPU")
