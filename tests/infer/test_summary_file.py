"""`infer --continue --summary`: the records of earlier runs are kept as long as they are true, also those of a killed run."""

import itertools
import json
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import Folders, command, files_in, load_nifti, run_here, save_nifti, write_folders

from crfrefine.infer.earlier import read_earlier
from crfrefine.infer.records import CaseRecord, RunSummary
from crfrefine.infer.run_record import RECORD_FOLDER
from crfrefine.infer.summary_file import SAVE_SECONDS, SummaryFile
from crfrefine.parameters.model import CrfParameters


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return write_folders(tmp_path, "a", "b", "c")


@pytest.fixture
def summary(tmp_path: Path) -> Path:
    return tmp_path / "summary.json"


def infer(folders: Folders, summary: Path, *options: object):
    return run_here("infer", *folders.arguments, "--summary", summary, *options)


def forget(folders: Folders) -> None:
    """Leave the output as a run of an earlier version does, which kept no record there."""
    shutil.rmtree(folders.output / RECORD_FOLDER)


def content(summary: Path) -> dict:
    return json.loads(summary.read_text())


def test_a_file_that_was_cut_off_is_written_again(folders, summary):
    assert infer(folders, summary, "--save-probabilities").status == 0
    for path in (folders.output / "a.nii.gz", folders.output / "b_probabilities.nii.gz"):
        path.write_bytes(path.read_bytes()[:-9])
    assert infer(folders, summary, "--save-probabilities", "--continue").status == 0
    assert [case["status"] for case in content(summary)["cases"]] == ["done", "done", "skipped"]


def test_skipped_cases_keep_what_is_known_of_them(folders, summary):
    """Through several runs, and in the table on standard output too."""
    assert infer(folders, summary, "--save-probabilities").status == 0
    first = content(summary)
    (folders.output / "b.nii.gz").unlink()
    for statuses in (["skipped", "done", "skipped"], ["skipped"] * 3):
        result = infer(folders, summary, "--continue")
        assert result.status == 0, result.stderr
        assert "note" not in result.stderr
        again = content(summary)
        assert [case["status"] for case in again["cases"]] == statuses
        assert (again["num_done"], again["num_skipped"]) == (statuses.count("done"), statuses.count("skipped"))
        assert again["not_reached"] == []
        for case_id in (0, 2):
            assert again["cases"][case_id] == first["cases"][case_id] | {"status": "skipped"}
    _, a, b, _ = (line.split("\t") for line in result.stdout.splitlines())
    assert a[:4] == ["a", "skipped", str(first["cases"][0]["num_iterations"]), str(first["cases"][0]["voxels_changed"])]
    assert b[0] == "b"
    assert b[2] != ""


def test_without_a_record_skipped_cases_have_no_values(folders, summary):
    """A note tells so: nobody knows how they were refined."""
    assert run_here("infer", *folders.arguments).status == 0
    forget(folders)
    for _ in range(2):
        result = infer(folders, summary, "--continue")
        assert result.status == 0
        assert "3 existing label maps have no record in it, as after a kill: a, b, c; " in result.stderr
        assert [(case["status"], case["energy"], case["written"]) for case in content(summary)["cases"]] == [("skipped", [], None)] * 3


def test_skipped_cases_have_the_values_of_the_record_in_the_output_folder(folders, summary):
    assert run_here("infer", *folders.arguments).status == 0
    assert infer(folders, summary, "--continue").status == 0
    assert [(case["status"], case["num_iterations"] > 0) for case in content(summary)["cases"]] == [("skipped", True)] * 3


def test_a_damaged_record_is_named_and_replaced(folders, summary):
    assert run_here("infer", *folders.arguments).status == 0
    (record,) = (folders.output / RECORD_FOLDER).iterdir()
    record.write_text("notes of mine\n")
    assert f"{record}: expected the summary of an earlier" in run_here("infer", *folders.arguments, "--continue").stderr
    assert f"{record}: " not in run_here("infer", *folders.arguments, "--continue").stderr


def test_an_empty_file_is_no_summary(folders, summary):
    summary.touch()
    assert infer(folders, summary, "--continue").status == 0
    assert content(summary)["num_done"] == 3


def test_a_case_that_ended_after_the_last_save_is_named(folders, summary):
    """As a kill leaves it: a label map without a record, beside records of other cases."""
    assert infer(folders, summary).status == 0
    forget(folders)
    kept = content(summary)
    kept["cases"] = [case for case in kept["cases"] if case["case_id"] != "b"]
    summary.write_text(json.dumps(kept))
    result = infer(folders, summary, "--continue")
    assert result.status == 0
    assert f"{summary}: 1 existing label map has no record in it, as after a kill: b; " in result.stderr
    assert [(case["status"], case["written"] is None) for case in content(summary)["cases"]] == [
        ("skipped", False),
        ("skipped", True),
        ("skipped", False),
    ]


def test_a_label_map_that_another_run_wrote_is_not_described_by_the_record(folders, summary):
    assert infer(folders, summary).status == 0
    time.sleep(0.02)  # clocks of files may tick slowly
    assert run_here("infer", *folders.arguments, "--set", "bilateral.weight=9").status == 0
    (folders.output / "c.nii.gz").unlink()
    forget(folders)
    result = infer(folders, summary, "--continue", "--set", "bilateral.weight=9")
    assert result.status == 0
    assert f"{summary}: 2 label maps were changed since it was written: a, b; their records are left out" in result.stderr
    assert [(case["status"], case["voxels_changed"] is None) for case in content(summary)["cases"]] == [
        ("skipped", True),
        ("skipped", True),
        ("done", False),
    ]


@pytest.mark.parametrize("keeps", ["record", "summary"])
def test_cases_of_other_parameters_are_named_and_refined_again(folders, summary, tmp_path, keeps):
    """So that the folder holds what an undisturbed run gives, whichever of the two files knows it."""
    before = ("--set", "bilateral.weight=2", "--set", "intensity.normalization=zscore")
    options = ("--summary", summary) if keeps == "summary" else ()

    def run(*changes: object):
        result = run_here("infer", *folders.arguments, *options, *changes)
        if keeps == "summary":
            forget(folders)
        assert result.status == 0
        return result.stderr

    run(*before)
    (folders.output / "a.nii.gz").unlink()
    assert "other parameters" not in run("--continue", *before)
    (folders.output / "a.nii.gz").unlink()
    said = run("--continue")
    names = "b, c (other values of intensity.normalization, bilateral.weight)"
    assert f"2 cases were refined with other parameters: {names}; --continue refines them again\n" in said
    assert "3 done in" in said
    assert "3 skipped in" in run("--continue")
    assert run_here("infer", *folders.arguments, "-o", tmp_path / "undisturbed").status == 0
    for name in files_in(folders.output):
        assert (folders.output / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_a_run_that_is_stopped_before_cases_of_other_parameters_keeps_what_is_known_of_them(folders, summary):
    assert infer(folders, summary, "--set", "bilateral.weight=2").status == 0
    (folders.logits / "a.nii.gz").write_bytes(b"")
    assert infer(folders, summary, "--continue", "--fail-fast").status == 1
    _, c = content(summary)["not_reached"]
    assert c["other_parameters"]["bilateral"][0]["weight"] == 2.0
    assert set(c["other_parameters"]) == {"bilateral"}


def test_cases_of_other_inputs_are_named(folders, tmp_path):
    """The same names in another folder may be the output of another network."""
    assert run_here("infer", *folders.arguments).status == 0
    shutil.copytree(folders.logits, tmp_path / "other")
    for _ in range(2):
        result = run_here("infer", *replace(folders, logits=tmp_path / "other").arguments, "--continue")
        assert "3 cases were refined from inputs other than those given now: a, b, c; " in result.stderr
        assert "3 skipped in" in result.stderr
    assert "inputs" not in run_here("infer", *folders.arguments, "--continue").stderr


def test_a_parameter_that_an_older_version_did_not_have_is_at_its_default(folders, summary):
    assert infer(folders, summary).status == 0
    forget(folders)
    older = content(summary)
    del older["parameters"]["mean_field"]["damping"], older["parameters"]["postprocess"]
    summary.write_text(json.dumps(older))
    assert "other parameters" not in infer(folders, summary, "--continue").stderr
    assert "(other values of mean_field.damping)" in infer(folders, summary, "--continue", "--set", "mean_field.damping=0.5").stderr


def test_a_failed_case_is_done_again_and_its_record_replaced(folders, summary):
    logits = folders.logits / "b.nii.gz"
    whole = logits.read_bytes()
    logits.write_bytes(b"")
    assert infer(folders, summary).status == 1
    logits.write_bytes(whole)
    assert infer(folders, summary, "--continue").status == 0
    assert [(case["status"], case["error"]) for case in content(summary)["cases"]] == [("skipped", None), ("done", None), ("skipped", None)]


def test_records_of_cases_that_the_run_does_not_reach_are_kept(folders, summary):
    assert infer(folders, summary).status == 0
    first = content(summary)
    (folders.output / "a.nii.gz").unlink()
    (folders.logits / "a.nii.gz").write_bytes(b"")
    assert infer(folders, summary, "--continue", "--fail-fast").status == 1
    stopped = content(summary)
    assert [(case["case_id"], case["status"]) for case in stopped["cases"]] == [("a", "failed")]
    assert stopped["not_reached"] == first["cases"][1:]
    assert infer(folders, summary, "--continue").status == 1
    again = content(summary)
    assert again["cases"][1:] == [case | {"status": "skipped"} for case in first["cases"][1:]]
    assert again["not_reached"] == []


def test_a_record_of_a_case_that_is_gone_is_left_out_with_a_note(folders, summary):
    assert infer(folders, summary).status == 0
    for path in (*folders.images.glob("b_*"), folders.logits / "b.nii.gz"):
        path.unlink()
    result = infer(folders, summary, "--continue")
    assert f"{summary}: the records of cases that are not in this run are left out: b" in result.stderr
    assert [case["case_id"] for case in content(summary)["cases"]] == ["a", "c"]


@pytest.mark.parametrize("options", [("--num-parts", 2, "--part-id", 1), ("--num-parts", 2, "--part-id", 0)])
def test_the_summary_of_another_part_is_not_replaced(folders, summary, options):
    assert infer(folders, summary).status == 0
    before = summary.read_bytes()
    result = infer(folders, summary, "--continue", *options)
    assert result.status == 1
    assert f"{summary}: is the summary of other cases (" in result.stderr
    assert "one for each part" in result.stderr
    assert summary.read_bytes() == before


def test_the_summary_of_other_cases_is_not_replaced(folders, summary, tmp_path):
    assert infer(folders, summary).status == 0
    before = summary.read_bytes()
    other = write_folders(tmp_path / "other", "d", "e")
    result = infer(other, summary, "--continue")
    assert result.status == 1
    assert "is the summary of other cases (a, b, c; part 0 of 1)" in result.stderr
    assert summary.read_bytes() == before
    assert files_in(other.output) == []


def spoil(summary: dict, name: str, value: object) -> dict:
    return summary | {"cases": [summary["cases"][0] | {name: value}, *summary["cases"][1:]]}


SPOILED = {
    "half": lambda text: text[: len(text) // 2],
    "text": lambda text: "notes of mine\n",
    "another table": lambda text: '{"schema": 1, "version": "1", "cases": []}',
    "a list": lambda text: "[1, 2]",
    "newer": lambda text: text.replace('"schema": 1', '"schema": 2', 1),
    "parameters": lambda text: json.dumps(json.loads(text) | {"parameters": 3}),
    "cases": lambda text: json.dumps(json.loads(text) | {"cases": 3}),
    "a case": lambda text: json.dumps(json.loads(text) | {"cases": [3]}),
    "a name": lambda text: json.dumps(spoil(json.loads(text), "case_id", 5)),
    "energy": lambda text: json.dumps(spoil(json.loads(text), "energy", ["low"])),
    "steps": lambda text: json.dumps(spoil(json.loads(text), "num_iterations", 2.5)),
    "times": lambda text: json.dumps(spoil(json.loads(text), "times", {"read": "long"})),
    "other parameters": lambda text: json.dumps(spoil(json.loads(text), "other_parameters", [1])),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_file_that_is_no_summary_of_infer_is_not_replaced(folders, summary, how):
    assert infer(folders, summary).status == 0
    (folders.output / "b.nii.gz").unlink()
    summary.write_text(SPOILED[how](summary.read_text()))
    before = summary.read_bytes()
    result = infer(folders, summary, "--continue")
    assert result.status == 1
    assert result.stderr.startswith(f"crfrefine: error: {summary}: ")
    assert "name another file, or remove this one" in result.stderr
    assert summary.read_bytes() == before
    assert "b.nii.gz" not in files_in(folders.output)
    # Without --continue, the file that the user names is replaced, as ever.
    assert infer(folders, summary).status == 0
    assert content(summary)["num_done"] == 3


def test_fields_of_which_this_version_knows_nothing_are_kept(folders, summary):
    assert infer(folders, summary).status == 0
    summary.write_text(json.dumps(spoil(content(summary), "hausdorff", {"mm": [1.5, None]})))
    for _ in range(2):
        assert infer(folders, summary, "--continue").status == 0
        assert [case.get("hausdorff") for case in content(summary)["cases"]] == [{"mm": [1.5, None]}, None, None]


def test_a_summary_that_is_thrown_away_is_not_read(folders, tmp_path):
    link = tmp_path / "summary.json"
    link.symlink_to("/dev/zero")  # reading it would take for ever
    result = run_here("infer", *folders.arguments, "--summary", link, "--continue")
    assert result.status == 0, result.stderr


def test_every_field_of_a_record_comes_back(folders, summary):
    (folders.logits / "c.nii.gz").write_bytes(b"")
    assert infer(folders, summary, "--save-probabilities", "--save-logits", "--preview", "-m", "nonzero").status == 1
    label_maps = {case_id: folders.output / f"{case_id}.nii.gz" for case_id in "abc"}
    earlier = read_earlier(summary, label_maps, CrfParameters().to_dict(), (1, 0))
    written = RunSummary("cpu", 1, {}, cases=earlier.all()).to_dict()["cases"]
    assert json.loads(json.dumps(written, default=str)) == content(summary)["cases"]


# While the run goes on


def write_large_cases(root: Path, count: int) -> Folders:
    """Cases that take a good fraction of a second."""
    folders = Folders(root / "images", root / "logits", root / "out")
    rng = np.random.default_rng(5)
    for number in range(count):
        save_nifti(folders.images / f"case{number:02}_0000.nii.gz", rng.integers(0, 500, (72, 64, 48), dtype=np.int16))
        save_nifti(folders.logits / f"case{number:02}.nii.gz", rng.normal(0, 3, (72, 64, 48, 5)).astype(np.float32))
    return folders


def kill_when(condition, folders: Folders, summary: Path, *options: object) -> None:
    arguments = command("infer", *folders.arguments, "--summary", summary, "--threads", 1, *options)
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 100
        while not condition():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL


def test_a_killed_run_leaves_the_records_of_its_cases(tmp_path, summary):
    """Killed twice: the second run takes up what the first one left, and the third one what both left."""
    folders = write_large_cases(tmp_path, 20)
    kill_when(lambda: summary.is_file() and content(summary)["cases"], folders, summary)
    first = content(summary)
    assert first["interrupted"]
    assert first["seconds"] > 0.0
    assert first["num_done"] == len(first["cases"]) >= 1
    assert first["num_cases"] == 20
    recorded = {case["case_id"]: case for case in first["cases"]}
    assert list(recorded) == [f"case{number:02}" for number in range(len(recorded))]
    shutil.copy(summary, tmp_path / "first.json")

    kill_when(lambda: content(summary)["resumed"] and content(summary)["cases"], folders, summary, "--continue")
    second = content(summary)
    assert second["interrupted"]
    in_both = {case["case_id"]: case for case in (*second["cases"], *second["not_reached"])}
    for case_id, case in recorded.items():
        assert in_both[case_id] == case | {"status": in_both[case_id]["status"]}

    result = infer(folders, summary, "--continue")
    assert result.status == 0, result.stderr
    last = content(summary)
    assert not last["interrupted"]
    assert len(last["cases"]) == 20
    assert last["not_reached"] == []
    assert last["num_skipped"] + last["num_done"] == 20
    for case in last["cases"]:
        known = in_both.get(case["case_id"])
        if known is not None:
            assert case == known | {"status": "skipped"}
        elif case["status"] == "done":
            assert case["num_iterations"] >= 1
    assert np.isfinite(load_nifti(folders.output / "case19.nii.gz")).all()


def test_saves_are_seldom_and_none_is_lost(tmp_path):
    """A thousand cases are saved about once a second; the file has the last of them a moment later, without another case."""
    path = tmp_path / "summary.json"
    summary = RunSummary("cpu", 1, {})
    file = SummaryFile(path, summary)
    seen = set()
    started = time.monotonic()
    for number in range(1000):
        summary.cases.append(CaseRecord(f"case{number:04d}", "done"))
        file.save_soon()
        time.sleep(0.0005)
        if path.exists():
            seen.add(path.stat().st_ino)
    assert 1 <= len(seen) <= (time.monotonic() - started) / SAVE_SECONDS + 1
    deadline = time.monotonic() + 30
    while len(content(path)["cases"]) < 1000:
        assert time.monotonic() < deadline, "the last cases were not saved"
        time.sleep(0.01)
    assert content(path)["interrupted"]
    file.save_last()
    assert not content(path)["interrupted"]
    file.save_soon()
    time.sleep(0.05)
    assert not content(path)["interrupted"], "saved after the end"


def test_parts_keep_their_own_summaries(tmp_path):
    folders = write_folders(tmp_path, "a", "b", "c", "d")
    paths = [tmp_path / f"summary_{part_id}.json" for part_id in range(2)]
    for options in ((), ("--continue",)):
        for part_id, path in enumerate(paths):
            assert infer(folders, path, "--num-parts", 2, "--part-id", part_id, *options).status == 0
    cases = list(itertools.chain(*(content(path)["cases"] for path in paths)))
    assert [case["case_id"] for case in cases] == ["a", "c", "b", "d"]
    assert all(case["status"] == "skipped" and case["energy"] for case in cases)


def test_a_record_of_another_format_is_of_another_file(folders):
    """It does not say that the file which is there was changed."""
    assert run_here("infer", *folders.arguments).status == 0
    save_nifti(folders.output / "b.nii", load_nifti(folders.output / "b.nii.gz"))
    result = run_here("infer", *folders.arguments, "--continue", "--output-format", ".nii")
    assert result.status == 0
    assert "1 existing label map has no record in it, as after a kill: b" in result.stderr
    assert "changed since" not in result.stderr
