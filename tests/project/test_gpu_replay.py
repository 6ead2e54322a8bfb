"""Recorded launches of the GPU engine's kernels, played on a stand-in for CuPy: what is wrong has a line of its own and costs no other."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda_shim
import numpy as np
import pytest
from script_imports import importing_from

from crfrefine.engines.cuda.backend import CudaBackend
from crfrefine.engines.cuda.sources import kernel_source
from crfrefine.parameters.specs import KernelSetSpec, KernelSpec

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "tests" / "helpers" / "replayed_site"

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with")


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[ModuleType, ...]]:
    """The recorder, the player, and who makes tables."""
    with importing_from(ROOT / "benchmarks") as load:
        yield load("gpu_record"), load("gpu_replay"), load("gpu_tables")


def _cases(device: Any) -> None:
    """Filterings with direct sums and with a spatial kernel: three kernels, with rows of one, two and four channels."""
    rng = np.random.default_rng(3)
    mask, image = rng.random((5, 4, 7)) < 0.7, rng.random((1, 5, 4, 7), dtype=np.float32)
    for filter_name, theta_beta in (("exact", (0.4,)), ("truncated", (0.4,)), ("auto", None)):
        kernels = KernelSetSpec((KernelSpec((1.2, 1.1, 1.7), theta_beta),), "symmetric", filter_name, num_labels=3, num_iterations=1)
        for num_channels in (2, 3):
            values = rng.random((num_channels, 5, 4, 7), dtype=np.float32)
            CudaBackend(device).message(values, image, mask, (1.0, 0.8, 1.5), kernels)


@pytest.fixture(scope="module")
def record(modules: tuple[ModuleType, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("gpu") / "record.npz"
    modules[0].record(path, _cases)
    return path


@pytest.fixture
def play(modules: tuple[ModuleType, ...], record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plays the record with faults; gives the line of each kernel, width and list of null pointers."""

    def run(faults: dict[str, str], *options: str) -> dict[tuple[Any, ...], Any]:
        sources = [kernel_source(launch["source"], launch["constants"]) for launch in modules[1].Record(record).launches]
        libraries = {hashlib.sha256(source.text.encode()).hexdigest(): cuda_shim.library(source)._name for source in sources}
        monkeypatch.setenv("PYTHONPATH", str(SITE))  # CuPy and numpy, and nothing of the engine
        monkeypatch.setenv("REPLAY_LIBRARIES", json.dumps(libraries))
        monkeypatch.setenv("REPLAY_FAULTS", json.dumps(faults))
        monkeypatch.setenv("REPLAY_STARTED", str(tmp_path / "started"))
        output = tmp_path / "lines.jsonl"
        output.unlink(missing_ok=True)
        status = modules[1].main([str(record), "-o", str(output), *options])
        lines = modules[1].read_lines([output])
        found = {(line["kernel"], line["constants"]["CRF_WIDTH"], *line["null"]): line for line in lines}
        assert len(found) == len(lines)
        assert status == int(any(line["outcome"] != "right" for line in lines))
        return found

    return run


def test_a_record_has_what_the_engine_gives_to_cupy(modules: tuple[ModuleType, ...], record: Path) -> None:
    """Source text and options to the letter, whole blocks, and memory before and after."""
    found = modules[1].Record(record)
    for launch in found.launches:
        expected = kernel_source(launch["source"], launch["constants"])
        assert found.code(launch["text"]) == expected.text
        assert tuple(found.texts[launch["text"]]["options"]) == expected.options
        assert len(launch["arguments"]) == len(expected.kernels[launch["kernel"]])
        assert any(after is not None for _, after in launch["memory"])
    keys = [(launch["source"], launch["kernel"], str(launch["constants"])) for launch in found.launches]
    nulls = [tuple(argument is None for argument in launch["arguments"]) for launch in found.launches]
    assert len(set(zip(keys, nulls, strict=True))) == len(keys) > len(set(keys)) > 4


@pytest.mark.long
def test_faults_cost_no_other_line(play: Any, modules: tuple[ModuleType, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is right without faults. Each fault is a line of its kernel, first in the table, and all other lines are as before."""
    monkeypatch.setattr(modules[1], "MOST_HANGS", 9)
    right = play({})
    assert {line["outcome"] for line in right.values()} == {"right"}
    assert all(line["microseconds"] > 0.0 and line["difference"] < 1e-6 for line in right.values())
    planted = {
        ("filter_axis", 2): ("sticky", "crash", "illegal memory access"),
        ("filter_all_pairs", 2): ("wrong", "wrong", "numbers of argument 6 (sum, float32) differ"),
        ("filter_window", 2): ("outside", "wrong", "it writes outside of its arrays"),
        ("filter_window", 1): ("compile", "compile error", "identifier is undefined"),
        ("filter_axis", 1): ("hang", "hang", "no answer in 2 s"),
        ("filter_all_pairs", 4): ("crash", "crash", "the process ended"),
    }
    found = play({f"{kernel} {width}": fault for (kernel, width), (fault, _, _) in planted.items()}, "--limits", "60", "2")
    outcomes = {key: outcome for key, (_, outcome, _) in planted.items()}
    assert {key: line["outcome"] for key, line in found.items()} == {key: outcomes.get(key[:2], "right") for key in right}
    assert all(planted[key[:2]][2] in line["error"] for key, line in found.items() if key[:2] in planted)
    rows = modules[2].kernels(modules[1].read_lines([tmp_path / "lines.jsonl"])).splitlines()[4:]
    assert [" right " not in row for row in rows] == sorted((key[:2] in planted for key in found), reverse=True)
    assert all(any(text in row for row in rows) for _, _, text in planted.values())
    _wait_for_end_of(int((tmp_path / "started").read_text(encoding="ascii")))


def test_a_record_is_played_and_a_fault_has_its_line(play: Any, modules: tuple[ModuleType, ...], tmp_path: Path) -> None:
    """All other launches are right; with a driver that does not start, or without time, none begins, and each has a line."""
    found = play({"filter_all_pairs 2": "wrong"})
    assert all(line["microseconds"] > 0.0 for line in found.values())
    wrong = {key[:2]: line["error"] for key, line in found.items() if line["outcome"] != "right"}
    assert wrong.keys() == {("filter_all_pairs", 2)}
    assert "numbers of argument 6 (sum, float32) differ" in wrong["filter_all_pairs", 2]
    found = play({"all": "absent"})
    assert {line["outcome"] for line in found.values()} == {"not run"}
    assert all("cudaErrorInsufficientDriver" in line["error"] for line in found.values())
    found = play({}, "--seconds", "0")
    text = modules[2].kernels(modules[1].read_lines([tmp_path / "lines.jsonl"]))
    assert text.startswith(f"{len(found)} launches: {len(found)} not run")


def _wait_for_end_of(process: int) -> None:
    """What a process that hangs has started, ends with it."""
    for _ in range(100):
        state = Path(f"/proc/{process}/stat")
        if not state.exists() or state.read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"process {process} is still there")
