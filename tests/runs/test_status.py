"""`crfrefine status`: no part, no case is lost, whatever became of the runs."""

import json
import os
import shutil
from pathlib import Path

import pytest
from cli_helpers import Folders, run_here, write_case, write_folders

from crfrefine.runs.infer.records import RECORD_FOLDER, CaseRecord, RunSummary
from crfrefine.runs.infer.summary_writing import summary_file

NAMES = ("a", "b", "c", "d", "e")
LINES, TABLE = "out/part_{}.jsonl", "out/part_{}.json"
QUICK = ("--set", "mean_field.num_iterations=1", "--set", "mean_field.filter=truncated", "--threads", 1)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Cases in a folder whose name a shell would take apart, and which is the current one."""
    root = tmp_path / "arch ive's"
    root.mkdir()
    monkeypatch.chdir(root)
    write_folders(root, *NAMES)
    return Folders(Path("images"), Path("logits"), Path("out"))


def infer(folders, *options, status=None):
    return run_here("infer", *folders.arguments, *QUICK, *options, status=status)


def one_case(name):
    return "-i", f"images/{name}_0000.nii.gz", "-i", f"images/{name}_0001.nii.gz", "-p", f"logits/{name}.nii.gz"


def part(folders, part_id, *options, num_parts=3, summary=LINES):
    return infer(folders, "--num-parts", num_parts, "--part-id", part_id, "--summary", summary.format(part_id), *options)


def status_of(*paths, exit_status):
    result = run_here("status", *paths, "--json")
    assert result.status == exit_status, result.stderr
    content = json.loads(result.stdout)
    assert content["is_complete"] == (exit_status == 0)
    (run,) = content["runs"]
    return run


def states(run):
    return {case["case_id"]: case["state"] for case in run["cases"]}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.nii.gz"))}


def test_a_part_that_never_started_is_seen(folders, monkeypatch):
    for part_id in (0, 2):
        assert part(folders, part_id, summary=TABLE).status == 0
    run, root = status_of("out", exit_status=1), Path.cwd()
    assert states(run) == {"a": "done", "b": "missing", "c": "done", "d": "done", "e": "missing"}
    assert [case["part_id"] for case in run["cases"]] == [0, 1, 2, 0, 1]
    monkeypatch.chdir("/")
    assert run_here("status", root / "out", status=1).stdout.splitlines() == [
        f"{root / 'out'}: 5 cases: 3 done, 0 failed, 2 missing",
        "  missing: b, e",
        "  run the same command, part 1 of 3, with --continue",
    ]
    monkeypatch.chdir(root)
    assert part(folders, 1, "--continue").status == 0
    assert "5 cases: 5 done, 0 failed, 0 missing" in run_here("status", "out", status=0).stdout
    assert infer(folders, "-o", "undisturbed").status == 0
    assert contents(Path("out")) == contents(Path("undisturbed"))


def test_a_run_that_was_interrupted_is_told_and_continued(folders):
    """As the record says that a killed run leaves: without its end. Files that were removed, too."""
    assert infer(folders, "--save-logits").status == 0
    (record,) = records()
    record.write_bytes(b"".join(record.read_bytes().splitlines(keepends=True)[:4]))
    for name in ("b_logits", "c", "d", "e"):
        Path(f"out/{name}.nii.gz").unlink()
    run = status_of("out", exit_status=1)
    assert {case["case_id"]: case["reason"] for case in run["cases"] if case["state"] == "missing"} == {
        "b": f"{Path.cwd()}/out/b_logits.nii.gz is gone",
        "c": f"{Path.cwd()}/out/c.nii.gz is gone",
        **dict.fromkeys("de", "not reached"),
    }
    assert "  run the same command with --continue" in run_here("status", "out").stdout
    assert infer(folders, "--save-logits", "--continue").status == 0
    status_of("out", exit_status=0)
    assert len(records()) == 1


def test_a_failed_case_has_its_error_until_it_is_done_and_the_last_summary_counts(folders):
    whole = Path("logits/b.nii.gz").read_bytes()
    Path("logits/b.nii.gz").write_bytes(whole[:100])
    assert infer(folders, "--summary", "first.json").status == 1
    run = status_of("first.json", exit_status=1)
    (failed,) = [case for case in run["cases"] if case["state"] == "failed"]
    assert failed["case_id"] == "b"
    assert failed["reason"].startswith("logits/b.nii.gz: ")
    assert "  failed: b: logits/b.nii.gz: " in run_here("status", "out").stdout
    Path("logits/b.nii.gz").write_bytes(whole)
    assert infer(folders, "--summary", "second.jsonl", "--continue").status == 0
    status_of("first.json", exit_status=1)
    for paths in (("first.json", "second.jsonl"), ("second.jsonl", "first.json"), (".",)):
        assert set(states(status_of(*paths, exit_status=0)).values()) == {"done"}


def test_a_folder_that_was_moved_may_be_continued(folders):
    assert infer(folders, "--summary", "s.json").status == 0
    Path("out").rename("elsewhere")
    assert status_of("s.json", exit_status=1)["num_missing"] == 5
    Path("elsewhere/b.nii.gz").unlink()
    assert infer(Folders(folders.images, folders.logits, Path("elsewhere")), "--continue").status == 0
    run = status_of("elsewhere", exit_status=0)
    assert (Path(run["output_folder"]).name, run["num_done"]) == ("elsewhere", len(NAMES))
    result = run_here("status", "elsewhere/a.nii.gz", status=1)
    assert "is no record: a run whose output is a file keeps none; name the file that --summary wrote" in result.stderr


def test_a_label_map_from_before_the_run_is_not_taken_for_its_result(folders):
    assert infer(folders).status == 0
    shutil.rmtree(folders.output / RECORD_FOLDER)  # as of an earlier version
    for path in folders.output.iterdir():
        os.utime(path, (1e9, 1e9))
    assert part(folders, 0, num_parts=2).status == 0
    run = status_of("out", exit_status=1)
    assert states(run) == {"a": "done", "b": "missing", "c": "done", "d": "missing", "e": "done"}
    assert part(folders, 1, "--continue", num_parts=2).status == 0
    status_of("out", exit_status=0)


def test_cases_that_appear_between_two_parts_are_not_lost(folders):
    """A new case moves all cases behind it into other parts: c was in part 2, and is in part 0 now."""
    assert part(folders, 0).status == 0
    write_case(folders, "aa", 9)
    for part_id in (1, 2):
        assert part(folders, part_id).status == 0
    run = status_of("out", exit_status=1)
    assert states(run) == {"a": "done", "aa": "done", "b": "done", "c": "missing", "d": "done", "e": "done"}
    assert "part 0 of 3," in run_here("status", "out").stdout
    assert part(folders, 0, "--continue").status == 0
    status_of("out", exit_status=0)


def test_a_loop_over_cases_is_one_line(folders):
    for name in "abc":
        run_here("infer", *one_case(name), "-o", "out", *QUICK, status=0)
    assert run_here("status", "out", status=0).stdout.splitlines() == [f"{Path.cwd() / 'out'}: 3 cases: 3 done, 0 failed, 0 missing"]
    Path("out/c.nii.gz").unlink()
    assert run_here("status", "out", status=1).stdout.splitlines() == [
        f"{Path.cwd() / 'out'}: 3 cases: 2 done, 0 failed, 1 missing",
        f"  missing: c: {Path.cwd() / 'out' / 'c.nii.gz'} is gone",
        "  run the same command with --continue",
    ]


# ---- The record in the output folder


def records(folder=Path("out")):
    return sorted((folder / RECORD_FOLDER).iterdir())


def test_a_summary_beside_the_record_is_a_copy(folders):
    assert infer(folders, "--summary", "out/s.json").status == 0
    lines = [json.loads(line) for line in records()[0].read_text().splitlines()]
    assert [line for line in lines if "case_id" in line] == json.loads(Path("out/s.json").read_text())["cases"]
    assert len(states(status_of("out", exit_status=0))) == 5


def test_parts_keep_records_of_their_own(folders):
    for part_id in (0, 2):
        assert infer(folders, "--num-parts", 3, "--part-id", part_id).status == 0
    assert len(records()) == 2
    assert list(states(status_of("out", exit_status=1)).values()).count("missing") == 2
    Path("out/part_9.json").write_text('{"schema": 1, ')
    assert "note: out/part_9.json: not JSON: " in run_here("status", "out").stdout


def test_a_new_run_makes_the_records_of_the_last_one_void(folders):
    assert infer(folders).status == 0
    assert infer(folders, "--num-parts", 2, "--part-id", 0, "--set", "bilateral.weight=9").status == 0
    run = status_of("out", exit_status=1)
    assert states(run) == {"a": "done", "b": "missing", "c": "done", "d": "missing", "e": "done"}
    assert {case["reason"] for case in run["cases"]} == {None, "refined with other parameters than those of the last run"}


def test_wrong_usage_and_what_leaves_no_record(folders):
    assert run_here("status").status == 2
    assert run_here("status", "nowhere").status == 1
    result = infer(folders, "--summary", f"out/{RECORD_FOLDER}/mine.jsonl", status=1)
    assert "is for the records that runs keep themselves" in result.stderr
    assert run_here("infer", *one_case("a"), *QUICK, "-o", "one/a.nii.gz").status == 0
    assert [path.name for path in Path("one").iterdir()] == ["a.nii.gz"]
    for path in Path("logits").iterdir():
        path.unlink()
    assert infer(folders).status == 1
    assert not folders.output.exists()


# ---- Summaries that hold what infer does not write

TOO_LONG = "x" * 5000
NOT_ENCODABLE = "\ud800"


@pytest.fixture
def path(tmp_path):
    """The summary of a run that reached its only case."""
    run = RunSummary(
        "cpu", 1, {}, all_cases={"a": "a.nii.gz"}, output_folder="/out", inputs=("/in",), working_folder="/", command=("infer",)
    )
    run.cases.append(CaseRecord("a", "done"))
    summary_file(tmp_path / "s.json", run, resume=False).save_last()
    return tmp_path / "s.json"


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_folder_without_a_usable_summary_is_an_error(tmp_path):
    old = '{"schema": 1, "parameters": {}, "num_parts": 1, "part_id": 0, "cases": []}'
    for content, problem in (('{"labels": {}}', "holds no record of `infer`"), (old, "does not tell which cases the run has")):
        (tmp_path / "s.json").write_text(content)
        result = run_here("status", tmp_path, status=1)
        assert result.stderr.startswith(f"crfrefine: error: {tmp_path}")
        assert problem in result.stderr


def test_a_summary_with_other_values_is_an_error_and_no_bug(path):
    whole = path.read_text()
    for name, value in (
        *(("num_parts", 0), ("part_id", 7), ("all_cases", ["a"]), ("all_cases", {"a": 3}), ("all_cases", {"a": "x\0y"})),
        *(("inputs", None), ("started", 3), ("working_folder", None)),
        ("cases", [{"case_id": "a", "status": "done", "other_parameters": 3}]),
    ):
        path.write_text(whole)
        change(path, **{name: value})
        result = run_here("status", path, status=1)
        assert result.stderr.startswith(f"crfrefine: error: {path}: "), (name, value)


def test_a_label_map_whose_name_no_system_takes_is_missing(path):
    whole = path.read_text()
    for values in (
        *(
            {},
            {"all_cases": {"a": TOO_LONG}},
            {"all_cases": {"a": TOO_LONG}, "cases": []},
            {"output_folder": TOO_LONG},
            {"all_cases": {"a": NOT_ENCODABLE}},
        ),
        *({"cases": [{"case_id": "a", "status": "done", "output": name}]} for name in (TOO_LONG, NOT_ENCODABLE, "a\0b")),
    ):
        path.write_text(whole)
        change(path, **values)
        result = run_here("status", path, "--json")
        assert (result.status, result.stderr) == (1, ""), values
        (run,) = json.loads(result.stdout)["runs"]
        assert (run["num_cases"], run["num_missing"]) == (1, 1)
