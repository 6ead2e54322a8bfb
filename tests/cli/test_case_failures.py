"""What a bad file may cost: its case, in every command, with a line that asks for a report if nobody foresaw it. Other cases are done."""

import json

import pytest
from cli_helpers import errors, files_in, run_here
from evaluation_helpers import write_study

import crfrefine.cli.main
import crfrefine.io.nifti
import crfrefine.refinement.refining
from crfrefine.io.volume import VoxelSource

BUG = KeyError("There is no item named 'logits.npy'")

CASES = ("bad", "good")
QUICK = ("--set", "mean_field.num_iterations=1", "--set", "mean_field.filter=truncated", "--threads", 1)


def break_reader(monkeypatch, error, name="bad", function="stream"):
    """Let the NIfTI reader raise on files whose name begins so: no file is known that makes it raise anything but our errors."""
    owner = VoxelSource if function == "stream" else crfrefine.io.nifti
    whole = getattr(owner, function)

    def broken(first, *others):
        path = getattr(first, "path", first)
        if f"{path.parent.name}/{path.name}".startswith(name) or path.name.startswith(name):
            raise error
        return whole(first, *others)

    monkeypatch.setattr(owner, function, broken)


@pytest.mark.parametrize("error", [BUG, UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), AssertionError()], ids=repr)
def test_infer_goes_on_after_whatever_a_reader_raises(folders, monkeypatch, error):
    break_reader(monkeypatch, error)
    result = run_here("infer", *folders.arguments, *QUICK, "--summary", folders.output / "summary.json", "-v", status=1)
    assert files_in(folders.output) == ["good.nii.gz", "summary.json"]
    (line,) = errors(result.stderr)
    assert line.startswith(f"crfrefine: error: case 'bad': {folders.images.parent}")
    assert f"unexpected {type(error).__name__}" in line
    assert "please report it" in line
    assert "\n  Traceback (most recent call last):\n" in result.stderr
    assert ", in broken\n" in result.stderr
    record = json.loads((folders.output / "summary.json").read_text())["cases"][0]
    assert record["error_kind"] == "UnexpectedError"
    assert "in broken" in record["error_traceback"]


def test_a_traceback_is_shown_on_request_alone_and_not_of_too_little_memory(folders, monkeypatch):
    break_reader(monkeypatch, BUG)
    result = run_here("infer", *folders.arguments, *QUICK, "--fail-fast", status=1)
    assert "not started" in result.stderr
    assert "Traceback" not in result.stderr
    break_reader(monkeypatch, MemoryError())
    result = run_here("infer", *folders.arguments, *QUICK, "-v", status=1)
    (line,) = errors(result.stderr)
    assert "there is not enough memory to read it" in line
    assert "report" not in line
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("stage", ["refine", "write"])
def test_a_bug_in_the_work_on_a_case_costs_the_case(folders, monkeypatch, stage):
    module, name = (crfrefine.refinement.refining, "refine_network") if stage == "refine" else (crfrefine.io.nifti, "write")
    whole, calls = getattr(module, name), []

    def broken(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            raise ZeroDivisionError("a bug")
        return whole(*arguments, **options)

    monkeypatch.setattr(module, name, broken)
    result = run_here("infer", *folders.arguments, *QUICK, "-v", status=1)
    (line,) = errors(result.stderr)
    assert "case 'bad': " in line
    assert "unexpected ZeroDivisionError (a bug): a bug, please report it" in line
    assert ", in broken\n" in result.stderr
    assert files_in(folders.output) == ["good.nii.gz"]


def test_evaluate_goes_on_after_whatever_a_reader_raises(tmp_path, monkeypatch):
    study = write_study(tmp_path)
    break_reader(monkeypatch, BUG, "after/case1")
    result = run_here(*study.arguments, status=1)
    (line,) = errors(result.stderr)
    assert line.startswith("crfrefine: error: case 'case1': ")
    assert f"{study.after / 'case1.nii.gz'}: cannot be read: unexpected KeyError" in line
    assert "please report it" in line
    assert "Traceback" not in result.stderr
    assert study.statuses() == ["measured", "failed", "measured"]
    assert ", in broken\n" in run_here(*study.arguments, "-v").stderr
