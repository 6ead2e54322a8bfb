"""The study of learning end to end: a taste gives all tables, and a study that was stopped goes on to the same result."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from script_imports import importing_from

from crfrefine import CrfParameters
from crfrefine.cases.discovery import discover_cases

torch = pytest.importorskip("torch", reason="the study trains with PyTorch")

pytestmark = pytest.mark.long

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(one_torch_thread: None) -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of the study on one thread."""
    with importing_from(BENCHMARKS) as load:
        yield load


@pytest.fixture(scope="module")
def taste(tmp_path_factory) -> Path:
    """The output of a quick study of one fold."""
    output = tmp_path_factory.mktemp("taste")
    page = shutil.copy(BENCHMARKS.parent / "docs" / "reference" / "end-to-end.md", output)
    # Its own folder, which PYTHONSAFEPATH keeps off the path of imports, and no package from there but what the tests have.
    path = os.pathsep.join([str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, BENCHMARKS / "study_end_to_end.py", "--quick", "--folds", "1", "--workers", "1", "-o", output]
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([*command, "--document", page], capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return output


def make_unit(script, data: Path, folder: Path):
    study, arms = script("study_end_to_end"), script("end_to_end_arms")
    files = discover_cases(data / "images", None, None, data / "labels")
    setup = replace(study.OTHER, num_steps=2, num_further_steps=2, num_crf_steps=1, width=4)
    return arms.Unit("some cases", folder, (files[0], files[1]), (files[4],), ("background", "shell", "core", "cyst"), setup, 10)


def results_of(folder: Path) -> dict[str, list]:
    return {file.parent.name: json.loads(file.read_text())["measurements"] for file in sorted(folder.glob("*/result.json"))}


def test_a_taste_gives_all_tables(taste):
    """Every arm trains the network, also that with the CRF added at the end, whose first steps are the network's."""
    fold = taste / "generated" / "cases_2" / "fold_1"
    found = results_of(fold)
    assert list(found) == ["added", "end_to_end", "longer", "network"]
    assert len({row["method"] for rows in found.values() for row in rows}) == 8
    text = (taste / "results.md").read_text()
    for expected in ("end to end against network trained on", "theta_alpha, mm", "paper: PROMISE12", "the network's own logits"):
        assert expected in text
    page = (taste / "end-to-end.md").read_text()
    for marker in ("summary", "dice", "networks", "learned", "paper", "cost"):
        assert "generated, 2 training cases" in page.partition(f"<!-- {marker}:begin -->")[2].partition(f"<!-- {marker}:end -->")[0]
    trained = CrfParameters.load(fold / "end_to_end" / "params.toml")
    assert trained.mean_field.num_iterations == 5
    assert trained.bilateral[0].theta_beta != CrfParameters().bilateral[0].theta_beta
    states = {arm: torch.load(fold / arm / "model.pt", weights_only=True) for arm in found}
    assert len({states[arm]["network.head.weight"].numpy().tobytes() for arm in states}) == 4
    assert {arm for arm in states if any(key.startswith("crf.") for key in states[arm])} == {"end_to_end", "added"}


def test_a_study_that_ran_out_of_time_goes_on_to_the_same_result(script, taste, tmp_path):
    """Stopped in the middle of each arm, at whatever step the time is up."""
    training, arms = script("end_to_end_training"), script("end_to_end_arms")
    unit = make_unit(script, taste / "generated", tmp_path / "stopped")
    count = 0

    def is_over() -> bool:
        nonlocal count
        count += 1
        return count % 3 == 0

    for _ in range(20):
        try:
            arms.run_unit(unit, training.Watch(lambda text: None, is_over))
            break
        except training.TimeIsUpError:
            assert len(list(unit.folder.glob("*/checkpoint.pt"))) <= 1
    assert count > 9
    through = replace(unit, folder=tmp_path / "through")
    arms.run_unit(through, training.Watch(lambda text: None))
    assert results_of(unit.folder) == results_of(through.folder)
    assert not list(unit.folder.glob("*/checkpoint.pt"))
