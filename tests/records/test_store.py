"""The record of runs in their output folder: `--continue` and `--summary` read it, also after a
kill or with damaged lines.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import (
    GRID_SHAPE,
    Folders,
    command,
    infer,
    load_nifti,
    record_path,
    refined,
    run_here,
    save_nifti,
    wait_for,
    write_folders,
)
from nnunet_helpers import write_predictions, write_tree
from tune_helpers import open_session, options_for, whole_result, write_labeled

from crfrefine.base.label_options import InputOptions
from crfrefine.infer.options import InferenceOptions
from crfrefine.io.json import to_json
from crfrefine.metrics.regions import parse_region
from crfrefine.records.records import RECORD_FOLDER, CaseRecord, RunSummary
from crfrefine.records.states import _other_values, read_records
from crfrefine.tune.options import TuneOptions
from crfrefine.tune.scores import score_labels


def run(folders, *options):
    """Return standard error."""
    return infer(folders, *options, status=0).stderr


def lines_of(folders):
    return record_path(folders.output).read_bytes().splitlines(keepends=True)


def test_a_summary_has_the_lines_of_the_record_and_skipped_cases_keep_their_values(folders):
    summary = folders.output.with_name("summary.json")
    run(folders, "--summary", summary, "--save-probabilities", "--save-logits", "--preview")
    first = json.loads(summary.read_text())["cases"]
    assert [{**json.loads(line), "run": 0} for line in lines_of(folders)[1:]] == [
        {"run": 0, **case} for case in first
    ]
    (folders.output / "b.nii.gz").unlink()
    for expected in (["skipped", "done", "skipped"], ["skipped"] * 3):
        result = infer(
            folders, "--summary", summary, "--continue", "--save-probabilities", status=0
        )
        assert "note" not in result.stderr
        again = json.loads(summary.read_text())
        assert [case["status"] for case in again["cases"]] == expected
        assert (again["num_done"], again["num_skipped"]) == (
            expected.count("done"),
            expected.count("skipped"),
        )
        for number in (0, 2):
            assert again["cases"][number] == first[number] | {"status": "skipped"}
    _, a, *_ = (line.split("\t") for line in result.stdout.splitlines())
    assert a[:4] == [
        "a",
        "skipped",
        str(first[0]["num_iterations"]),
        str(first[0]["voxels_changed"]),
    ]


def test_label_maps_without_a_record_or_changed_since_are_named_and_kept(folders):
    """As a kill leaves one between a label map and its line. A record of another format is of
    another file.
    """
    run(folders)
    record_path(folders.output).write_bytes(
        b"".join(line for line in lines_of(folders) if b'"case_id": "b"' not in line)
    )
    edited = np.array(load_nifti(folders.output / "a.nii.gz"))
    edited[7:9, 6, 4] = 3 - edited[7:9, 6, 4]
    save_nifti(folders.output / "a.nii.gz", edited)
    summary = folders.output.with_name("summary.json")
    said = run(folders, "--summary", summary, "--continue", "--set", "bilateral.weight=2")
    np.testing.assert_array_equal(load_nifti(folders.output / "a.nii.gz"), edited)
    *_, left_a, left_b, end = said.splitlines()  # At the end, the run says what it has left.
    assert "1 case (a): its label map was changed since" in left_a
    assert "1 case (b): no record of its label map" in left_b
    assert "1 done, 2 skipped in" in end
    said = run(folders, "--summary", summary, "--continue", "--set", "bilateral.weight=2")
    assert "1 case (a): its label map was changed since it was recorded; " in said
    assert "1 case (b): no record of its label map, as after a kill; " in said
    cases = json.loads(summary.read_text())["cases"]
    assert [case["status"] for case in cases] == ["skipped"] * 3
    assert [case["voxels_changed"] is not None for case in cases] == [False, False, True]
    (folders.output / "a.nii.gz").write_bytes(b"cut")
    said = run(folders, "--continue", "--summary", summary, "--set", "bilateral.weight=2")
    assert (
        "1 case (a): its label map was changed since it was recorded; skipped if it is complete, "
        in said
    )
    assert [case["status"] for case in json.loads(summary.read_text())["cases"]] == [
        "done",
        "skipped",
        "skipped",
    ]
    save_nifti(folders.output / "c.nii", load_nifti(folders.output / "c.nii.gz"))
    same = ("--set", "bilateral.weight=2")
    said = run(folders, "--continue", "--output-format", ".nii", *same)
    assert "1 case (c): no record of its label map" in said
    shutil.rmtree(folders.output / RECORD_FOLDER)
    assert "3 cases (a, b, c): no record of its label map" in run(folders, "--continue")


def test_cases_of_other_parameters_are_named_and_refined_again(folders):
    """So that the folder holds what an undisturbed run gives."""
    before = ("--set", "bilateral.weight=2", "--set", "intensity.normalization=zscore")
    run(folders, *before)
    (folders.output / "a.nii.gz").unlink()
    assert "other values" not in run(folders, "--continue", *before)
    (folders.output / "a.nii.gz").unlink()
    said = run(folders, "--continue")
    assert (
        "2 cases (b, c): refined with other values of intensity.normalization, bilateral.weight; "
        "refined again\n" in said
    )
    assert "3 done in" in said
    assert "3 skipped in" in run(folders, "--continue")
    for case_id in "abc":
        np.testing.assert_array_equal(
            load_nifti(folders.output / f"{case_id}.nii.gz"), refined(folders, case_id)
        )


def test_a_copy_with_other_times_is_the_study_itself(folders, tmp_path):
    """As of `cp -r`, which keeps bytes and no times: the record counts, also of its parameters."""
    run(folders)
    copy = Folders(*(tmp_path / "copy" / path.name for path in folders))
    for folder, target in zip(folders, copy, strict=True):
        shutil.copytree(folder, target)
    for path in (tmp_path / "copy").rglob("*.nii.gz"):
        os.utime(path, (1e9, 1e9))
    said = run(copy, "--continue")
    assert "3 skipped in" in said
    assert "note" not in said
    assert "copy/out: 3 cases: 3 done" in run_here("status", copy.output, status=0).stdout
    said = run(copy, "--continue", "--set", "bilateral.weight=2")
    assert "3 cases (a, b, c): refined with other values of bilateral.weight; refined again" in said
    for case_id in "abc":
        expected = refined(folders, case_id, {"bilateral.weight": 2})
        np.testing.assert_array_equal(load_nifti(copy.output / f"{case_id}.nii.gz"), expected)


def changed_somewhere(path):
    """Replace a file by one with other values at some voxels, and an older time."""
    values = np.array(load_nifti(path))
    values[4:9, 5:8, 3:6] = values[3:8, 4:7, 2:5]
    save_nifti(path, np.roll(values, 1, axis=0))
    os.utime(path, (1e9, 1e9))


def test_a_case_of_other_inputs_under_the_same_names_is_refined_again(tmp_path):
    """Each kind is named, an older file counts too, and one of a single modality."""
    folders = write_folders(tmp_path, "a", "b")
    drawn = np.zeros(GRID_SHAPE, np.uint8)
    drawn[7:9, 6, 4] = 2
    inside = np.zeros(GRID_SHAPE, np.uint8)
    inside[2:16, 1:14, 1:10] = 1
    for name, values in (("strokes", drawn), ("masks", inside)):
        for case_id in "ab":
            save_nifti(tmp_path / name / f"{case_id}.nii.gz", values)
    options = ("-m", tmp_path / "masks", "--strokes", tmp_path / "strokes", "--preview")
    run(folders, *options)
    assert "2 skipped" in run(folders, *options, "--continue")
    for word, name in (
        ("images", "images/b_0001"),
        ("logits", "logits/b"),
        ("mask", "masks/b"),
        ("strokes", "strokes/b"),
    ):
        changed_somewhere(tmp_path / f"{name}.nii.gz")
        said = run(folders, *options, "--continue")
        assert f"b: refined from other {word}: refined again\n" in said
        assert "1 done, 1 skipped" in said
        kept = (folders.output / "b.nii.gz").read_bytes()
        run(folders._replace(output=tmp_path / "fresh"), *options)
        assert kept == (tmp_path / "fresh" / "b.nii.gz").read_bytes()
    said = run(folders, *options[2:], "--continue")
    assert said.count("refined from other mask: refined again") == 1  # said for the first of two
    assert "2 done" in said


@pytest.mark.parametrize(
    ("option", "setting"),
    [
        (("-m", "nonzero"), "mask_mode"),
        (("--resample",), "resample"),
        (("--input-type", "logits"), "input_type"),
    ],
)
def test_options_that_change_how_a_case_is_read_are_settings(folders, option, setting):
    run(folders)
    said = run(folders, *option, "--continue")
    assert f"3 cases (a, b, c): refined with other values of {setting}; refined again" in said
    assert "3 skipped" in run(folders, *option, "--continue")


def test_a_dataset_json_that_declares_other_labels_is_a_setting(tmp_path):
    folders = write_folders(tmp_path, "a")
    labels = load_nifti(folders.logits / "a.nii.gz").argmax(axis=-1).astype(np.uint8)
    save_nifti(folders.logits / "a.nii.gz", labels)
    run(folders)
    described = {"background": 0, "shell": 1, "core": 2, "cyst": 3, "other": 4}
    (folders.logits / "dataset.json").write_text(json.dumps({"labels": described}))
    said = run(folders, "--continue")
    assert "refined with other values of declared_labels, label_names of 5 labels; " in said
    run(folders)
    described["tumor"] = described.pop("cyst")
    (folders.logits / "dataset.json").write_text(json.dumps({"labels": described}))
    said = run(folders, "--continue")
    assert "1 case (a): refined with other values of label_names.3; refined again" in said


def test_every_option_counts_as_a_setting_or_is_known_to_change_no_voxel():
    """So that a new option is not forgotten by `--continue`."""
    no_voxel = {
        *("images", "logits", "masks", "strokes", "nnunet", "manifest"),  # their contents count
        *("output", "output_format", "save_probabilities", "save_logits", "save_structures"),
        *(
            "preview",
            "statistics",
            "summary",
            "resume",
            "num_parts",
            "part_id",
            "fail_fast",
            "command",
        ),
        *("device", "threads", "num_jobs", "max_memory", "dask", "allow_vanishing"),
        *("parameters", "choice"),  # compared key by key
    }
    settings = {each.name for each in dataclasses.fields(InputOptions)} | {"regions", "held_out"}
    assert {each.name for each in dataclasses.fields(InferenceOptions)} - no_voxel == settings


def summary_of(**values):
    """Return the summary of a run on nothing."""
    needed = {"device": "cpu", "threads": 1, "parameters": {}, "all_cases": {}, "inputs": ()}
    at = {"num_parts": 1, "part_id": 0, "resumed": False, "started": datetime.now(UTC)}
    return RunSummary(**needed | at | values)


def test_an_input_option_is_in_the_line_of_a_run_and_is_compared():
    """Each of them, in records of which the second one is read."""
    values = {
        "input_type": "labels",
        "add_background": True,
        "scale": 255.0,
        "channel_labels": (0, 17, 53),
        "mapped": (("", 255, 1), ("", -1, 0)),
        "network_spacing": (1.5, 1.5, 3.0),
        "resample": "cubic",
    }
    assert [*values] == [each.name for each in dataclasses.fields(InputOptions)]
    options = InputOptions(**values)
    line = to_json(summary_of(input_options=options).head())
    assert RunSummary.from_dict(json.loads(line)).input_options == options
    for name, value in values.items():
        other = summary_of(input_options=InputOptions(**{name: value}))
        read = RunSummary.from_dict(json.loads(to_json(summary_of().head())))
        (key, *_) = _other_values(CaseRecord("a", device="cpu"), read, other)
        assert key.partition(".")[0] == {"mapped": "mapping"}.get(name, name)


def test_options_that_change_how_files_are_read_are_settings(tmp_path):
    folders = write_folders(tmp_path, "a")
    save_nifti(
        folders.logits / "a.nii.gz",
        load_nifti(folders.logits / "a.nii.gz").argmax(axis=-1).astype(np.uint8),
    )
    strokes = np.zeros(GRID_SHAPE, np.uint8)
    strokes[7:9, 6, 4] = 2
    save_nifti(tmp_path / "strokes" / "a.nii.gz", strokes)
    options = [
        "--input-type",
        "labels",
        "--strokes",
        tmp_path / "strokes",
        "--network-spacing",
        "2,2.5,5",
    ]
    run(folders, *options)
    assert "1 skipped" in run(folders, *options, "--continue")
    said = run(folders, *options, "--network-spacing", "3,3.75,7.5", "--continue")
    assert "other values of network_spacing;" in said
    assert "1 done" in said


def test_results_of_another_device_are_refined_again(folders):
    """The CPU is the same device whether it is asked for or chosen, with any number of threads."""
    run(folders, "--device", "torch")
    said = run(folders, "--continue", "--device", "cpu")
    assert "3 cases (a, b, c): refined with other values of device; refined again" in said
    assert "3 done" in said
    for same in ((), ("--device", "cpu", "--threads", 1), ("--device", "auto", "--threads", 2)):
        said = run(folders, "--continue", *same)
        assert "note" not in said
        assert "3 skipped" in said
    said = run(folders, "--continue", "--device", "torch")
    assert "other values of device; refined again" in said
    assert "3 skipped" in run(folders, "--continue", "--device", "torch")


def test_a_gpu_that_was_lost_or_is_missing_now_repeats_nothing_unless_it_is_asked_for():
    def keys(device, asked, device_now, asked_now):
        run, now = (
            summary_of(device=one, requested_device=by)
            for one, by in ((device, asked), (device_now, asked_now))
        )
        return _other_values(CaseRecord("a", device=device), run, now)

    assert keys("cuda", "auto", "cpu", "auto") == []
    assert keys("cuda:1", "cuda:1", "cuda", "cuda") == []
    assert keys("cuda", "auto", "cuda", "cuda") == []
    assert keys("cuda", "auto", "cpu", "cpu") == ["device"]
    assert keys("torch:cuda", "torch:cuda", "torch", "torch") == ["device"]


def test_a_run_in_another_format_between_hides_no_record(folders):
    run(folders)
    assert "3 done" in run(folders, "--continue", "--output-format", ".nii")
    said = run(folders, "--continue", "--set", "bilateral.weight=2")
    assert "3 cases (a, b, c): refined with other values of bilateral.weight; refined" in said
    assert "3 done" in said


def test_a_copy_of_a_stopped_run_holds_no_results_of_the_run_before(folders):
    """The copy has new times, and so contents tell which label maps are older."""
    run(folders)
    logits = folders.logits / "b.nii.gz"
    whole = logits.read_bytes()
    logits.write_bytes(b"damaged")
    other = ("--set", "bilateral.weight=2")
    infer(folders, *other, "--fail-fast", "--jobs", 1, status=1)
    logits.write_bytes(whole)
    copy = folders.output.with_name("copy")
    shutil.copytree(folders.output, copy, copy_function=shutil.copyfile)
    shutil.rmtree(folders.output)
    copy.rename(folders.output)
    assert "2 done, 1 skipped" in run(folders, *other, "--continue")


def test_a_parameter_that_an_older_version_did_not_have_is_at_its_default(folders):
    run(folders)
    head, *rest = lines_of(folders)
    older = json.loads(head)
    del older["parameters"]["mean_field"]["output_temperature"], older["parameters"]["postprocess"]
    record_path(folders.output).write_bytes(b"".join([json.dumps(older).encode() + b"\n", *rest]))
    assert "other values" not in run(folders, "--continue")
    said = run(folders, "--continue", "--set", "mean_field.output_temperature=0.5")
    assert "other values of mean_field.output_temperature;" in said


@pytest.mark.parametrize("torn", [b'{"run": "0", "case_id": "c", "sta', b"\0\0\0\0", b"\xc3"])
def test_a_torn_last_line_is_left_out_and_removed(folders, torn):
    run(folders)
    whole = b"".join(lines_of(folders)[:3])
    record_path(folders.output).write_bytes(whole + torn)
    assert read_records(folders.output).notes == []
    assert "1 case (c): no record of its label map" in run(folders, "--continue")
    assert record_path(folders.output).read_bytes().startswith(whole + b'{"run": "')


def test_lines_that_cannot_be_used_are_named_and_left_out(folders):
    run(folders)
    whole = record_path(folders.output).read_bytes()
    head = json.loads(whole.splitlines()[0])
    for bad, problem in (
        ("notes of mine", "line 5: expected a JSON table"),
        ("[1]", "line 5: expected a JSON table"),
        ('{"run": "0", "case_id": "a", "status": "done"}', "line 5: its run has no line"),
        (json.dumps({**head, "schema": 9}), "line 5: its schema is not 2"),
        (json.dumps({**head, "inputs": 5}), "line 5: inputs: expected tuple[str, ...], got 5"),
        (json.dumps({**head, "num_parts": 0}), "line 5: part 0 of 0"),
        (json.dumps({**head, "started": "now"}), "line 5: "),
    ):
        record_path(folders.output).write_bytes(whole + bad.encode() + b"\n")
        expected = f"{record_path(folders.output)}: 1 line of the record cannot be used: {problem}"
        said = run(folders, "--continue")
        assert expected in said
        assert "3 skipped" in said
        assert expected in run_here("status", folders.output, status=1).stdout


@pytest.mark.long
def test_a_killed_run_leaves_the_records_of_its_cases(tmp_path):
    names = [f"case{number:02}" for number in range(60)]
    folders = write_folders(tmp_path, *names)
    path = record_path(folders.output)
    words = command("infer", *folders.arguments, "--threads", 1)
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(
            lambda: path.is_file() and path.read_bytes().count(b"\n") > 2, process, seconds=100
        )
        process.kill()
    recorded = []
    for earlier in read_records(folders.output).runs:
        recorded += [record.case_id for record in earlier.cases]
    there = sorted(path.name.partition(".")[0] for path in folders.output.glob("case*"))
    assert recorded == there[: len(recorded)] == names[: len(recorded)]
    assert len(there) <= len(recorded) + 1  # The kill may fall between a label map and its line.
    summary = tmp_path / "summary.json"
    run(folders, "--summary", summary, "--continue", "--set", "mean_field.filter=auto")
    last = json.loads(summary.read_text())
    assert (last["interrupted"], last["num_skipped"] + last["num_done"]) == (False, len(names))


@pytest.fixture
def opened():
    with contextlib.ExitStack() as stack:
        yield lambda options: stack.enter_context(open_session(options))


def given(**changes):
    return TuneOptions(
        InferenceOptions(
            **(
                {"images": (), "logits": (), "output": Path(), "threads": 1, "preview": True}
                | changes
            )
        )
    )


def regions(*texts):
    return tuple(map(parse_region, texts))


def test_a_trained_network_brings_its_references_and_predictions_have_given_ones(opened, tmp_path):
    tree = write_tree(tmp_path)
    described = opened(given(nnunet=tree.network)).describe()
    assert described["case"] == "case0"
    assert described["has_reference"]
    assert [label["name"] for label in described["labels"]] == ["1 shell", "2 core", "3 cyst"]
    assert not tree.trap.exists()
    predictions = write_predictions(tree)
    assert not opened(given(nnunet=predictions)).describe()["has_reference"]
    assert opened(
        dataclasses.replace(given(nnunet=predictions), labels=tree.raw / "labelsTr")
    ).describe()["has_reference"]


def test_labels_count_together_in_regions(opened, tmp_path):
    """Of a network with a softmax over labels: Dice of their unions, and the label map is that
    without regions.
    """
    folders, labels = write_labeled(tmp_path, "a")
    both = regions("whole=1+2+3", "core=2+3")
    session = opened(dataclasses.replace(options_for(folders, labels), regions=both))
    rows = whole_result(session)["labels"]
    assert [row.get("label", row.get("region")) for row in rows] == [1, 2, 3, "whole", "core"]
    truth = load_nifti(labels / "a.nii.gz")
    refined = session.shown[0]
    assert rows == score_labels(session.case.network_labels, refined, truth, 4, both)[0]
    assert session.case.network.regions is None


def test_channels_of_regions_are_corrected_with_strokes_as_infer_does(opened, tmp_path):
    """Also where a `dataset.json` beside the images declares the labels: four, and three channels
    of regions.
    """
    folders, labels = write_labeled(tmp_path, "a")
    logits = load_nifti(folders.logits / "a.nii.gz")
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    unions = np.stack(
        [shares[..., 1:].sum(axis=-1), shares[..., 2:].sum(axis=-1), shares[..., 3]], axis=-1
    ).clip(1e-6, 1 - 1e-6)
    save_nifti(folders.logits / "a.nii.gz", np.log(unions / (1 - unions)).astype(np.float32))
    (folders.images / "dataset.json").write_text(
        '{"labels": {"background": 0, "shell": 1, "core": 2, "cyst": 3}}'
    )
    three = {
        "regions": regions("whole=1+2+3", "core=2+3", "cyst=3"),
        "corrections": tmp_path / "saved",
    }
    session = opened(dataclasses.replace(options_for(folders, labels), **three))
    assert session.case.network.regions is not None
    place = session.case.first_place()
    for value, up in ((3, 2), (255, 4)):
        path = [place[0], place[1] + up]
        session.draw(0, place, path, value, shape="disk", radius=0.0, within={}, mark="")
    changed = {"bilateral.theta_alpha": 2.0, "bilateral.theta_beta": 0.1}
    session.save_case("", changed)
    drawn = load_nifti(tmp_path / "saved" / "strokes" / "a.nii.gz")
    corrected = load_nifti(tmp_path / "saved" / "refined" / "a.nii.gz")
    assert sorted(corrected[drawn > 0]) == [0, 3]
    words = ["--regions", "whole=1+2+3", "--regions", "core=2+3", "--regions", "cyst=3"]
    for key, value in changed.items():
        words += ["--set", f"{key}={value}"]
    strokes = ("--strokes", tmp_path / "saved" / "strokes", "--threads", 1)
    run_here("infer", *folders.arguments, *words, *strokes, status=0)
    np.testing.assert_array_equal(load_nifti(folders.output / "a.nii.gz"), corrected)


def test_scores_are_those_of_plain_counts():
    rng = np.random.default_rng(3)
    before, after, truth = (
        rng.integers(0, 4, (3, 5, 7, 6)) * (rng.random((3, 5, 7, 6)) < 0.3)
    ).astype(np.uint8)
    before = np.asfortranarray(before)
    rows, num_changed = score_labels(before, after, truth, 6, regions("both=1+5", "absent=4+5+70"))
    assert num_changed == np.count_nonzero(before != after)
    assert [row.get("label", row.get("region")) for row in rows] == [1, 2, 3, "both", "absent"]
    for row, members in zip(rows, ([1], [2], [3], [1, 5], [4, 5]), strict=True):
        is_in = [np.isin(labels, members) for labels in (before, after, truth)]
        assert (row["before"], row["after"]) == (is_in[0].sum(), is_in[1].sum())
        for when, one in zip(("before", "after"), is_in, strict=False):
            total = one.sum() + is_in[2].sum()
            wanted = 2 * (one & is_in[2]).sum() / total if total else None
            assert row[f"dice_{when}"] == (wanted if wanted is None else pytest.approx(wanted))
    assert all(row["dice_after"] is None for row in score_labels(before, after, None, 6)[0])


def everything_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.nii.gz"))


EXTRAS = ("--save-structures", "--save-probabilities", "--save-logits", "--preview")


def test_files_of_a_case_that_are_of_other_parameters_are_removed(folders):
    """A label vanishes, and its file is empty; other files are not asked for again. What somebody
    else put there, and what is still right, stays.
    """
    run(folders, *EXTRAS)
    first = everything_of(folders.output)
    assert {"a/Label_2.nii.gz", "a_logits.nii.gz"} <= {*first}
    mine = folders.output / "a" / "mine.nii.gz"
    shutil.copy(folders.output / "a.nii.gz", mine)
    run(folders, "--save-structures")
    assert everything_of(folders.output) == sorted([*first, "a/mine.nii.gz"])

    larger = ("--set", "postprocess.min_component_ml=1", "--allow-vanishing")
    said = run(folders, "--save-structures", *larger)
    left = everything_of(folders.output)
    assert not [name for name in left if "logits" in name or "probabilities" in name]
    assert not [*folders.output.glob("*.png")]
    num_empty = 0
    for case_id in "abc":
        labels = load_nifti(folders.output / f"{case_id}.nii.gz")
        for label in (1, 2, 3):
            structure = load_nifti(folders.output / case_id / f"Label_{label}.nii.gz")
            np.testing.assert_array_equal(structure == 1, labels == label)
            num_empty += not structure.any()
    assert num_empty
    assert "files of an earlier result are removed: " in said
    assert "files that this run has not written are left as they are: mine.nii.gz" in said
    assert mine.is_file()


def test_a_result_that_would_be_removed_is_refused_as_a_mask_before_any_case(folders):
    """A structure of an earlier run, which this run has other parameters for."""
    run(folders, "--save-structures")
    masks = ("-m", folders.output / "{case}" / "Label_1.nii.gz")
    result = infer(folders, *masks, status=1)
    assert "Label_1.nii.gz: would replace an input" in result.stderr
    assert result.stdout == "", "the table of cases"
    first = everything_of(folders.output)
    assert "a/Label_1.nii.gz" in first
    for case_id in "abc":  # Corrected by hand, they are left.
        path = folders.output / case_id / "Label_1.nii.gz"
        corrected = load_nifti(path)
        corrected[0, 0, 0] = 1
        save_nifti(path, corrected)
    assert "3 done" in run(folders, *masks)
    assert "a/Label_1.nii.gz" in everything_of(folders.output)


def test_a_case_with_a_problem_keeps_no_other_case_from_being_refined(folders):
    """Its mask is an earlier result, which would be removed if the case were refined."""
    run(folders, "--save-structures")
    for case_id in "ac":
        path = folders.output / case_id / "Label_1.nii.gz"
        corrected = load_nifti(path)
        corrected[0, 0, 0] = 1
        save_nifti(path, corrected)
    (folders.logits / "b.nii.gz").unlink()
    masks = ("-m", folders.output / "{case}" / "Label_1.nii.gz")
    result = infer(folders, *masks, status=1)
    assert "error: case 'b': no logits in " in result.stderr
    assert "2 done, 1 failed" in result.stderr
    assert (folders.output / "b" / "Label_1.nii.gz").is_file()


def test_files_that_were_changed_since_they_were_written_are_named_and_left(folders):
    """A corrected structure, a picture that was exchanged, a label map of another format."""
    run(folders, *EXTRAS)
    corrected = load_nifti(folders.output / "a.nii.gz")
    corrected[0, 0, 0] = 1
    names = ["a.nii.gz", "a/Label_1.nii.gz", "a_logits.nii.gz"]
    for name in names:
        save_nifti(folders.output / name, corrected)
    names.append("a_preview.png")
    (folders.output / "a_preview.png").write_bytes(b"mine")
    mine = {name: (folders.output / name).read_bytes() for name in names}
    said = run(folders, "--set", "bilateral.weight=2", "--output-format", ".nrrd", "-v")
    for name, content in mine.items():
        assert (folders.output / name).read_bytes() == content
        assert not (folders.output / name.replace("a", "b", 1)).exists()
    left = "Label_1.nii.gz, a.nii.gz, a_logits.nii.gz, a_preview.png"
    assert f"a: files that this run has not written are left as they are: {left}\n" in said


@pytest.mark.parametrize("is_absolute", [False, True])
def test_no_record_lets_a_file_outside_of_the_output_folder_be_removed(folders, is_absolute):
    run(folders, "--save-logits")
    other = folders.output.with_name("other")
    other.mkdir()
    mine = shutil.copy(folders.output / "a_logits.nii.gz", other / "a_logits.nii.gz")
    place = other if is_absolute else Path("..", "other")
    head, *lines = lines_of(folders)
    run_line = json.loads(head)
    run_line["all_cases"]["a"] = str(place / "a.nii.gz")
    record_path(folders.output).write_bytes(
        b"".join([json.dumps(run_line).encode(), b"\n", *lines])
    )
    run(folders, "--set", "bilateral.weight=2")
    assert Path(mine).is_file()
    assert not (folders.output / "b_logits.nii.gz").exists()


def test_a_file_that_may_not_be_removed_is_an_error_before_any_is(folders):
    """And a record that may not be read is named as such."""
    powers = "-dac_override,-dac_read_search"
    limited = ["setpriv", f"--bounding-set={powers}", f"--inh-caps={powers}"]
    if os.geteuid() == 0 and subprocess.run([*limited, "true"], check=False).returncode:
        pytest.skip("the superuser keeps all permissions here")
    prefix = limited if os.geteuid() == 0 else []

    def fails(*arguments):
        words = [*prefix, *command(*arguments)]
        return subprocess.run(words, capture_output=True, text=True, check=False).stderr

    run(folders, "--save-structures", "--preview")
    first = everything_of(folders.output)
    (folders.output / "a").chmod(0o555)
    try:
        said = fails("infer", *folders.arguments, "--set", "bilateral.weight=2", "--fail-fast")
        assert f"{folders.output / 'a' / 'Label_1.nii.gz'}: is of an earlier result" in said
        assert everything_of(folders.output) == first
        assert (folders.output / "a_preview.png").is_file()
    finally:
        (folders.output / "a").chmod(0o755)
    record_path(folders.output).chmod(0)
    expected = f"\n  {record_path(folders.output)}: cannot be read: Permission denied\n"
    assert expected in fails("status", folders.output)
    record_path(folders.output).parent.chmod(0)
    expected = f"\n  {record_path(folders.output).parent}: cannot be read: Permission denied\n"
    assert expected in fails("status", folders.output)
    record_path(folders.output).parent.chmod(0o755)


def test_files_that_no_record_has_are_named_and_left(folders, tmp_path):
    """As of a single output file, or of an older version; the output of another case is neither."""
    shutil.copy(folders.logits / "b.nii.gz", folders.logits / "a_logits.nii.gz")
    for modality in ("0000", "0001"):
        image = folders.images / f"b_{modality}.nii.gz"
        shutil.copy(image, folders.images / f"a_logits_{modality}.nii.gz")
    run(folders, *EXTRAS[1:2])
    shutil.rmtree(folders.output / RECORD_FOLDER)
    said = run(folders, "--set", "bilateral.weight=2", "-v")
    for case_id in ("a", "b", "c", "a_logits"):
        name = f"{case_id}_probabilities.nii.gz"
        assert (
            f"{case_id}: files that this run has not written are left as they are: {name}\n" in said
        )
        assert (folders.output / name).is_file()
    assert (folders.output / "a_logits.nii.gz").is_file()
    assert "removed" not in said
