"""What a bad file may cost: its case, in every command, with a line that asks for a report if nobody foresaw it. Other cases are done."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import Folders, files_in, run_here, write_folders
from evaluation_helpers import logits_of, save_npz, write_study
from training_helpers import write_cases

import crfrefine.cli.main
import crfrefine.io.nifti
import crfrefine.refinement.case
from crfrefine.errors import CapacityError, CrfRefineError, InputError, UnexpectedError
from crfrefine.failures import CaseWork, Failure, describe_failure, reading

BUG = KeyError("There is no item named 'logits.npy'")

QUICK = ("--set", "mean_field.num_iterations=1", "--set", "mean_field.filter=truncated", "--threads", 1)


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return write_folders(tmp_path, "bad", "good")


def break_reader(monkeypatch: pytest.MonkeyPatch, error: BaseException, name: str = "bad", function: str = "open_voxels") -> None:
    """Let the NIfTI reader raise on files whose name begins so: no file is known that makes it raise anything but our errors."""
    whole = getattr(crfrefine.io.nifti, function)

    def broken(first, *others):
        path = getattr(first, "path", first)
        if f"{path.parent.name}/{path.name}".startswith(name) or path.name.startswith(name):
            raise error
        return whole(first, *others)

    monkeypatch.setattr(crfrefine.io.nifti, function, broken)


def without_suffix(path: Path) -> None:
    """Make an .npz whose array `logits` is not called logits.npy, as zip tools make them."""
    array = io.BytesIO()
    np.save(array, np.zeros((3, 4, 5, 6), np.float32))
    path.unlink(missing_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("logits", array.getvalue())


def error_line(text: str) -> str:
    """The only one."""
    (line,) = [line for line in text.splitlines() if line.startswith("crfrefine: error: ")]
    return line


@pytest.mark.parametrize(
    "error",
    [
        BUG,
        ValueError("embedded null byte"),
        OverflowError("cannot convert float infinity to integer"),
        zipfile.BadZipFile("Bad magic number for file header"),
        zlib.error("Error -3 while decompressing data"),
        struct.error("unpack requires a buffer of 4 bytes"),
        RecursionError("maximum recursion depth exceeded"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        AssertionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_infer_goes_on_after_whatever_a_reader_raises(folders, monkeypatch, error):
    break_reader(monkeypatch, error)
    result = run_here("infer", *folders.arguments, *QUICK, "--summary", folders.output / "summary.json", "-v")
    assert result.status == 1
    assert files_in(folders.output) == ["good.nii.gz", "summary.json"]
    line = error_line(result.stderr)
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
    result = run_here("infer", *folders.arguments, *QUICK, "--fail-fast")
    assert result.status == 1
    assert "Traceback" not in result.stderr
    assert files_in(folders.output) == []
    break_reader(monkeypatch, MemoryError())
    result = run_here("infer", *folders.arguments, *QUICK, "-v")
    assert result.status == 1
    assert "there is not enough memory to read it" in error_line(result.stderr)
    assert "report" not in error_line(result.stderr)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("stage", ["refine", "write"])
def test_a_bug_in_the_work_on_a_case_costs_the_case(folders, monkeypatch, stage):
    module, name = (crfrefine.refinement.case, "refine") if stage == "refine" else (crfrefine.io.nifti, "write")
    whole, calls = getattr(module, name), []

    def broken(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            raise ZeroDivisionError("a bug")
        return whole(*arguments, **options)

    monkeypatch.setattr(module, name, broken)
    result = run_here("infer", *folders.arguments, *QUICK, "-v")
    assert result.status == 1
    line = error_line(result.stderr)
    assert "case 'bad': " in line
    assert "unexpected ZeroDivisionError (a bug): a bug, please report it" in line
    assert ", in broken\n" in result.stderr
    assert files_in(folders.output) == ["good.nii.gz"]


def test_neither_an_interrupt_nor_the_end_of_the_process_is_a_failure_of_a_case(folders, monkeypatch):
    break_reader(monkeypatch, KeyboardInterrupt())
    with pytest.raises(crfrefine.cli.main._Stopped):
        run_here("infer", *folders.arguments, *QUICK)
    monkeypatch.undo()
    break_reader(monkeypatch, SystemExit(7))
    assert run_here("infer", *folders.arguments, *QUICK).status == 7
    assert not (folders.output / "good.nii.gz").exists()


@pytest.mark.parametrize("place", ["labels", "after"])
def test_evaluate_goes_on_after_whatever_a_reader_raises(tmp_path, monkeypatch, place):
    study = write_study(tmp_path)
    break_reader(monkeypatch, BUG, f"{place}/case1")
    result = run_here(*study.arguments)
    assert result.status == 1
    line = error_line(result.stderr)
    assert line.startswith("crfrefine: error: case 'case1': ")
    assert f"{getattr(study, place) / 'case1.nii.gz'}: cannot be read: unexpected KeyError" in line
    assert "please report it" in line
    assert "Traceback" not in result.stderr
    assert study.statuses() == ["measured", "failed", "measured"]
    assert ", in broken\n" in run_here(*study.arguments, "-v").stderr


def test_info_goes_on_after_whatever_a_reader_raises(folders, monkeypatch):
    break_reader(monkeypatch, BUG, function="read_header")
    result = run_here("info", folders.images)
    assert result.status == 1
    assert "1 case in order, 1 problem" in result.stdout
    assert f"wrong: case 'bad': {folders.images / 'bad_0000.nii.gz'}: cannot be read: unexpected KeyError" in result.stdout
    assert "Traceback" not in result.stderr
    assert ", in broken\n" in run_here("info", folders.images, "-v").stderr
    files = [folders.images / "bad_0000.nii.gz", folders.images / "good_0000.nii.gz"]
    result = run_here("info", *files)
    assert result.status == 1
    assert "unexpected KeyError" in error_line(result.stderr)
    assert str(files[1]) in result.stdout


def test_convert_says_it_in_a_line(folders, monkeypatch):
    break_reader(monkeypatch, ValueError("embedded null byte"))
    arguments = ("convert", folders.logits / "bad.nii.gz", folders.output / "a.nrrd")
    result = run_here(*arguments)
    assert (result.status, result.stdout) == (1, "")
    assert "unexpected ValueError (embedded null byte): a bug, please report it" in error_line(result.stderr)
    assert "Traceback" not in result.stderr
    assert ", in broken\n" in run_here(*arguments, "-v").stderr


@pytest.mark.parametrize("function", ["read_header", "open_voxels"])
def test_train_crf_names_all_bad_cases_before_it_trains(tmp_path, monkeypatch, function):
    write_cases(tmp_path, 4)
    break_reader(monkeypatch, IndexError("list index out of range"), "case1", function)
    output = tmp_path / "params.toml"
    result = run_here("train-crf", tmp_path, "-o", output, "--threads", "2")
    assert result.status == 1
    line = error_line(result.stderr)
    assert line.startswith("crfrefine: error: case 'case1': ")
    assert "unexpected IndexError (list index out of range)" in line
    assert "Traceback" not in result.stderr
    assert ", in broken\n" in run_here("train-crf", tmp_path, "-o", output, "-v").stderr
    (tmp_path / "labels" / "case2.nii.gz").write_bytes(b"no volume")
    result = run_here("train-crf", tmp_path, "-o", output, "--threads", "2")
    assert result.status == 1
    assert "case 'case2': " in result.stderr
    if function == "read_header":
        assert "2 of 4 cases cannot be trained on:\n  case 'case1': " in result.stderr
    assert not output.exists()


@pytest.mark.parametrize("command", ["infer", "evaluate", "info", "convert", "train-crf"])
def test_an_archive_without_the_suffix_of_its_array_is_said_in_plain_words(tmp_path, command):
    if command == "evaluate":
        study = write_study(tmp_path)
        bad = save_npz(study.after / "case1_logits.npz", logits_of(study.maps["labels"]["case1"], 1))
        (study.after / "case1.nii.gz").unlink()
        arguments: tuple[object, ...] = study.arguments
    elif command == "train-crf":
        write_cases(tmp_path, 3)
        bad = tmp_path / "logits" / "case1.npz"
        next((tmp_path / "logits").glob("case1.*")).unlink()
        arguments = ("train-crf", tmp_path, "-o", tmp_path / "params.toml")
    else:
        folders = write_folders(tmp_path, "bad", "good")
        bad = folders.logits / "bad.npz"
        (folders.logits / "bad.nii.gz").unlink()
        others = {
            "info": (bad, folders.logits / "good.nii.gz"),
            "convert": (bad, tmp_path / "a.npz"),
            "infer": (*folders.arguments, *QUICK),
        }
        arguments = (command, *others[command])
    without_suffix(bad)
    result = run_here(*arguments)
    assert result.status == 1
    expected = f"{bad}: expected the array 'logits' as logits.npy in the archive, found a member 'logits' without .npy"
    assert expected in error_line(result.stderr)
    if command == "infer":
        assert files_in(folders.output) == ["good.nii.gz"]
    if command == "evaluate":
        assert study.statuses() == ["measured", "failed", "measured"]


def test_a_reader_may_raise_our_errors_as_they_are(tmp_path):
    with pytest.raises(InputError, match=r"^of ours$"), reading(tmp_path):
        raise InputError("of ours")
    with pytest.raises(InputError, match="cannot be read: No such file"), reading(tmp_path):
        (tmp_path / "absent").read_bytes()
    with pytest.raises(CapacityError, match="not enough memory"), reading(tmp_path):
        raise MemoryError
    with pytest.raises(KeyboardInterrupt), reading(tmp_path):
        raise KeyboardInterrupt


def test_the_reason_of_an_error_is_one_short_line():
    with pytest.raises(UnexpectedError) as caught, reading(Path("a.nii")):
        raise ValueError("x" * 100_000 + "\n\x1b[31m")
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


def test_errors_that_do_not_name_their_files_get_them():
    found: list[Failure] = []
    with CaseWork(found.append, Path("a.nii"), None, Path("b.nii")):
        raise ZeroDivisionError
    assert found[0].message == "a.nii, b.nii: unexpected ZeroDivisionError: a bug, please report it, with what -v shows"
    assert found[0].kind == "ZeroDivisionError"
    assert describe_failure(CrfRefineError("a.nii: x"), Path("a.nii")).message == "a.nii: x"
    many = describe_failure(KeyError(), *(Path(f"{number}.nii") for number in range(900))).message
    assert many.startswith("0.nii, 1.nii, 2.nii, 3.nii, 4.nii and 895 more: ")
