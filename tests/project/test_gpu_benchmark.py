"""The first run on a GPU: a step that hangs is ended at its limit, with all that it started."""

import sys
from pathlib import Path

from script_imports import importing_from

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_a_step_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    hangs = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    python = [sys.executable, "-S", "-c"]
    lines = tmp_path / "call.jsonl"
    with importing_from(BENCHMARKS) as load:
        steps = load("gpu_first_run")
        beside = [steps.Step("hangs", 2, [*python, hangs]), steps.Step("beside", 30, [*python, "print('there')"])]
        steps.run_call([beside, [steps.Step("fails", 30, [*python, "raise SystemExit('wrong')"])]], lines)
        found = {line["name"]: line for line in steps.read_lines([lines])}
    outcomes = {name: line["outcome"] for name, line in found.items()}
    assert outcomes == {"beside": "done", "hangs": "ended at its limit", "fails": "failed"}
    state = Path(f"/proc/{int(found['hangs']['said'])}/stat")
    assert not state.exists() or state.read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z"
