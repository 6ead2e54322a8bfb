"""`infer --continue --summary`: the records of earlier runs are kept as long as they are true, also those of a killed run."""

import json
import shutil
import subprocess
import time
from dataclasses import replace

import numpy as np
import pytest
from cli_helpers import command, files_in, infer, load_nifti, refined, run_here, save_nifti, write_folders

from crfrefine.runs.infer.records import RECORD_FOLDER, CaseRecord, RunSummary
from crfrefine.runs.infer.summary_reading import read_summary
from crfrefine.runs.infer.summary_writing import SAVE_SECONDS, SummaryFile


@pytest.fixture
def summary(tmp_path):
    return tmp_path / "summary.json"


def run(folders, *options, status=0):
    """Return standard error."""
    result = infer(folders, *options)
    assert result.status == status, result.stderr
    return result.stderr


def forget(folders):
    """Leave the output as a run of an earlier version does, which kept no record there."""
    shutil.rmtree(folders.output / RECORD_FOLDER)


def content(summary):
    return json.loads(summary.read_text())


def with_record(summary):
    """What became of each case, and whether anything is known of how it was refined."""
    return [(case["status"], case["voxels_changed"] is not None) for case in content(summary)["cases"]]


def test_skipped_cases_keep_what_is_known_of_them(folders, summary):
    run(folders, "--summary", summary, "--save-probabilities", "--save-logits", "--preview")
    first = content(summary)
    first["cases"][0]["hausdorff"] = {"mm": [1.5, None]}
    summary.write_text(json.dumps(first))
    forget(folders)
    (folders.output / "b.nii.gz").unlink()
    for expected in (["skipped", "done", "skipped"], ["skipped"] * 3):
        result = infer(folders, "--summary", summary, "--continue", status=0)
        assert "note" not in result.stderr
        again = content(summary)
        assert [case["status"] for case in again["cases"]] == expected
        assert (again["num_done"], again["num_skipped"]) == (expected.count("done"), expected.count("skipped"))
        assert again["not_reached"] == []
        for number in (0, 2):
            assert again["cases"][number] == first["cases"][number] | {"status": "skipped"}
    _, a, b, _ = (line.split("\t") for line in result.stdout.splitlines())
    assert a[:4] == ["a", "skipped", str(first["cases"][0]["num_iterations"]), str(first["cases"][0]["voxels_changed"])]
    assert b[0] == "b"
    assert b[2] != ""


def test_without_a_record_skipped_cases_have_no_values(folders, summary):
    run(folders)
    forget(folders)
    summary.touch()
    for _ in range(2):
        said = run(folders, "--summary", summary, "--continue")
        assert "3 existing label maps have no record in it, as after a kill: a, b, c; " in said
        assert [(case["status"], case["energy"], case["written"]) for case in content(summary)["cases"]] == [("skipped", [], None)] * 3


def test_a_damaged_record_is_named_and_replaced(folders, summary):
    run(folders)
    (record,) = (folders.output / RECORD_FOLDER).iterdir()
    whole = record.read_text()
    record.write_text("notes of mine\n")
    assert f"{record}: expected the summary of an earlier" in run(folders, "--continue")
    assert f"{record}: " not in run(folders, "--continue")
    record.write_text(whole)
    run(folders, "--summary", summary, "--continue")
    assert with_record(summary) == [("skipped", True)] * 3, "of the record in the output folder"


def test_a_case_that_ended_after_the_last_save_is_named(folders, summary):
    """As a kill leaves it: a label map without a record, beside records of other cases. A record of another format is of another file."""
    run(folders, "--summary", summary)
    forget(folders)
    kept = content(summary)
    kept["cases"] = [case for case in kept["cases"] if case["case_id"] != "b"]
    summary.write_text(json.dumps(kept))
    said = run(folders, "--summary", summary, "--continue")
    assert f"{summary}: 1 existing label map has no record in it, as after a kill: b; " in said
    assert with_record(summary) == [("skipped", True), ("skipped", False), ("skipped", True)]
    save_nifti(folders.output / "c.nii", load_nifti(folders.output / "c.nii.gz"))
    said = run(folders, "--continue", "--output-format", ".nii")
    assert "1 existing label map has no record in it, as after a kill: c" in said
    assert "changed since" not in said


def test_a_label_map_that_another_run_wrote_is_not_described_by_the_record(folders, summary):
    run(folders, "--summary", summary)
    time.sleep(0.02)  # clocks of files may tick slowly
    run(folders, "--set", "bilateral.weight=9")
    (folders.output / "c.nii.gz").unlink()
    forget(folders)
    said = run(folders, "--summary", summary, "--continue", "--set", "bilateral.weight=9")
    assert f"{summary}: 2 label maps were changed since it was written: a, b; their records are left out" in said
    assert with_record(summary) == [("skipped", False), ("skipped", False), ("done", True)]


@pytest.mark.parametrize("keeps", ["record", "summary"])
def test_cases_of_other_parameters_are_named_and_refined_again(folders, summary, keeps):
    """So that the folder holds what an undisturbed run gives, whichever of the two files knows it."""
    before = ("--set", "bilateral.weight=2", "--set", "intensity.normalization=zscore")

    def go(*changes):
        said = run(folders, *(("--summary", summary) if keeps == "summary" else ()), *changes)
        if keeps == "summary":
            forget(folders)
        return said

    go(*before)
    (folders.output / "a.nii.gz").unlink()
    assert "other parameters" not in go("--continue", *before)
    (folders.output / "a.nii.gz").unlink()
    said = go("--continue")
    names = "b, c (other values of intensity.normalization, bilateral.weight)"
    assert f"2 cases were refined with other parameters: {names}; --continue refines them again\n" in said
    assert "3 done in" in said
    assert "3 skipped in" in go("--continue")
    for case_id in "abc":
        np.testing.assert_array_equal(load_nifti(folders.output / f"{case_id}.nii.gz"), refined(folders, case_id))


def test_cases_of_other_inputs_are_named(folders, tmp_path):
    """The same names in another folder may be the output of another network."""
    run(folders)
    shutil.copytree(folders.logits, tmp_path / "other")
    for _ in range(2):
        said = run(replace(folders, logits=tmp_path / "other"), "--continue")
        assert "3 cases were refined from inputs other than those given now: a, b, c; " in said
        assert "3 skipped in" in said
    assert "inputs" not in run(folders, "--continue")


def test_a_parameter_that_an_older_version_did_not_have_is_at_its_default(folders, summary):
    run(folders, "--summary", summary)
    forget(folders)
    older = content(summary)
    del older["parameters"]["mean_field"]["output_temperature"], older["parameters"]["postprocess"]
    summary.write_text(json.dumps(older))
    assert "other parameters" not in run(folders, "--summary", summary, "--continue")
    said = run(folders, "--summary", summary, "--continue", "--set", "mean_field.output_temperature=0.5")
    assert "(other values of mean_field.output_temperature)" in said


def test_records_of_cases_that_the_run_does_not_reach_are_kept(folders, summary):
    run(folders, "--summary", summary)
    first = content(summary)
    (folders.output / "a.nii.gz").unlink()
    (folders.logits / "a.nii.gz").write_bytes(b"")
    run(folders, "--summary", summary, "--continue", "--fail-fast", status=1)
    stopped = content(summary)
    assert [(case["case_id"], case["status"]) for case in stopped["cases"]] == [("a", "failed")]
    assert stopped["not_reached"] == first["cases"][1:]
    run(folders, "--summary", summary, "--continue", status=1)
    again = content(summary)
    assert again["cases"][1:] == [case | {"status": "skipped"} for case in first["cases"][1:]]
    assert again["not_reached"] == []
    for path in (*folders.images.glob("b_*"), folders.logits / "b.nii.gz"):
        path.unlink()
    said = run(folders, "--summary", summary, "--continue", status=1)
    assert f"{summary}: the records of cases that are not in this run are left out: b" in said
    assert [case["case_id"] for case in content(summary)["cases"]] == ["a", "c"]


def test_the_summary_of_another_part_or_of_other_cases_is_not_replaced(folders, summary, tmp_path):
    run(folders, "--summary", summary)
    before = summary.read_bytes()
    said = run(folders, "--summary", summary, "--continue", "--num-parts", 2, "--part-id", 1, status=1)
    assert f"{summary}: is the summary of other cases (" in said
    assert "one for each part" in said
    other = write_folders(tmp_path / "other", "d", "e")
    assert "is the summary of other cases (a, b, c; part 0 of 1)" in run(other, "--summary", summary, "--continue", status=1)
    assert summary.read_bytes() == before
    assert files_in(other.output) == []


def spoil(text, name, value):
    summary = json.loads(text)
    return json.dumps(summary | {"cases": [summary["cases"][0] | {name: value}, *summary["cases"][1:]]})


def test_a_file_that_is_no_summary_of_infer_is_not_replaced(folders, summary):
    run(folders, "--summary", summary)
    whole = summary.read_text()
    (folders.output / "b.nii.gz").unlink()
    values = {"case_id": 5, "energy": ["low"], "num_iterations": 2.5, "times": {"read": "x" * 5000}, "other_parameters": [1]}
    for text in (
        whole[: len(whole) // 2],
        "notes of mine\n",
        '{"schema": 1, "version": "1", "cases": []}',
        "[1, 2]",
        whole.replace('"schema": 1', '"schema": 2', 1),
        *(json.dumps(json.loads(whole) | {name: value}) for name, value in (("parameters", 3), ("cases", 3), ("cases", [3]))),
        *(spoil(whole, name, value) for name, value in values.items()),
    ):
        summary.write_text(text)
        said = run(folders, "--summary", summary, "--continue", status=1)
        assert said.startswith(f"crfrefine: error: {summary}: "), text[:40]
        assert "name another file, or remove this one" in said
        assert len(said) < 1000
        assert summary.read_text() == text
        assert "b.nii.gz" not in files_in(folders.output)
    run(folders, "--summary", summary)  # Without --continue, the file that the user names is replaced, as ever.
    assert content(summary)["num_done"] == 3


def test_a_device_as_summary_is_refused_before_it_is_read(folders, summary):
    summary.symlink_to("/dev/zero")  # reading it would take for ever
    result = run_here("infer", *folders.arguments, "--summary", summary, "--continue", status=1)
    assert "it is a device, pipe or socket, which is not replaced by a file" in result.stderr


@pytest.mark.long
def test_a_killed_run_leaves_the_records_of_its_cases(tmp_path, summary):
    """The record in the output folder has every case that ended, and not only those up to the last second."""
    names = [f"case{number:02}" for number in range(60)]
    folders = write_folders(tmp_path, *names)
    arguments = ("infer", *folders.arguments, "--summary", summary, "--threads", 1)
    with subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 100
        while not (summary.is_file() and content(summary)["cases"]):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
    first = content(summary)
    assert (first["interrupted"], first["num_cases"]) == (True, len(names))
    assert first["seconds"] > 0.0
    assert first["num_done"] == len(first["cases"]) >= 1
    (run,) = read_summary(*(folders.output / RECORD_FOLDER).iterdir())
    recorded = [case["case_id"] for case in run.cases]
    assert run.is_interrupted
    assert [case["case_id"] for case in first["cases"]] == recorded[: len(first["cases"])]
    there = sorted(path.name.partition(".")[0] for path in folders.output.glob("case*"))
    assert recorded == there[: len(recorded)] == names[: len(recorded)]
    assert len(there) <= len(recorded) + 1  # The kill may fall between a label map and its line.
    assert infer(folders, "--summary", summary, "--continue", "--set", "mean_field.filter=auto").status == 0
    last = content(summary)
    assert (last["interrupted"], last["not_reached"], last["num_skipped"] + last["num_done"]) == (False, [], len(names))
    for case, known in zip(last["cases"], run.cases, strict=False):
        assert case == known | {"status": "skipped"}


def test_saves_are_seldom_and_none_is_lost(tmp_path):
    """Hundreds of cases are saved about once a second; the file has the last of them a moment later, without another case."""
    path = tmp_path / "summary.json"
    summary = RunSummary("cpu", 1, {})
    file = SummaryFile(path, summary)
    seen = set()
    started = time.monotonic()
    for number in range(300):
        summary.cases.append(CaseRecord(f"case{number:04d}", "done"))
        file.case_ended(CaseRecord("a"))
        time.sleep(0.0005)
        if path.exists():
            seen.add(path.stat().st_ino)
    assert len(seen) <= (time.monotonic() - started) / SAVE_SECONDS + 1
    deadline = time.monotonic() + 30
    while not path.exists() or len(content(path)["cases"]) < 300:
        assert time.monotonic() < deadline, "the last cases were not saved"
        time.sleep(0.01)
    assert content(path)["interrupted"]
    file.save_last()
    assert not content(path)["interrupted"]
    file.case_ended(CaseRecord("a"))
    time.sleep(0.05)
    assert not content(path)["interrupted"], "saved after the end"
