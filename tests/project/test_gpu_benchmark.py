"""The benchmark of the GPU as far as it goes without one: steps and limits, comparison, tables, and that every kernel is run."""

from __future__ import annotations

import importlib
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

from crfrefine.engines import get_backend
from crfrefine.engines.cuda.cupy_device import num_driver_devices

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"

needs_compiler = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")
without_gpu = pytest.mark.skipif(num_driver_devices() > 0, reason="there is a GPU")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a module of the benchmarks, which are no package."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def _run(*command: object, **changes: str) -> subprocess.CompletedProcess[str]:
    """With the package that the tests have on the path, and the benchmarks' folder."""
    path = os.pathsep.join([str(BENCHMARKS), *sys.path[1:]])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHON": sys.executable, **changes}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=300, env=environment)


def _docs() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted((ROOT / "docs" / "reference").iterdir()) if path.is_file()}


@without_gpu
def test_without_a_gpu_each_step_says_so(tmp_path: Path) -> None:
    """Status 1, and a line with what is missing beside what is known without a GPU."""
    lines = tmp_path / "lines.jsonl"
    done = _run(sys.executable, BENCHMARKS / "gpu.py", "environment", "-o", lines)
    assert done.returncode == 1
    known, missing = (json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines())
    assert known["environment"]["versions"]["cupy-cuda13x"] == "not installed"
    assert "--device cuda: no NVIDIA GPU was found" in missing["failed"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_first_run_has_three_calls(tmp_path: Path) -> None:
    """Another one: status 2, and nothing is written."""
    assert _run("bash", BENCHMARKS / "gpu_first_run.sh", "4", tmp_path / "other").returncode == 2
    assert not (tmp_path / "other").exists()


def test_every_call_ends_in_time(load: Any) -> None:
    """With every step at its limit, and 30 seconds for unpacking wheels. Nothing is timed beside anything else, and files are few."""
    steps = load("gpu_steps")
    found = steps.calls(Path("lines.jsonl"), Path("record.npz"))
    assert sorted(found) == [1, 2, 3]
    for call in found.values():
        assert steps.longest(call) <= steps.MOST_SECONDS <= 560 - 30
        names = [step.name for together in call for step in together]
        assert len(set(names)) == len(names)
        assert all(len(together) == 1 for together in call if together[0].name.startswith(("time", "replay")))
        after = [step.only_after for together in call for step in together if step.only_after]
        assert set(after) <= set(names)
    contacts = [step.environment.get("CRFREFINE_CUDA") for together in found[1] for step in together if step.name.startswith("contact")]
    assert contacts == sorted(contacts, key=lambda mode: mode != "plain")  # the plain mode comes first


def test_a_step_that_hangs_is_ended_with_all_that_it_started(load: Any, tmp_path: Path) -> None:
    """The steps beside and after it run, those that depend on failures run after failures alone, and each has a line."""
    steps = load("gpu_steps")
    hangs = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    lines, log = tmp_path / "call.jsonl", tmp_path / "call.log"
    python = [sys.executable, "-S", "-c"]
    call = [
        [steps.Step("hangs", 2, [*python, hangs]), steps.Step("beside", 30, [*python, "print('there')"])],
        [steps.Step("fails", 30, [*python, "raise SystemExit('wrong')"], {"A": "1"})],
        [steps.Step("absent", 30, [])],
        [steps.Step("after", 30, [*python, "import os; print(os.environ['B'])"], {"B": "2"}, only_after="fails")],
        [steps.Step("not after", 30, [*python, "raise SystemExit(1)"], only_after="beside")],
    ]
    steps.run_call(call, lines, log)
    found = {line["name"]: line for line in steps.read_lines([lines])}
    assert {name: line["outcome"] for name, line in found.items()} == {
        "beside": "done",
        "hangs": "ended at its limit",
        "fails": "failed",
        "absent": "skipped",
        "after": "done",
    }
    assert found["fails"]["said"] == "wrong"
    assert steps.failed_runs(found.values()) == ["hangs: ended at its limit", "fails: failed"]
    state = Path(f"/proc/{int(found['hangs']['said'])}/stat")
    assert not state.exists() or state.read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z"
    assert "==== after: done, status 0\n2\n" in log.read_text(encoding="utf-8")


def test_the_tests_of_the_gpu_are_there(load: Any) -> None:
    """All files that have one, and no other."""
    listed = load("gpu_steps").TESTS
    texts = {path: path.read_text(encoding="utf-8") for path in ROOT.glob("tests/*/test_*.py")}
    found = {path for path, text in texts.items() if "needs a GPU" in text or "gpu_engine" in text}
    found |= {
        ROOT / "tests" / "engines" / f"test_{name}.py" for name in ("filters", "mean_field", "backward", "volume")
    }  # by their fixture
    found |= {ROOT / "tests" / "layer" / "test_layer_intensity.py"}
    assert {ROOT / name for name in listed} == found - {Path(__file__).resolve()}


@needs_compiler
def test_results_that_differ_are_named(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels as C++ against the CPU engine; then with logits that are off by more than rounding, and with a warning."""
    cases = load("gpu_cases")
    monkeypatch.setattr(cases, "SMALL", {"CT": (8, 6, 7)})
    shim, cpu = cuda_shim.shim_backend(), get_backend("cpu")
    for name in ("exact", "grid"):
        entry = cases.contact(shim, cpu, "CT", name)
        assert entry.keys() == {"difference"}
        assert entry["difference"] < 1e-3

    class Wrong:
        def mean_field(self, *arguments: Any, **options: Any) -> Any:
            warnings.warn("the GPU's steps could not be recorded", RuntimeWarning, stacklevel=1)
            found = shim.mean_field(*arguments, **options)
            found.logits[1] += np.float32(0.01)
            return found

    text = "logits differ from those expected by 0.01"
    assert cases.contact(Wrong(), cpu, "CT", "exact")["failed"].startswith(f"{text}; the GPU's steps could not be recorded")


def _lines(name: str, **changes: Any) -> list[dict[str, Any]]:
    workload = {
        "grid_shape": [137, 173, 115],
        "voxels": 1_390_000,
        "vertices": 440_000,
        "filters": ["lattice"],
        "seconds": 0.1,
        "first_seconds": 12.3,
        "seconds_a_step": 0.0005,
        "floor_seconds_a_step": 0.00025,
        "times_the_floor": 2.0,
        "copy_bytes_a_second": 4.2e12,
        "stage_seconds": {"upload": 0.031, "build": 0.004, "steps": 0.003, "download": 0.05},
        "peak_bytes": 2**30,
        "host_peak_bytes": None,
        "pinned_bytes": 2**29,
        "warnings": [],
    }
    environment = {
        "date": "2000-01-01",
        "source": "abc",
        "python": "3.12",
        "versions": {"numpy": "2"},
        "machine": {"cpu": "a processor", "cores": 16},
    }
    device = {"gpu": "a GPU", "memory_gib": 139.0, "cupy": "14", "driver": 13000, **changes.pop("device", {})}
    what = {"workload": name, "filter": "lattice", "mode": "all"}
    return [
        {"step": "environment", **what, "environment": environment, "cpu_threads": 2},
        {"step": "environment", **what, "device": device},
        {"step": "contact", **what, "difference": 1e-5},
        {"step": "time", **what, **workload},
        {"step": "time", **what, "monai": {"skipped": "it has no masks"}},
        {"step": "run", "name": "a step", "outcome": changes.pop("outcome", "done")},
        {"step": "kernel", "kernel": "blur", **changes},
    ]


def _write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": "ti', encoding="utf-8")  # the last one was cut off
    return path


def test_tables_are_made_from_the_lines_of_several_calls(load: Any, tmp_path: Path) -> None:
    """Each stage, memory and the copy's speed have columns of their own; what comes later adds to the same workload."""
    module = load("gpu_tables")
    text = module.tables(module.gathered([_write(tmp_path / "1", _lines("Lm")), _write(tmp_path / "3", _lines("CT"))]))
    header, row = (line for line in text.splitlines() if line.startswith(("| workload | voxels", "| Lm: 137×173×115")))
    cells = dict(zip(header.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    assert cells["copy"] == "4.20 TB/s"
    assert cells["MONAI's CRF"] == "it has no masks"
    assert [cells[stage] for stage in ("upload", "build", "steps", "download")] == ["31.0 ms", "4.0 ms", "3.0 ms", "50.0 ms"]
    assert "| CT | 12.3 s | 1.00 GiB | not measured | 0.50 GiB |" in text


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (_lines("CT", device={"gpu": "another GPU"}), "another GPU"),
        ([], "is no record"),
        (_lines("CT", outcome="ended at its limit"), "a step: ended at its limit"),
    ],
    ids=["another GPU", "nothing", "a failed step"],
)
def test_records_that_do_not_fit_or_failed_are_not_written(load: Any, other: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    """The documentation stays as it was."""
    before = _docs()
    module = load("gpu_tables")
    files = [_write(tmp_path / "1", _lines("Lm")), _write(tmp_path / "3", other)]
    with pytest.raises(SystemExit, match=message):
        module.write(module.gathered(files))
    assert _docs() == before
