"""The study of learning end to end: a taste gives all tables."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crfrefine import CrfParameters

torch = pytest.importorskip("torch", reason="the study trains with PyTorch")

pytestmark = pytest.mark.long

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_a_taste_gives_all_tables(tmp_path: Path) -> None:
    """Every arm trains the network, also that with the CRF added at the end, whose first steps are the network's."""
    page = Path(shutil.copy(BENCHMARKS.parent / "docs" / "reference" / "end-to-end.md", tmp_path))
    # Its own folder, which PYTHONSAFEPATH keeps off the path of imports, and no package from there but what the tests have.
    path = os.pathsep.join([str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])])
    options = ("--quick", "--folds", "1", "--workers", "1", "-o", tmp_path, "--document", page)
    command = [sys.executable, BENCHMARKS / "study_end_to_end.py", *options]
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    fold = tmp_path / "generated" / "cases_2" / "fold_1"
    found = {file.parent.name: json.loads(file.read_text())["measurements"] for file in sorted(fold.glob("*/result.json"))}
    assert list(found) == ["added", "end_to_end", "longer", "network"]
    assert len({row["method"] for rows in found.values() for row in rows}) == 8
    text = (tmp_path / "results.md").read_text()
    for expected in ("end to end against network trained on", "theta_alpha, mm", "paper: PROMISE12", "the network's own logits"):
        assert expected in text
    for marker in ("summary", "dice", "networks", "learned", "paper", "cost"):
        begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
        assert "generated, 2 training cases" in page.read_text().partition(begin)[2].partition(end)[0]
    trained = CrfParameters.load(fold / "end_to_end" / "params.toml")
    assert trained.mean_field.num_iterations == 5
    assert trained.bilateral[0].theta_beta != CrfParameters().bilateral[0].theta_beta
    states = {arm: torch.load(fold / arm / "model.pt", weights_only=True) for arm in found}
    assert len({states[arm]["network.head.weight"].numpy().tobytes() for arm in states}) == 4
    assert {arm for arm in states if any(key.startswith("crf.") for key in states[arm])} == {"end_to_end", "added"}
