"""The first run on a GPU as far as it goes without one: steps, and the record of the kernels with its player, on a stand-in for CuPy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cuda_shim
import numpy as np
import pytest
from pretended_gpus import SITE
from script_imports import importing_from

from crfrefine.engines.cuda.backend import CudaBackend
from crfrefine.engines.grid_image import GridImage
from crfrefine.parameters.specs import KernelSetSpec, KernelSpec

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

needs_compiler = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")


@pytest.fixture
def load(monkeypatch):
    """Imports a module of the benchmarks, which are no package; processes have the same path, and find a GPU."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SITE), str(BENCHMARKS), *sys.path[1:]]))
    monkeypatch.setenv("PRETENDED_CUPY", "1")
    with importing_from(BENCHMARKS) as found:
        yield found


@pytest.mark.long
@needs_compiler
def test_each_step_finds_what_it_is_for(load, tmp_path, monkeypatch):
    lines = tmp_path / "lines.jsonl"
    monkeypatch.setenv("GPU_SHAPE", "7x5x6")
    for step in ("environment", "contact Lm refine", "time Lm-1.5mm lattice", "refine Lm"):
        command = [sys.executable, BENCHMARKS / "gpu.py", *step.split(), "-o", lines]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, (step, done.stdout, done.stderr)
    tables = load("gpu_tables")
    found = tables.gathered([lines])
    assert found["contact"]["Lm refine"].keys().isdisjoint({"failed", "skipped"})
    assert found["workloads"]["Lm-1.5mm"]["cpu"]["seconds"] > 0.0
    assert "| Lm-1.5mm: 7×5×6 |" in tables.tables(found)


def test_a_step_that_hangs_is_ended_with_all_that_it_started(load, tmp_path):
    steps = load("gpu_first_run")
    hangs = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    python = [sys.executable, "-S", "-c"]
    beside = [steps.Step("hangs", 2, [*python, hangs]), steps.Step("beside", 30, [*python, "print('there')"])]
    lines = tmp_path / "call.jsonl"
    steps.run_call([beside, [steps.Step("fails", 30, [*python, "raise SystemExit('wrong')"])]], lines)
    found = {line["name"]: line for line in steps.read_lines([lines])}
    outcomes = {name: line["outcome"] for name, line in found.items()}
    assert outcomes == {"beside": "done", "hangs": "ended at its limit", "fails": "failed"}
    state = Path(f"/proc/{int(found['hangs']['said'])}/stat")
    assert not state.exists() or state.read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z"


def _cases(device):
    rng = np.random.default_rng(3)
    mask, image = rng.random((5, 4, 7)) < 0.7, rng.random((1, 5, 4, 7), dtype=np.float32)
    for filter_name, theta_beta in (("exact", (0.4,)), ("auto", None)):
        kernels = KernelSetSpec((KernelSpec((1.2, 1.1, 1.7), theta_beta),), "symmetric", filter_name, num_labels=3, num_iterations=1)
        CudaBackend(device).message(rng.random((3, 5, 4, 7), dtype=np.float32), GridImage(image, mask, (1.0, 0.8, 1.5)), kernels)


@needs_compiler
def test_recorded_kernels_are_played_and_a_wrong_number_has_its_line(load, tmp_path):
    """With nothing of the engine; without time, none begins, and each has a line."""
    assert "crfrefine" not in load("gpu_replay").__dict__
    record, lines = tmp_path / "record.npz", tmp_path / "lines.jsonl"
    number = load("gpu_record").record(record, _cases)

    def play(*options):
        lines.unlink(missing_ok=True)
        status = load("gpu_replay").main([str(record), "-o", str(lines), *options])
        found = load("gpu_replay").read_lines([lines])
        assert len(found) == number
        assert status == any(line["outcome"] != "right" for line in found)
        return {(line["outcome"], line["kernel"]) for line in found}

    all_right = play()
    assert {outcome for outcome, _ in all_right} == {"right"}
    with np.load(record) as stored:
        arrays = dict(stored)
    memory = next(launch["memory"] for launch in json.loads(arrays["index"].tobytes())["launches"] if launch["kernel"] == "filter_axis")
    arrays[next(after for _, after in memory if after)] += np.uint8(64)
    np.savez(record, **arrays)
    assert {kernel for outcome, kernel in play() if outcome == "wrong"} == {"filter_axis"}
    assert play("--seconds", "0") == {("not run", kernel) for _, kernel in all_right}
