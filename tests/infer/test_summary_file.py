"""`infer --continue --summary`: the records of earlier runs are kept as long as they are true, also those of a killed run."""

import json
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from cli_helpers import Folders, command, files_in, load_nifti, run_here, save_nifti, write_folders

from crfrefine.infer.earlier import read_earlier
from crfrefine.infer.records import CaseRecord, RunSummary
from crfrefine.infer.run_record import RECORD_FOLDER
from crfrefine.infer.summary_file import SAVE_SECONDS, SummaryFile
from crfrefine.infer.summary_reading import read_summary
from crfrefine.parameters.model import CrfParameters

QUICK = ("--set", "mean_field.num_iterations=1", "--set", "mean_field.filter=truncated", "--threads", 1)


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return write_folders(tmp_path, "a", "b", "c")


@pytest.fixture
def summary(tmp_path: Path) -> Path:
    return tmp_path / "summary.json"


def infer(folders: Folders, summary: Path, *options: object, status: int = 0) -> str:
    """Run; return standard error."""
    result = run_here("infer", *folders.arguments, *QUICK, "--summary", summary, *options)
    assert result.status == status, result.stderr
    return result.stderr


def plain(folders: Folders, *options: object) -> str:
    """Run without a summary; return standard error."""
    result = run_here("infer", *folders.arguments, *QUICK, *options)
    assert result.status == 0, result.stderr
    return result.stderr


def forget(folders: Folders) -> None:
    """Leave the output as a run of an earlier version does, which kept no record there."""
    shutil.rmtree(folders.output / RECORD_FOLDER)


def content(summary: Path) -> dict:
    return json.loads(summary.read_text())


def statuses(summary: Path) -> list[str]:
    return [case["status"] for case in content(summary)["cases"]]


def with_record(summary: Path) -> list[tuple[str, bool]]:
    """What became of each case, and whether anything is known of how it was refined."""
    return [(case["status"], case["voxels_changed"] is not None) for case in content(summary)["cases"]]


def test_skipped_cases_keep_what_is_known_of_them(folders, summary):
    """Through several runs, and in the table on standard output too; also what this version knows nothing of."""
    infer(folders, summary, "--save-probabilities")
    first = content(summary)
    first["cases"][0]["hausdorff"] = {"mm": [1.5, None]}
    summary.write_text(json.dumps(first))
    forget(folders)
    (folders.output / "b.nii.gz").unlink()
    for expected in (["skipped", "done", "skipped"], ["skipped"] * 3):
        result = run_here("infer", *folders.arguments, *QUICK, "--summary", summary, "--continue")
        assert result.status == 0, result.stderr
        assert "note" not in result.stderr
        again = content(summary)
        assert statuses(summary) == expected
        assert (again["num_done"], again["num_skipped"]) == (expected.count("done"), expected.count("skipped"))
        assert again["not_reached"] == []
        for case_id in (0, 2):
            assert again["cases"][case_id] == first["cases"][case_id] | {"status": "skipped"}
    _, a, b, _ = (line.split("\t") for line in result.stdout.splitlines())
    assert a[:4] == ["a", "skipped", str(first["cases"][0]["num_iterations"]), str(first["cases"][0]["voxels_changed"])]
    assert b[0] == "b"
    assert b[2] != ""


def test_a_file_that_was_cut_off_and_a_failed_case_are_done_again(folders, summary):
    logits = folders.logits / "c.nii.gz"
    whole = logits.read_bytes()
    logits.write_bytes(b"")
    infer(folders, summary, "--save-probabilities", status=1)
    for path in (folders.output / "a.nii.gz", folders.output / "b_probabilities.nii.gz"):
        path.write_bytes(path.read_bytes()[:-9])
    logits.write_bytes(whole)
    infer(folders, summary, "--save-probabilities", "--continue")
    assert [(case["status"], case["error"]) for case in content(summary)["cases"]] == [("done", None)] * 3
    infer(folders, summary, "--save-probabilities", "--continue")
    assert statuses(summary) == ["skipped"] * 3


def test_without_a_record_skipped_cases_have_no_values(folders, summary):
    """A note tells so: nobody knows how they were refined. An empty file is no summary."""
    plain(folders)
    forget(folders)
    summary.touch()
    for _ in range(2):
        assert "3 existing label maps have no record in it, as after a kill: a, b, c; " in infer(folders, summary, "--continue")
        assert [(case["status"], case["energy"], case["written"]) for case in content(summary)["cases"]] == [("skipped", [], None)] * 3


def test_a_damaged_record_is_named_and_replaced(folders, summary):
    plain(folders)
    (record,) = (folders.output / RECORD_FOLDER).iterdir()
    whole = record.read_text()
    record.write_text("notes of mine\n")
    assert f"{record}: expected the summary of an earlier" in plain(folders, "--continue")
    assert f"{record}: " not in plain(folders, "--continue")
    record.write_text(whole)
    infer(folders, summary, "--continue")
    assert with_record(summary) == [("skipped", True)] * 3, "of the record in the output folder"


def test_a_case_that_ended_after_the_last_save_is_named(folders, summary):
    """As a kill leaves it: a label map without a record, beside records of other cases."""
    infer(folders, summary)
    forget(folders)
    kept = content(summary)
    kept["cases"] = [case for case in kept["cases"] if case["case_id"] != "b"]
    summary.write_text(json.dumps(kept))
    said = infer(folders, summary, "--continue")
    assert f"{summary}: 1 existing label map has no record in it, as after a kill: b; " in said
    assert with_record(summary) == [("skipped", True), ("skipped", False), ("skipped", True)]


def test_a_label_map_that_another_run_wrote_is_not_described_by_the_record(folders, summary):
    infer(folders, summary)
    time.sleep(0.02)  # clocks of files may tick slowly
    plain(folders, "--set", "bilateral.weight=9")
    (folders.output / "c.nii.gz").unlink()
    forget(folders)
    said = infer(folders, summary, "--continue", "--set", "bilateral.weight=9")
    assert f"{summary}: 2 label maps were changed since it was written: a, b; their records are left out" in said
    assert with_record(summary) == [("skipped", False), ("skipped", False), ("done", True)]


@pytest.mark.parametrize("keeps", ["record", "summary"])
def test_cases_of_other_parameters_are_named_and_refined_again(folders, summary, tmp_path, keeps):
    """So that the folder holds what an undisturbed run gives, whichever of the two files knows it."""
    before = ("--set", "bilateral.weight=2", "--set", "intensity.normalization=zscore")

    def run(*changes: object) -> str:
        said = plain(folders, *(("--summary", summary) if keeps == "summary" else ()), *changes)
        if keeps == "summary":
            forget(folders)
        return said

    run(*before)
    (folders.output / "a.nii.gz").unlink()
    assert "other parameters" not in run("--continue", *before)
    (folders.output / "a.nii.gz").unlink()
    said = run("--continue")
    names = "b, c (other values of intensity.normalization, bilateral.weight)"
    assert f"2 cases were refined with other parameters: {names}; --continue refines them again\n" in said
    assert "3 done in" in said
    assert "3 skipped in" in run("--continue")
    plain(folders, "-o", tmp_path / "undisturbed")
    for name in files_in(folders.output):
        assert (folders.output / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_a_run_that_is_stopped_before_cases_of_other_parameters_keeps_what_is_known_of_them(folders, summary):
    infer(folders, summary, "--set", "bilateral.weight=2")
    (folders.logits / "a.nii.gz").write_bytes(b"")
    infer(folders, summary, "--continue", "--fail-fast", status=1)
    _, c = content(summary)["not_reached"]
    assert c["other_parameters"]["bilateral"][0]["weight"] == 2.0
    assert set(c["other_parameters"]) == {"bilateral"}


def test_cases_of_other_inputs_are_named(folders, tmp_path):
    """The same names in another folder may be the output of another network."""
    plain(folders)
    shutil.copytree(folders.logits, tmp_path / "other")
    for _ in range(2):
        said = plain(replace(folders, logits=tmp_path / "other"), "--continue")
        assert "3 cases were refined from inputs other than those given now: a, b, c; " in said
        assert "3 skipped in" in said
    assert "inputs" not in plain(folders, "--continue")


def test_a_parameter_that_an_older_version_did_not_have_is_at_its_default(folders, summary):
    infer(folders, summary)
    forget(folders)
    older = content(summary)
    del older["parameters"]["mean_field"]["damping"], older["parameters"]["postprocess"]
    summary.write_text(json.dumps(older))
    assert "other parameters" not in infer(folders, summary, "--continue")
    assert "(other values of mean_field.damping)" in infer(folders, summary, "--continue", "--set", "mean_field.damping=0.5")


def test_records_of_cases_that_the_run_does_not_reach_are_kept(folders, summary):
    infer(folders, summary)
    first = content(summary)
    (folders.output / "a.nii.gz").unlink()
    (folders.logits / "a.nii.gz").write_bytes(b"")
    infer(folders, summary, "--continue", "--fail-fast", status=1)
    stopped = content(summary)
    assert [(case["case_id"], case["status"]) for case in stopped["cases"]] == [("a", "failed")]
    assert stopped["not_reached"] == first["cases"][1:]
    infer(folders, summary, "--continue", status=1)
    again = content(summary)
    assert again["cases"][1:] == [case | {"status": "skipped"} for case in first["cases"][1:]]
    assert again["not_reached"] == []


def test_a_record_of_a_case_that_is_gone_is_left_out_with_a_note(folders, summary):
    infer(folders, summary)
    for path in (*folders.images.glob("b_*"), folders.logits / "b.nii.gz"):
        path.unlink()
    assert f"{summary}: the records of cases that are not in this run are left out: b" in infer(folders, summary, "--continue")
    assert [case["case_id"] for case in content(summary)["cases"]] == ["a", "c"]


def test_the_summary_of_another_part_or_of_other_cases_is_not_replaced(folders, summary, tmp_path):
    infer(folders, summary)
    before = summary.read_bytes()
    for part_id in (0, 1):
        said = infer(folders, summary, "--continue", "--num-parts", 2, "--part-id", part_id, status=1)
        assert f"{summary}: is the summary of other cases (" in said
        assert "one for each part" in said
    other = write_folders(tmp_path / "other", "d", "e")
    assert "is the summary of other cases (a, b, c; part 0 of 1)" in infer(other, summary, "--continue", status=1)
    assert summary.read_bytes() == before
    assert files_in(other.output) == []


def spoil(text: str, name: str, value: object) -> str:
    """Change a value of the first case."""
    summary = json.loads(text)
    return json.dumps(summary | {"cases": [summary["cases"][0] | {name: value}, *summary["cases"][1:]]})


def test_a_file_that_is_no_summary_of_infer_is_not_replaced(folders, summary):
    infer(folders, summary)
    whole = summary.read_text()
    (folders.output / "b.nii.gz").unlink()
    values = {"case_id": 5, "energy": ["low"], "num_iterations": 2.5, "times": {"read": "long"}, "other_parameters": [1]}
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
        said = infer(folders, summary, "--continue", status=1)
        assert said.startswith(f"crfrefine: error: {summary}: "), text[:40]
        assert "name another file, or remove this one" in said
        assert summary.read_text() == text
        assert "b.nii.gz" not in files_in(folders.output)
    # Without --continue, the file that the user names is replaced, as ever.
    infer(folders, summary)
    assert content(summary)["num_done"] == 3


def test_a_summary_that_is_thrown_away_is_not_read(folders, tmp_path):
    link = tmp_path / "summary.json"
    link.symlink_to("/dev/zero")  # reading it would take for ever
    infer(folders, link, "--continue")


def test_every_field_of_a_record_comes_back(folders, summary):
    (folders.logits / "c.nii.gz").write_bytes(b"")
    infer(folders, summary, "--save-probabilities", "--save-logits", "--preview", "-m", "nonzero", status=1)
    label_maps = {case_id: folders.output / f"{case_id}.nii.gz" for case_id in "abc"}
    quick = CrfParameters().replace(**{"mean_field.num_iterations": 1, "mean_field.filter": "truncated"})
    earlier = read_earlier(summary, label_maps, quick.to_dict(), (1, 0))
    written = RunSummary("cpu", 1, {}, cases=earlier.all()).to_dict()["cases"]
    assert json.loads(json.dumps(written, default=str)) == content(summary)["cases"]


def test_a_record_of_another_format_is_of_another_file(folders):
    """It does not say that the file which is there was changed."""
    plain(folders)
    save_nifti(folders.output / "b.nii", load_nifti(folders.output / "b.nii.gz"))
    said = plain(folders, "--continue", "--output-format", ".nii")
    assert "1 existing label map has no record in it, as after a kill: b" in said
    assert "changed since" not in said


@pytest.mark.long
def test_a_killed_run_leaves_the_records_of_its_cases(tmp_path, summary):
    """The record in the output folder has every case that ended, and not only those up to the last second."""
    names = [f"case{number}" for number in range(9)]
    folders = write_folders(tmp_path, *names)
    arguments = ("infer", *folders.arguments, "--summary", summary, "--threads", 1)
    with subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 100
        while not (summary.is_file() and content(summary)["cases"]):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    first = content(summary)
    assert first["interrupted"]
    assert first["seconds"] > 0.0
    assert first["num_done"] == len(first["cases"]) >= 1
    assert first["num_cases"] == 9
    (run,) = read_summary(*(folders.output / RECORD_FOLDER).iterdir())
    recorded = [case["case_id"] for case in run.cases]
    assert run.is_interrupted
    assert [case["case_id"] for case in first["cases"]] == recorded[: len(first["cases"])]
    there = sorted(path.name.partition(".")[0] for path in folders.output.glob("case*"))
    assert recorded == there[: len(recorded)] == names[: len(recorded)]
    assert len(there) <= len(recorded) + 1  # The kill may fall between a label map and its line.
    assert run_here(*arguments, "--continue").status == 0
    last = content(summary)
    assert (last["interrupted"], last["not_reached"], last["num_skipped"] + last["num_done"]) == (False, [], 9)
    for case, known in zip(last["cases"], run.cases, strict=False):
        assert case == known | {"status": "skipped"}
    assert all(case["num_iterations"] >= 1 for case in last["cases"][len(there) :])


def test_saves_are_seldom_and_none_is_lost(tmp_path):
    """Hundreds of cases are saved about once a second; the file has the last of them a moment later, without another case."""
    path = tmp_path / "summary.json"
    summary = RunSummary("cpu", 1, {})
    file = SummaryFile(path, summary)
    seen = set()
    started = time.monotonic()
    for number in range(300):
        summary.cases.append(CaseRecord(f"case{number:04d}", "done"))
        file.save_soon()
        time.sleep(0.0005)
        if path.exists():
            seen.add(path.stat().st_ino)
    assert 1 <= len(seen) <= (time.monotonic() - started) / SAVE_SECONDS + 1
    deadline = time.monotonic() + 30
    while len(content(path)["cases"]) < 300:
        assert time.monotonic() < deadline, "the last cases were not saved"
        time.sleep(0.01)
    assert content(path)["interrupted"]
    file.save_last()
    assert not content(path)["interrupted"]
    file.save_soon()
    time.sleep(0.05)
    assert not content(path)["interrupted"], "saved after the end"
