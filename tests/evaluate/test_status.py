"""`status` of an evaluation: cases that failed or lack a file, and the command that measures them when they are mended."""

import json
import shlex
import subprocess

from cli_helpers import run_here
from evaluation_helpers import write_study


def test_failed_and_incomplete_cases_and_the_command_for_them(tmp_path, monkeypatch):
    study = write_study(tmp_path)
    files = sorted(study.after.iterdir())
    whole = {path: path.read_bytes() for path in files}
    files[0].write_bytes(whole[files[0]][:60])
    files[2].unlink()
    assert run_here(*study.arguments).status == 1
    monkeypatch.chdir("/")
    result = run_here("status", study.output, "--json", status=1)
    (run,) = json.loads(result.stdout)["runs"]
    assert {case["case_id"]: case["state"] for case in run["cases"]} == {"case0": "failed", "case1": "done", "case2": "missing"}
    assert str(files[0]) in run["cases"][0]["reason"]
    assert run["cases"][2]["reason"] == f"no prediction in {study.after}"
    (line,) = run["commands"]
    assert shlex.split(line.partition(" && ")[2] or line) == ["crfrefine", "evaluate", "--continue", *map(str, study.arguments[1:])]
    shown = run_here("status", study.output).stdout
    assert f"{study.output}: 3 cases: 1 done, 1 failed, 1 missing\n" in shown
    assert f"  missing: case2: no prediction in {study.after}\n" in shown
    for path, content in whole.items():
        path.write_bytes(content)
    assert run_here(*study.arguments, "--continue").status == 0
    assert run_here("status", study.output / "summary.json").status == 0


def test_what_prints_badly_is_escaped_and_the_folders_may_follow_two_dashes(tmp_path):
    study = write_study(tmp_path / "a\x1b[31m b")
    command, after, labels, *options = map(str, study.arguments)
    (study.after / "case2.nii.gz").unlink()
    assert run_here(command, *options, "--", after, labels).status == 0
    lines = run_here("status", study.output).stdout.splitlines()
    (line,) = [line.rpartition(" && ")[2] for line in lines if "crfrefine evaluate" in line]
    assert line.isprintable()
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert words == ["crfrefine", command, "--continue", *options, "--", after, labels]
