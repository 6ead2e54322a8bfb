"""`crfrefine status`: no part and no case is lost, however the runs ended."""

import json
import os
import shutil
from pathlib import Path

import pytest
from cli_helpers import Folders, run_here, write_case, write_folders

from crfrefine.records.records import RECORD_FOLDER

NAMES = ("a", "b", "c", "d", "e")
QUICK = (
    "--set",
    "mean_field.num_iterations=1",
    "--set",
    "mean_field.filter=truncated",
    "--threads",
    1,
)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Cases in a folder whose name a shell would take apart, and which is the current one."""
    root = tmp_path / "arch ive's"
    root.mkdir()
    monkeypatch.chdir(root)
    write_folders(root, *NAMES)
    return Folders(Path("images"), Path("logits"), Path("out"))


def infer(folders, *options, status=0):
    return run_here("infer", *folders.arguments, *QUICK, *options, status=status)


def one_case(name):
    return (
        "-i",
        f"images/{name}_0000.nii.gz",
        "-i",
        f"images/{name}_0001.nii.gz",
        "-p",
        f"logits/{name}.nii.gz",
    )


def part(folders, part_id, *options, num_parts=3):
    infer(folders, "--num-parts", num_parts, "--part-id", part_id, *options)


def states(*, exit_status, folder="out"):
    """The state and the reason of each case."""
    result = run_here("status", folder, "--json", status=exit_status)
    content = json.loads(result.stdout)
    assert content["is_complete"] == (exit_status == 0)
    (of_folder,) = content["folders"]
    assert Path(of_folder["output_folder"]) == Path(folder).resolve()
    return {case["case_id"]: (case["state"], case["reason"]) for case in of_folder["cases"]}


def names_in(state, **options):
    return [name for name, (found, _) in states(**options).items() if found == state]


def test_a_part_that_never_started_is_seen(folders):
    for part_id in (0, 2):
        part(folders, part_id)
    assert names_in("missing", exit_status=1) == ["b", "e"]
    assert run_here("status", "out", status=1).stdout.splitlines() == [
        "out: 5 cases: 3 done, 0 failed, 2 missing",
        "  missing: b, e: not reached",
        "  run the same command with --continue for the rest: of 3 parts these, --array=1",
    ]
    part(folders, 1, "--continue")
    assert run_here("status", "out", status=0).stdout.splitlines() == [
        "out: 5 cases: 5 done, 0 failed, 0 missing"
    ]
    infer(folders, "-o", "undisturbed")
    for name in NAMES:
        assert (
            Path(f"out/{name}.nii.gz").read_bytes()
            == Path(f"undisturbed/{name}.nii.gz").read_bytes()
        )


def test_a_failed_case_has_its_error_until_it_is_done(folders):
    content = Path("logits/b.nii.gz").read_bytes()
    Path("logits/b.nii.gz").write_bytes(content[:100])
    infer(folders, status=1)
    state, reason = states(exit_status=1)["b"]
    assert (state, reason.partition(": ")[0]) == ("failed", "logits/b.nii.gz")
    assert "  failed: b: logits/b.nii.gz: " in run_here("status", "out").stdout
    Path("logits/b.nii.gz").write_bytes(content)
    infer(folders, "--continue")
    states(exit_status=0)


def test_the_parts_to_run_again_are_those_with_a_case_that_is_not_done(folders):
    """As a job array takes them; the failure of a case names it once."""
    Path("logits/b.nii.gz").unlink()
    for part_id, numbers in ((1, "0-2"), (2, "0-1"), (0, "1")):
        infer(folders, "--num-parts", 3, "--part-id", part_id, status=int(part_id == 1))
        lines = run_here("status", "out", status=1).stdout.splitlines()
        assert lines[-1].endswith(f"for the rest: of 3 parts these, --array={numbers}")
        assert any(line.startswith("  failed: b: no logits in logits; ") for line in lines)
    content = json.loads(run_here("status", "out", "--json", status=1).stdout)
    found = [(case["part_id"], case["num_parts"]) for case in content["folders"][0]["cases"]]
    assert found == [(0, 3), (1, 3), (2, 3), (0, 3), (1, 3)]


def test_parts_with_one_command_share_no_file(folders):
    for part_id in range(3):
        part(folders, part_id, "--summary", "there/all.json", "--statistics")
    found = {}
    for part_id in range(3):
        content = json.loads(Path(f"there/all-{part_id}-of-3.json").read_text())
        found[part_id] = [case["case_id"] for case in content["cases"]]
    assert found == {0: ["a", "d"], 1: ["b", "e"], 2: ["c"]}
    assert len([*Path("there").iterdir()]) == 3
    assert len([*folders.output.glob("statistics-?-of-3.csv")]) == 3
    said = infer(folders, "--continue", "--summary", "new/all.json").stderr

    assert "--summary: the folder new is made, as there was none" in said
    assert Path("new/all.json").is_file()


def test_results_of_an_earlier_run_are_not_taken_for_those_of_a_run_that_begins_anew(folders):
    """The network's output may have changed in between: what the last run did not reach is refined
    again.
    """
    infer(folders)
    part(folders, 0, num_parts=2)
    assert names_in("done", exit_status=0) == list(NAMES)  # Part 1 has not begun anew.
    shutil.rmtree(folders.output / RECORD_FOLDER)
    for path in folders.output.iterdir():
        os.utime(path, (1e9, 1e9))
    Path("logits/c.nii.gz").unlink()  # The run stops there.
    infer(folders, "--fail-fast", status=1)
    found = states(exit_status=1)
    assert {name: found[name][0] for name in "abde"} == {
        "a": "done",
        "b": "done",
        "d": "missing",
        "e": "missing",
    }
    write_case(folders, "c", 3)
    said = infer(folders, "--continue").stderr
    assert "3 done" in said
    assert "2 skipped" in said


def test_wrong_usage_and_what_leaves_no_record(folders):
    assert run_here("status").status == 2
    assert (
        "holds no record of `infer`; name the output folder of a run"
        in run_here("status", "images", status=1).stderr
    )
    assert "nowhere: no such folder" in run_here("status", "nowhere", status=1).stderr
    for summary, status, said in (
        (f"out/{RECORD_FOLDER}/mine.json", 1, "is for the records that runs keep themselves"),
        ("s.jsonl", 2, "a summary of JSON lines is gone"),
        ("/dev/zero", 1, "is no regular file"),
    ):
        assert said in infer(folders, "--summary", summary, status=status).stderr
    run_here("infer", *one_case("a"), *QUICK, "-o", "one/a.nii.gz", status=0)
    assert [path.name for path in Path("one").iterdir()] == ["a.nii.gz"]
    for path in Path("logits").iterdir():
        path.unlink()
    infer(folders, status=1)
    assert not folders.output.exists()
