"""`crfrefine status`: no part, no case is lost, whatever became of the runs, and the commands that it prints do the rest."""

import json
import os
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from cli_helpers import Folders, load_nifti, run_here, save_nifti, write_case, write_folders

from crfrefine.parameters.model import CrfParameters
from crfrefine.runs.infer.options import InferenceOptions
from crfrefine.runs.infer.records import RECORD_FOLDER, CaseRecord, RunSummary
from crfrefine.runs.infer.run import run_inference
from crfrefine.runs.infer.summary_writing import summary_file
from crfrefine.runs.status.finding import find_status
from crfrefine.runs.status.report import quote, rest_command, summary_of_part

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


def run_line(line, monkeypatch):
    before = Path.cwd()
    folder, _, rest = line.rpartition(" && ")
    monkeypatch.chdir(shlex.split(folder)[1] if folder else before)
    run_here(*shlex.split(rest)[1:], status=0)
    monkeypatch.chdir(before)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.nii.gz"))}


def test_a_part_that_never_started_is_seen_and_its_command_does_it(folders, monkeypatch):
    for part_id in (0, 2):
        assert part(folders, part_id, summary=TABLE).status == 0
    run, root = status_of("out", exit_status=1), Path.cwd()
    assert states(run) == {"a": "done", "b": "missing", "c": "done", "d": "done", "e": "missing"}
    assert [entry["run"] for entry in run["parts"]] == ["ended", "not started", "ended"]
    assert [entry["num_missing"] for entry in run["parts"]] == [0, 2, 0]
    monkeypatch.chdir("/")
    result = run_here("status", root / "out", status=1)
    assert "part 1: 0 of 2 done, 2 missing; no record of it: not started" in result.stdout
    assert "missing: b, e\n" in result.stdout
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("cd ")]
    run_line(line, monkeypatch)
    monkeypatch.chdir(root)
    assert Path(TABLE.format(1)).is_file()
    assert status_of("out", exit_status=0)["commands"] == []
    assert "5 cases: 5 done, 0 failed, 0 missing" in run_here("status", "out").stdout
    assert infer(folders, "-o", "undisturbed").status == 0
    assert contents(Path("out")) == contents(Path("undisturbed"))


def test_a_run_that_was_interrupted_is_told_and_continued(folders, monkeypatch):
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
    assert run["parts"][0]["run"] == "interrupted"
    assert "interrupted" in run_here("status", "out").stdout
    assert "--summary" not in run["commands"][0]
    run_line(run["commands"][0], monkeypatch)
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


def test_a_folder_that_was_moved_is_named_and_may_be_continued(folders):
    assert infer(folders, "--summary", "s.json").status == 0
    Path("out").rename("elsewhere")
    run = status_of("s.json", exit_status=1)
    assert any(note.startswith(f"there is no {Path.cwd()}/out here") for note in run["notes"])
    assert run["num_missing"] == 5
    Path("elsewhere/b.nii.gz").unlink()
    assert infer(Folders(folders.images, folders.logits, Path("elsewhere")), "--continue").status == 0
    run = status_of("elsewhere", exit_status=0)
    assert (Path(run["output_folder"]).name, run["num_done"], run["notes"]) == ("elsewhere", len(NAMES), [])
    result = run_here("status", "elsewhere/a.nii.gz", status=1)
    assert "is no record: a run whose output is a file keeps none; name the file that --summary wrote" in result.stderr


def test_a_label_map_from_before_the_run_is_not_taken_for_its_result(folders):
    """The command with --continue would keep it, so a note says what to do."""
    assert infer(folders).status == 0
    shutil.rmtree(folders.output / RECORD_FOLDER)  # as of an earlier version
    for path in folders.output.iterdir():
        os.utime(path, (1e9, 1e9))
    assert part(folders, 0, num_parts=2).status == 0
    run = status_of("out", exit_status=1)
    assert states(run) == {"a": "done", "b": "missing", "c": "done", "d": "missing", "e": "done"}
    assert any("which --continue keeps: b, d; to refine these cases again, remove these label maps first" in note for note in run["notes"])
    assert part(folders, 1, "--continue", num_parts=2).status == 0
    status_of("out", exit_status=0)


def test_cases_that_appear_between_two_parts_are_not_lost(folders, monkeypatch):
    """A new case moves all cases behind it into other parts: c was in part 2, and is in part 0 now."""
    assert part(folders, 0).status == 0
    write_case(folders, "aa", 9)
    for part_id in (1, 2):
        assert part(folders, part_id).status == 0
    run = status_of("out", exit_status=1)
    assert states(run) == {"a": "done", "aa": "done", "b": "done", "c": "missing", "d": "done", "e": "done"}
    assert any("1 case of the last run not in the first one: aa" in note for note in run["notes"])
    assert len(run["commands"]) == 1
    assert "--part-id 0 " in run["commands"][0]
    run_line(run["commands"][0], monkeypatch)
    status_of("out", exit_status=0)


def test_runs_with_other_inputs_are_told_apart(folders):
    for name in "ab":
        assert run_here("infer", *one_case(name), "-o", "out", *QUICK, "--summary", f"out/{name}.json").status == 0
    Path("out/b.nii.gz").unlink()
    result = run_here("status", "out", status=1)
    assert result.stdout.count("1 case: 1 done") == 1
    assert result.stdout.count("1 case: 0 done, 0 failed, 1 missing") == 1


def test_a_loop_over_cases_is_one_line(folders):
    for name in "abc":
        run_here("infer", *one_case(name), "-o", "out", *QUICK, status=0)
    shutil.copy("logits/b.nii.gz", "logits/again.nii.gz")  # One case is done again, from another file.
    run_here("infer", *one_case("b")[:4], "-p", "logits/again.nii.gz", "-o", "out", *QUICK, status=0)
    assert run_here("status", "out", status=0).stdout.splitlines() == [
        f"{Path.cwd() / 'out'}: 3 cases of 4 runs: 3 done, 0 failed, 0 missing",
        "  note: 1 label map changed since it was recorded: b",
    ]
    Path("out/c.nii.gz").unlink()
    found = [line for line in run_here("status", "out", status=1).stdout.splitlines() if "out: " in line]
    assert sorted(line.partition("out: ")[2] for line in found) == [
        "1 case: 0 done, 0 failed, 1 missing",
        "2 cases of 3 runs: 2 done, 0 failed, 0 missing",
    ]


def test_a_run_from_python_has_no_command(folders):
    options = InferenceOptions((folders.images,), (folders.logits,), folders.output)
    run_inference(replace(options, parameters=CrfParameters().replace(**{"mean_field.num_iterations": 1})))
    Path("out/a.nii.gz").unlink()
    (run,) = find_status([Path("out")]).runs
    assert run.commands == []
    assert any("run_inference with resume=True" in note for note in run.notes)


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
    assert [entry["run"] for entry in status_of("out", exit_status=1)["parts"]] == ["ended", "not started", "ended"]
    Path("out/part_9.json").write_text('{"schema": 1, ')
    assert "note: out/part_9.json: not JSON: " in run_here("status", "out").stdout


def test_a_new_run_makes_the_records_of_the_last_one_void(folders):
    assert infer(folders).status == 0
    assert infer(folders, "--num-parts", 2, "--part-id", 0, "--set", "bilateral.weight=9").status == 0
    run = status_of("out", exit_status=1)
    assert states(run) == {"a": "done", "b": "missing", "c": "done", "d": "missing", "e": "done"}
    assert {case["reason"] for case in run["cases"]} == {None, "refined with other parameters than those of the last run"}


def test_cases_with_different_numbers_of_labels_and_labels_that_vanished_are_named(folders):
    few = load_nifti(Path("logits/c.nii.gz"))[..., :3]
    save_nifti(Path("logits/c.nii.gz"), few)
    said = infer(folders, "--set", "postprocess.min_component_ml=1000").stderr
    note = "cases have different numbers of labels, as results of different networks have: 3 of c; 4 of a, b, d, e"
    assert note in said
    assert note in infer(folders, "--set", "postprocess.min_component_ml=1000", "--continue").stderr
    run = status_of("out", exit_status=0)
    assert note in run["notes"]
    (vanished,) = [text for text in run["notes"] if text.startswith("labels vanished in 5 cases: a (1, 2, 3), ")]
    assert "c (1, 2)" in vanished


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


# ---- The command that does the rest

TYPED = ["infer", "-i", "my images", "-p", "logits", "-o", "out", "--set", "bilateral.theta_beta=[0.1, 0.05]"]


def test_a_whole_run_is_continued(tmp_path, monkeypatch):
    command = rest_command([*TYPED, "--summary", "s.json", "--continue", "-v"], 1, 0, of_part=0, folder="")
    assert shlex.split(command) == ["crfrefine", *TYPED, "-v", "--continue", "--summary", "s.json"]
    monkeypatch.chdir(tmp_path)
    assert rest_command(TYPED, 1, 0, of_part=0, folder=str(tmp_path)).startswith("crfrefine infer -i 'my images'")
    for name in ("--continue", "--resume"):
        command = rest_command(("infer", "-i", "a", name, "-o", "b"), 1, 0, of_part=0, folder="")
        assert command == "crfrefine infer -i a -o b --continue"


def test_another_part_gets_its_number_and_its_summary():
    for options in (
        ["--num-parts", "5", "--part-id", "0", "--summary", "s_0.json"],
        ["--summary=s_0.json", "--part-id=0", "--continue", "--num-parts=5"],
    ):
        command = rest_command([*TYPED, *options], 5, 3, of_part=0, folder="/the data")
        there, _, rest = command.partition(" && ")
        assert shlex.split(there) == ["cd", "/the data"]
        assert shlex.split(rest) == ["crfrefine", *TYPED, "--continue", "--num-parts", "5", "--part-id", "3", "--summary", "s_3.json"]
    for summary, of_part, part_id, expected in (
        ("out/run0.part0.jsonl", 0, 12, "out/run0.part12.jsonl"),
        ("part_003.json", 3, 12, "part_012.json"),
        ("part_10.json", 10, 3, "part_3.json"),
        ("part_10.json", 0, 3, "part_10_3.json"),
        ("summary.jsonl", 2, 3, "summary_3.jsonl"),
    ):
        assert summary_of_part(summary, of_part, part_id) == expected


def test_a_shell_reads_back_every_word():
    words = ["plain", "a b", "it's", '$HOME `x` "y"', "tab\tline\nend", "caf\u00e9", os.fsdecode(b"\xff\\'"), "-x", ""]
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {' '.join(map(quote, words))}"], capture_output=True, check=True)
    assert done.stdout.split(b"\0")[:-1] == list(map(os.fsencode, words))
    assert all(quote(word).isprintable() for word in words)


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
    for content, problem in (('{"labels": {}}', "holds no record of `infer`"), (old, "does not say which cases the run has")):
        (tmp_path / "s.json").write_text(content)
        result = run_here("status", tmp_path, status=1)
        assert result.stderr.startswith(f"crfrefine: error: {tmp_path}")
        assert problem in result.stderr


def test_a_summary_with_other_values_is_an_error_and_no_bug(path):
    whole = path.read_text()
    for name, value in (
        *(("num_parts", 0), ("part_id", 7), ("all_cases", ["a"]), ("all_cases", {"a": 3}), ("all_cases", {"a": "x\0y"}), ("command", 3)),
        *(("command", [3]), ("inputs", None), ("started", "soon"), ("started", "2026-01-01"), ("working_folder", None)),
        *(("all_cases", {"a": NOT_ENCODABLE}), ("command", [NOT_ENCODABLE]), ("output_folder", NOT_ENCODABLE)),
        ("cases", [{"case_id": "a", "status": "done", "other_parameters": 3}]),
    ):
        path.write_text(whole)
        change(path, **{name: value})
        result = run_here("status", path, status=1)
        assert result.stderr.startswith(f"crfrefine: error: {path}: "), (name, value)


def test_a_label_map_whose_name_no_system_takes_is_missing(path):
    whole = path.read_text()
    for values in (
        *({}, {"all_cases": {"a": TOO_LONG}}, {"all_cases": {"a": TOO_LONG}, "cases": []}, {"output_folder": TOO_LONG}),
        *({"cases": [{"case_id": "a", "status": "done", "output": name}]} for name in (TOO_LONG, NOT_ENCODABLE, "a\0b")),
    ):
        path.write_text(whole)
        change(path, **values)
        result = run_here("status", path, "--json")
        assert (result.status, result.stderr) == (1, ""), values
        (run,) = json.loads(result.stdout)["runs"]
        assert (run["num_cases"], run["num_missing"]) == (1, 1)
