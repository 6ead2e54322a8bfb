"""Places and inputs that change under a run: a message, status 1, and the same command does the rest afterwards.

Full and read-only disks are in `tests/cli/test_bad_input.py` and `tests/cli/test_special_outputs.py`, limits of file sizes and links in
`tests/io/test_atomic.py`, devices that are always full in `tests/io/test_atomic.py`.
"""

import json
import subprocess

import pytest
from cli_helpers import Folders, command, files_in, load_nifti, run_here

import crfrefine.runs.run as infer_run


def before(step, monkeypatch, case_id, fault):
    """Let something happen when a case is about to be read (`read_case`), or refined (`finish_case`)."""
    original = getattr(infer_run, step)

    def faulty(settings, task, *rest):
        if (getattr(task, "record", None) or task.files).case_id == case_id:
            fault()
        return original(settings, task, *rest)

    monkeypatch.setattr(infer_run, step, faulty)


def test_the_output_folder_is_moved_away_while_running(folders, tmp_path, monkeypatch):
    summary = tmp_path / "summary.json"
    before("finish_case", monkeypatch, "c", lambda: folders.output.rename(tmp_path / "elsewhere"))
    result = run_here("infer", *folders.arguments, "--threads", 1, "--summary", summary, status=1)
    assert f"cannot be written: there is no folder {folders.output}" in result.stderr
    assert "Traceback" not in result.stderr
    # The second case is written while the third is being refined: before or after the folder is gone.
    statuses = [case["status"] for case in json.loads(summary.read_text())["cases"]]
    assert (statuses[0], statuses[2]) == ("done", "failed")
    monkeypatch.undo()
    result = run_here("infer", *folders.arguments, "--threads", 1, "--continue", "--summary", summary, status=0)
    assert files_in(folders.output) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]


def test_inputs_that_vanish_after_they_were_found(folders, monkeypatch):
    for folder, name in ((folders.images, "a_0001.nii.gz"), (folders.logits, "b.nii.gz")):
        before("read_case", monkeypatch, name[0], (folder / name).unlink)
    result = run_here("infer", *folders.arguments, "--threads", 1, status=1)
    assert f"{folders.images / 'a_0001.nii.gz'}: " in result.stderr
    assert f"{folders.logits / 'b.nii.gz'}: " in result.stderr
    assert "Traceback" not in result.stderr
    assert files_in(folders.output) == ["c.nii.gz"]


@pytest.mark.long
def test_two_runs_write_to_one_output_at_the_same_time(folders, tmp_path):
    """Both end well, every file is whole, and neither takes the other's temporary files away."""
    alone = Folders(folders.images, folders.logits, tmp_path / "alone")
    options = ("--threads", 1, "--save-probabilities")
    assert run_here("infer", *alone.arguments, *options).status == 0
    runs = [
        subprocess.Popen(command("infer", *folders.arguments, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)
    ]
    for run in runs:
        _, errors = run.communicate(timeout=240)
        assert run.returncode == 0, errors
    assert files_in(folders.output) == files_in(alone.output)
    for name in files_in(alone.output):
        assert not name.startswith(".")
        assert (folders.output / name).read_bytes() == (alone.output / name).read_bytes()
    assert load_nifti(folders.output / "a.nii.gz").any()
