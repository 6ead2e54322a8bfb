"""`infer --summary FILE.jsonl`: a line per case as it ends; a torn last line costs nothing, and the next run goes on behind it."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cli_helpers import Folders, command, run_here, write_folders
from special_file_helpers import Reader, make_pipe

from crfrefine.errors import CrfRefineError
from crfrefine.infer.records import CaseRecord, RunSummary
from crfrefine.infer.run_record import RECORD_FOLDER
from crfrefine.infer.summary_file import summary_file
from crfrefine.infer.summary_lines import SummaryLines
from crfrefine.infer.summary_reading import NotASummaryError, read_summary


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return write_folders(tmp_path, "a", "b", "c")


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    return tmp_path / "summary.jsonl"


def infer(folders: Folders, summary: Path, *options: object):
    return run_here("infer", *folders.arguments, "--summary", summary, *options)


def entries(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_lines_have_what_the_table_has(folders, lines, tmp_path):
    table = tmp_path / "summary.json"
    assert infer(folders, table).status == 0
    assert infer(folders, lines).status == 0
    started, *cases, ended = entries(lines)
    assert (started["run"], ended["run"], ended["interrupted"], ended["num_done"]) == ("started", "ended", False, 3)
    of_table = json.loads(table.read_text())
    assert of_table.keys() == ((started.keys() | ended.keys()) - {"run"}) | {"cases", "not_reached"}
    assert [case.keys() for case in cases] == [case.keys() for case in of_table["cases"]]
    assert [case["case_id"] for case in cases] == ["a", "b", "c"]
    assert cases[1]["energy"] == of_table["cases"][1]["energy"]
    assert list(started["all_cases"]) == ["a", "b", "c"]


def test_the_next_run_goes_on_behind_the_lines(folders, lines):
    assert infer(folders, lines).status == 0
    before = lines.read_bytes()
    (folders.output / "b.nii.gz").unlink()
    result = infer(folders, lines, "--continue")
    assert result.status == 0
    assert lines.read_bytes().startswith(before)
    first, second = read_summary(lines)
    assert {case["case_id"]: case["status"] for case in second.cases} == {"a": "skipped", "b": "done", "c": "skipped"}  # as they end
    assert second.cases[0] == first.cases[0] | {"status": "skipped"}
    assert not second.is_interrupted


@pytest.mark.parametrize("torn", [b'{"case_id": "c", "sta', b'{"case_id": "c"', b"\0\0\0\0", b"\xc3"])
def test_a_torn_last_line_is_left_out_and_removed(folders, lines, torn):
    assert infer(folders, lines).status == 0
    whole = lines.read_bytes().splitlines(keepends=True)[:3]
    lines.write_bytes(b"".join(whole) + torn)
    (run,) = read_summary(lines)
    assert [case["case_id"] for case in run.cases] == ["a", "b"]
    assert run.is_interrupted
    shutil.rmtree(folders.output / RECORD_FOLDER)
    result = infer(folders, lines, "--continue")
    assert result.status == 0, result.stderr
    assert "1 existing label map has no record in it, as after a kill: c; " in result.stderr
    assert lines.read_bytes().startswith(b"".join(whole) + b'{"run": "started"')
    assert [case["written"] is None for case in read_summary(lines)[-1].cases] == [False, False, True]


def test_a_whole_last_line_without_its_end_counts(folders, lines):
    assert infer(folders, lines).status == 0
    lines.write_bytes(b"".join(lines.read_bytes().splitlines(keepends=True)[:4])[:-1])
    assert len(read_summary(lines)[0].cases) == 3
    assert infer(folders, lines, "--continue").status == 0
    assert [case["written"] is None for case in read_summary(lines)[-1].cases] == [False] * 3


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"a": 1}\n', "line 1 is not of a run that began on a line before"),
        (b"notes\nof mine\n", "line 1 is not JSON"),
        (b"[1]\n", "line 1 is not of a run"),
        (b'{"run": "started", "schema": 9, "parameters": {}, "num_parts": 1, "part_id": 0}\n', "its schema is 9"),
        (
            b'{"run": "started", "schema": 1, "parameters": {}, "num_parts": 1, "part_id": 0}\n{"case_id": 3, "status": "done"}\n',
            "expected text",
        ),
        (
            b'{"run": "started", "schema": 1, "parameters": {}, "num_parts": 1, "part_id": 0}\n{"ca\n{"run": "ended"}\n',
            "line 2 is not JSON",
        ),
    ],
)
def test_another_file_is_not_taken_up(folders, lines, content, problem):
    lines.write_bytes(content)
    with pytest.raises(NotASummaryError, match=problem):
        read_summary(lines)
    result = infer(folders, lines, "--continue")
    assert result.status == 1
    assert result.stderr.startswith(f"crfrefine: error: {lines}: ")
    assert lines.read_bytes() == content


def test_without_continue_the_file_is_replaced(folders, lines):
    lines.write_text("old\n")
    assert infer(folders, lines).status == 0
    assert len(read_summary(lines)) == 1


def test_a_pipe_takes_all_lines(folders, tmp_path):
    pipe = make_pipe(tmp_path / "summary.jsonl")
    reader = Reader(pipe)
    assert infer(folders, pipe).status == 0
    assert [json.loads(line).get("case_id") for line in reader.result().splitlines()] == [None, "a", "b", "c", None]


def test_what_the_disk_does_not_take_is_written_later(tmp_path, monkeypatch):
    """Half a line, then nothing for a while: no byte is lost, none is written twice."""
    path = tmp_path / "summary.jsonl"
    file = SummaryLines(path, RunSummary("cpu", 1, {}), append=False)
    file.save_first()
    real = os.write
    left = [20]

    def write(descriptor: int, content: bytes) -> int:
        if not left[0]:
            raise OSError(28, "No space left on device")
        taken = real(descriptor, content[: left[0]])
        left[0] -= taken
        return taken

    monkeypatch.setattr("crfrefine.infer.summary_lines.os.write", write)
    for name in ("a", "b"):
        file.case_ended(CaseRecord(name, "done"))
    left[0] = 10**6
    file.case_ended(CaseRecord("c", "done"))
    left[0] = 0
    with pytest.raises(CrfRefineError, match="the disk is full"):
        file.save_last()
    (run,) = read_summary(path)
    assert [case["case_id"] for case in run.cases] == ["a", "b", "c"]


def test_a_killed_run_leaves_a_record_of_every_case_it_finished(tmp_path, lines):
    """Not only of those up to the last second: kill -9 right after the first label map appears."""
    folders = write_folders(tmp_path, *(f"case{number}" for number in range(12)))
    arguments = command("infer", *folders.arguments, "--summary", lines, "--threads", 1)
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 100
        while not lines.is_file() or lines.read_bytes().count(b"\n") < 4:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    (run,) = read_summary(lines)
    assert run.is_interrupted
    recorded = [case["case_id"] for case in run.cases]
    assert len(recorded) >= 3
    there = sorted(path.name.partition(".")[0] for path in folders.output.glob("case*"))
    assert recorded == there[: len(recorded)]
    assert len(there) <= len(recorded) + 1  # The kill may fall between a label map and its line.


def test_a_part_that_replaces_the_summary_of_another_part_says_so(folders, tmp_path):
    """All parts of a job array with one name for the summary leave the records of one of them."""
    for path in (tmp_path / "summary.jsonl", tmp_path / "summary.json"):
        said = f"{path}: replaces the summary of part 0 of the same run; name another file for each part"
        assert said not in infer(folders, path, "--num-parts", 2, "--part-id", 0).stderr
        assert said not in infer(folders, path, "--num-parts", 2, "--part-id", 0).stderr
        result = infer(folders, path, "--num-parts", 2, "--part-id", 1)
        assert result.status == 0
        assert said in result.stderr


@pytest.mark.parametrize("name", ["summary.json", "summary.jsonl"])
def test_a_summary_is_there_before_the_first_case_ends(tmp_path, name):
    """A part that is killed in its first case leaves the list of all cases."""
    summary = RunSummary("cpu", 1, {}, num_parts=2, part_id=1, all_cases={"a": "out/a.nii.gz", "b": "out/b.nii.gz"})
    summary_file(tmp_path / name, summary, resume=False).save_first()
    (run,) = read_summary(tmp_path / name)
    assert list(run.head["all_cases"]) == ["a", "b"]
    assert run.cases == []
    assert run.is_interrupted
