"""`infer --summary FILE.jsonl`: a line per case as it ends; a torn last line costs nothing, and the next run goes on behind it."""

import json
import os
import shutil

import pytest
from cli_helpers import infer

from crfrefine.errors import CrfRefineError
from crfrefine.runs.infer.records import RECORD_FOLDER, CaseRecord, RunSummary
from crfrefine.runs.infer.summary_reading import read_summary
from crfrefine.runs.infer.summary_writing import SummaryLines, summary_file


@pytest.fixture
def lines(tmp_path):
    return tmp_path / "summary.jsonl"


def run(folders, summary, *options, status=0):
    """Return standard error."""
    result = infer(folders, "--summary", summary, *options)
    assert result.status == status, result.stderr
    return result.stderr


def test_the_lines_have_what_the_table_has_and_the_next_run_goes_on_behind_them(folders, lines, tmp_path):
    run(folders, tmp_path / "summary.json")
    lines.write_text("old\n")
    run(folders, lines)
    before = lines.read_bytes()
    started, *cases, ended = (json.loads(line) for line in before.splitlines())
    assert (started["run"], ended["run"], ended["interrupted"], ended["num_done"]) == ("started", "ended", False, 3)
    of_table = json.loads((tmp_path / "summary.json").read_text())
    assert of_table.keys() == ((started.keys() | ended.keys()) - {"run"}) | {"cases", "not_reached"}
    assert [case.keys() for case in cases] == [case.keys() for case in of_table["cases"]]
    assert [case["case_id"] for case in cases] == ["a", "b", "c"]
    assert cases[1]["energy"] == of_table["cases"][1]["energy"]
    assert list(started["all_cases"]) == ["a", "b", "c"]
    (folders.output / "b.nii.gz").unlink()
    run(folders, lines, "--continue")
    assert lines.read_bytes().startswith(before)
    first, second = read_summary(lines)
    assert {case["case_id"]: case["status"] for case in second.cases} == {"a": "skipped", "b": "done", "c": "skipped"}  # as they end
    assert second.cases[0] == first.cases[0] | {"status": "skipped"}
    assert not second.is_interrupted


@pytest.mark.parametrize("torn", [b'{"case_id": "c", "sta', b"\0\0\0\0", b"\xc3"])
def test_a_torn_last_line_is_left_out_and_removed(folders, lines, torn):
    run(folders, lines)
    whole = lines.read_bytes().splitlines(keepends=True)[:3]
    lines.write_bytes(b"".join(whole) + torn)
    (torn_run,) = read_summary(lines)
    assert [case["case_id"] for case in torn_run.cases] == ["a", "b"]
    assert torn_run.is_interrupted
    shutil.rmtree(folders.output / RECORD_FOLDER)
    assert "1 existing label map has no record in it, as after a kill: c; " in run(folders, lines, "--continue")
    assert lines.read_bytes().startswith(b"".join(whole) + b'{"run": "started"')
    assert [case["written"] is None for case in read_summary(lines)[-1].cases] == [False, False, True]


def test_a_whole_last_line_without_its_end_counts(folders, lines):
    run(folders, lines)
    lines.write_bytes(b"".join(lines.read_bytes().splitlines(keepends=True)[:4])[:-1])
    assert len(read_summary(lines)[0].cases) == 3
    run(folders, lines, "--continue")
    assert [case["written"] is None for case in read_summary(lines)[-1].cases] == [False] * 3


HEAD = b'{"run": "started", "schema": 1, "parameters": {}, "num_parts": 1, "part_id": 0}\n'


def test_another_file_is_not_taken_up(folders, lines):
    for content, problem in (
        (b'{"a": 1}\n', "line 1 is not of a run that began on a line before"),
        (b"notes\nof mine\n", "line 1 is not JSON"),
        (b"[1]\n", "line 1 is not of a run"),
        (HEAD.replace(b"1,", b"9,", 1), "its schema is 9"),
        (HEAD + b'{"case_id": 3, "status": "done"}\n', "expected text"),
        (HEAD + b'{"ca\n{"run": "ended"}\n', "line 2 is not JSON"),
    ):
        lines.write_bytes(content)
        said = run(folders, lines, "--continue", status=1)
        assert said.startswith(f"crfrefine: error: {lines}: ")
        assert problem in said
        assert lines.read_bytes() == content


def test_what_the_disk_does_not_take_is_written_later(tmp_path, monkeypatch):
    """Half a line, then nothing for a while: no byte is lost, none is written twice."""
    path = tmp_path / "summary.jsonl"
    file = SummaryLines(path, RunSummary("cpu", 1, {}), append=False)
    file.save_first()
    real = os.write
    left = [20]

    def write(descriptor, content):
        if not left[0]:
            raise OSError(28, "No space left on device")
        taken = real(descriptor, content[: left[0]])
        left[0] -= taken
        return taken

    monkeypatch.setattr("crfrefine.runs.infer.summary_writing.os.write", write)
    for name in ("a", "b"):
        file.case_ended(CaseRecord(name, "done"))
    left[0] = 10**6
    file.case_ended(CaseRecord("c", "done"))
    left[0] = 0
    with pytest.raises(CrfRefineError, match="the disk is full"):
        file.save_last()
    (run,) = read_summary(path)
    assert [case["case_id"] for case in run.cases] == ["a", "b", "c"]


def test_a_part_that_replaces_the_summary_of_another_part_says_so(folders, tmp_path):
    """All parts of a job array with one name for the summary leave the records of one of them."""
    for path in (tmp_path / "summary.jsonl", tmp_path / "summary.json"):
        said = f"{path}: replaces the summary of part 0 of the same run; name another file for each part"
        for part_id, is_said in ((0, False), (0, False), (1, True)):
            assert (said in run(folders, path, "--num-parts", 2, "--part-id", part_id)) == is_said


def test_a_summary_is_there_before_the_first_case_ends(tmp_path):
    """A part that is killed in its first case leaves the list of all cases."""
    summary = RunSummary("cpu", 1, {}, num_parts=2, part_id=1, all_cases={"a": "out/a.nii.gz", "b": "out/b.nii.gz"})
    for name in ("summary.json", "summary.jsonl"):
        summary_file(tmp_path / name, summary, resume=False).save_first()
        (run,) = read_summary(tmp_path / name)
        assert (list(run.head["all_cases"]), run.cases, run.is_interrupted) == (["a", "b"], [], True)
