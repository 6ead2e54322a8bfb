"""The benchmark of the GPU as far as it goes without one: its messages, its records, its comparison, and that every kernel is run."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
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
def test_without_a_gpu_nothing_is_measured_and_nothing_written(tmp_path: Path) -> None:
    """Status 1 and what is missing, whatever was asked for."""
    before = _docs()
    for options in (["--check-only"], ["--tests", "--sanitize", "--write"], ["--workloads", "Lm-1.5mm", "CT"]):
        done = _run(sys.executable, BENCHMARKS / "gpu.py", "-o", tmp_path / "record.json", *options)
        assert done.returncode == 1
        assert done.stderr.startswith("benchmark: nothing to measure: --device cuda: no NVIDIA GPU was found")
    assert list(tmp_path.iterdir()) == []
    assert _docs() == before


@without_gpu
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_first_run_says_what_is_missing(tmp_path: Path) -> None:
    """It stops at the first part with status 1, and what was said is in the folder. Another part than there is: status 2."""
    done = _run("bash", BENCHMARKS / "gpu_first_run.sh", "all", tmp_path / "out")
    assert done.returncode == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["part1.log"]
    assert "no NVIDIA GPU was found" in (tmp_path / "out" / "part1.log").read_text(encoding="utf-8")
    assert _run("bash", BENCHMARKS / "gpu_first_run.sh", "4", tmp_path / "other").returncode == 2
    assert not (tmp_path / "other").exists()


@needs_compiler
def test_every_kernel_is_run_for_the_sanitizer(load: Any) -> None:
    """A new kernel must not go unwatched."""
    module = load("gpu_every_kernel")
    assert module.every_kernel() - module.run_all(cuda_shim.ShimDevice()) == set()


def test_the_tests_of_the_gpu_are_there(load: Any) -> None:
    """All files that have one, and no other."""
    listed = load("gpu_tests").TESTS
    texts = {path: path.read_text(encoding="utf-8") for path in ROOT.glob("tests/*/test_*.py")}
    found = {path for path, text in texts.items() if "needs a GPU" in text or "gpu_engine" in text}
    found |= {
        ROOT / "tests" / "engines" / f"test_{name}.py" for name in ("filters", "mean_field", "backward", "volume")
    }  # by their fixture
    found |= {ROOT / "tests" / "layer" / "test_layer_intensity.py"}
    assert {ROOT / name for name in listed} == found - {Path(__file__).resolve()}


def test_the_tests_meet_the_package_that_is_measured(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed one is not hidden by the source tree; a checkout alone is found."""
    module = load("gpu_tests")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    for package, expected in (
        (ROOT / ".venv" / "lib" / "site-packages" / "crfrefine", {"PYTHONSAFEPATH": "1", "PYTHONPATH": "elsewhere"}),
        (ROOT / "crfrefine", {"PYTHONPATH": f"{ROOT}{os.pathsep}elsewhere"}),
    ):
        monkeypatch.setattr(module, "crfrefine", ModuleType("crfrefine"))
        module.crfrefine.__file__ = str(package / "__init__.py")
        found = module.tests_environment()
        assert {name: found[name] for name in ("PYTHONSAFEPATH", "PYTHONPATH") if name in found} == expected


def test_output_is_kept_as_it_comes(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that is stopped has left its lines; its status says that it was stopped."""
    module, kept = load("gpu_tests"), []
    monkeypatch.setattr(module, "_SAVED_EVERY", 0.0)
    program = "import time\nfor n in range(3): print('line', n, flush=True)\ntime.sleep(60)"
    status, lines, found = module._stream([sys.executable, "-c", program], dict(os.environ), kept.append, seconds=5.0)
    assert status < 0
    assert lines == ["line 0", "line 1", "line 2"]
    assert [entry["output"] for entry in kept] == [lines[:1], lines[:2], lines]
    assert found["status"] == status


@needs_compiler
def test_results_that_differ_are_named_and_the_others_are_compared(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels as C++ against the CPU engine; then with one filter whose logits are off by more than rounding, and one that fails."""
    cases = load("gpu_cases")
    monkeypatch.setattr(cases, "SMALL", {"Lm": (9, 7, 6), "CT": (8, 6, 7)})
    saved: list[dict[str, Any]] = []
    shim, cpu = cuda_shim.shim_backend(), get_backend("cpu")
    cases.check(shim, cpu, lambda found: saved.append(dict(found)))
    assert [len(found) for found in saved] == [1, 2, 3, 4, 5, 6, 7]  # the grid for the CT alone, which has one modality
    assert all(entry.keys() == {"difference"} and entry["difference"] < 1e-3 for entry in saved[-1].values())

    class Wrong:
        def mean_field(self, logits: Any, image: Any, mask: Any, spacing: Any, spec: Any, **options: Any) -> Any:
            if spec.kernels.filter == "exact":
                raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")
            found = shim.mean_field(logits, image, mask, spacing, spec, **options)
            if spec.kernels.filter == "lattice":
                found.logits[1] += np.float32(0.01)
            return found

    cases.check(Wrong(), cpu, lambda found: saved.append(dict(found)))
    failed = {name: entry["failed"].splitlines()[-1] for name, entry in saved[-1].items() if "failed" in entry}
    assert sorted(failed) == ["CT-small.exact", "CT-small.lattice", "Lm-small.exact", "Lm-small.lattice"]
    assert failed["CT-small.exact"] == "RuntimeError: CUDA_ERROR_ILLEGAL_ADDRESS"
    assert failed["Lm-small.lattice"] == "logits differ from those expected by 0.01"


def _record(name: str, **changes: Any) -> dict[str, Any]:
    workload = {
        "grid_shape": [137, 173, 115],
        "voxels": 1_390_000,
        "vertices": 440_000,
        "seconds": 0.1,
        "seconds_a_step": 0.0005,
        "floor_seconds_a_step": 0.00025,
        "times_the_floor": 2.0,
        "copy_bytes_a_second": 4.2e12,
        "stage_seconds": {"upload": 0.031, "build": 0.004, "steps": 0.003, "download": 0.05},
        "peak_bytes": 2**30,
        "host_peak_bytes": None,
        "pinned_bytes": 2**29,
        "compile": {"empty_cache": {"compile": 12.3}},
        "warnings": [],
        "monai": {"skipped": "it has no masks"},
    }
    return {
        "complete": True,
        "environment": {
            "date": "2000-01-01",
            "source": "abc",
            "python": "3.12",
            "versions": {"numpy": "2"},
            "machine": {"cpu": "a processor", "cores": 16},
        },
        "device": {"gpu": "a GPU", "memory_gib": 139.0, "cupy": "14", "driver": 13000},
        "cpu_threads": 2,
        "compared_with": "CPU engine",
        "check": {"Lm-small.exact": {"difference": 1e-5}},
        "plain_torch": {"skipped": "torch is not installed"},
        "workloads": {name: workload},
        **changes,
    }


def test_tables_are_made_from_records_of_several_runs(tmp_path: Path) -> None:
    """Each stage, the compilation, memory and the copy's speed have columns of their own."""
    files = [tmp_path / "2.json", tmp_path / "3.json"]
    for file, name in zip(files, ("Lm", "CT"), strict=True):
        file.write_text(json.dumps(_record(name)), encoding="utf-8")
    done = _run(sys.executable, BENCHMARKS / "gpu.py", "--from-record", *files)
    assert done.returncode == 0, done.stderr
    header, row = (line for line in done.stdout.splitlines() if line.startswith(("| workload | voxels", "| Lm: 137×173×115")))
    cells = dict(zip(header.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    assert cells["copy"] == "4.20 TB/s"
    assert [cells[stage] for stage in ("upload", "build", "steps", "download")] == ["31.0 ms", "4.0 ms", "3.0 ms", "50.0 ms"]
    assert "| CT | 12.3 s | 1.00 GiB | not measured | 0.50 GiB |" in done.stdout


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (_record("Lm"), "both have Lm"),
        (_record("CT", device={"gpu": "another GPU"}), "another GPU"),
        ({}, "is no record"),
        (_record("CT", workloads={"CT": {"failed": "CUDA_ERROR_OUT_OF_MEMORY"}}), "CUDA_ERROR_OUT_OF_MEMORY"),
        (_record("CT", tests={"failed": "pytest ended with status 1"}), "pytest ended with status 1"),
    ],
    ids=["the same workload", "another GPU", "something else", "a failure", "failed tests"],
)
def test_records_that_do_not_fit_or_failed_are_not_written(other: dict[str, Any], message: str, tmp_path: Path) -> None:
    """The documentation stays as it was."""
    before = _docs()
    for name, content in (("2", _record("Lm")), ("3", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    done = _run(sys.executable, BENCHMARKS / "gpu.py", "--from-record", tmp_path / "2.json", tmp_path / "3.json", "--write")
    assert done.returncode == 1
    assert message in done.stderr
    assert _docs() == before


def test_a_record_is_on_disk_whenever_there_is_more_and_replaces_none(load: Any, tmp_path: Path) -> None:
    """What a stopped run leaves is whole, and says that it is not complete."""
    module, path = load("gpu_record"), tmp_path / "out" / "record.json"
    record = module.Record(path)
    record.save(check={"a": {"difference": 0.0}})
    assert json.loads(path.read_text(encoding="utf-8")) == {"complete": False, "check": {"a": {"difference": 0.0}}}
    record.save(workloads={"Lm": {}}, complete=True)
    assert json.loads(path.read_text(encoding="utf-8"))["complete"] is True
    assert [entry.name for entry in path.parent.iterdir()] == ["record.json"]
    with pytest.raises(SystemExit, match="is there already"):
        module.Record(path)
