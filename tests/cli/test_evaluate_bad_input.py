"""What is wrong with files and options of `evaluate`: one message each, the other cases go on, nothing is dropped unsaid."""

import json

import numpy as np
import pytest
from cli_helpers import files_in, run_here
from evaluation_helpers import SHAPE, affine, read_metrics, save_map, save_npz, write_study
from io_helpers import save_nifti


def flipped(study, case):
    save_nifti(study.after / f"{case}.nii.gz", study.maps["after"][case], affine() @ np.diag([-1.0, 1.0, 1.0, 1.0]))


def cropped(study, case):
    save_nifti(study.after / f"{case}.nii.gz", study.maps["after"][case][1:], affine())


def thicker(study, case):
    save_nifti(study.labels / f"{case}.nii.gz", study.maps["labels"][case], affine() @ np.diag([1.0, 1.0, 1.01, 1.0]))


def soft(study, case):
    save_map(study.after / f"{case}.nii.gz", np.linspace(0, 1, np.prod(SHAPE), dtype=np.float32).reshape(SHAPE))


def negative(study, case):
    save_map(study.labels / f"{case}.nii.gz", study.maps["labels"][case].astype(np.int16) - 1)


def not_finite(study, case):
    values = study.maps["after"][case].astype(np.float32)
    values[2, 3, 1] = np.nan
    save_map(study.after / f"{case}.nii.gz", values)


def truncated(study, case):
    path = study.before / f"{case}.nii.gz"
    path.write_bytes(path.read_bytes()[:200])


def twice(study, case):
    save_map(study.after / f"{case}.mha", study.maps["after"][case])


def two_references(study, case):
    save_map(study.labels / f"{case}_seg.mha", study.maps["labels"][case])
    save_map(study.labels / f"{case}_label.mha", study.maps["labels"][case])


def reference_of_scores(study, case):
    save_map(study.labels / f"{case}.nii.gz", np.zeros((*SHAPE, 3), np.float32))


def sigmoid_channels(study, case):
    save_map(study.after / f"{case}.nii.gz", np.random.default_rng(0).random((*SHAPE, 3), np.float32))


def padding_alone(study, case):
    save_map(study.after / f"{case}.nii.gz", np.full((*SHAPE, 3), 0.9, np.float32))


def ignored_alone(study, case):
    save_map(study.labels / f"{case}.nii.gz", np.full(SHAPE, 60000, np.uint16))


def not_fetched(study, case):
    (study.labels / f"{case}.nii.gz").unlink()
    (study.labels / f"{case}.nii.gz").symlink_to(study.root / "nowhere")


BAD = {
    flipped: (
        "prediction",
        ["not on the grid of the reference", "13×11×7, 0.80×1.25×3.00 mm", "labels/case1.nii.gz", "after/case1.nii.gz"],
    ),
    cropped: ("prediction", ["not on the grid of the reference", "13×11×7", "12×11×7"]),
    thicker: (None, ["not on the grid of the reference", "3.00 mm", "3.03 mm"]),
    padding_alone: ("prediction", ["all labels have the same value at 1001 of 1001 voxels"]),
    soft: ("prediction", ["not a label map", "may be a probability map"]),
    negative: (None, ["expected labels from 0", "found -1"]),
    not_finite: ("prediction", ["1 of 1001", "voxel (2, 3, 1)"]),
    truncated: ("before", ["before/case8.nii.gz"]),
    twice: ("prediction", ["expected one label map, found case9.mha, case9.nii.gz"]),
    two_references: (None, ["expected one label map, found case10_label.mha, case10_seg.mha"]),
    reference_of_scores: (None, ["expected a label map with one value per voxel, this file has 3"]),
    sigmoid_channels: ("prediction", ["do not sum to 1", "region-based training"]),
    ignored_alone: (None, ["every voxel has the label 60000, to be ignored"]),
    not_fetched: (None, ["case14.nii.gz: is a link to a file that is not there"]),
}
"""What spoils a case, from case1 on; the method that it fails (None: all), and what the message says."""


def test_a_bad_case_is_reported_and_the_others_are_measured(tmp_path):
    study = write_study(tmp_path, len(BAD) + 2)
    # The first and the last case are whole.
    cases = dict(zip([f"case{number}" for number in range(1, len(BAD) + 1)], BAD, strict=True))
    for case, spoil in cases.items():
        spoil(study, case)
    result = run_here(*study.arguments, "-v", "--ignore-label", 60000)
    assert result.status == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].endswith(f"({len(BAD)} of {len(BAD) + 2} cases)")
    summary = study.summary()
    assert {failure["case"] for failure in summary["failures"]} == set(cases)
    for case, spoil in cases.items():
        method, fragments = BAD[spoil]
        failures = [failure for failure in summary["failures"] if failure["case"] == case]
        assert method is None or [failure["method"] for failure in failures] == [method]
        for fragment in fragments:
            assert fragment in failures[0]["error"]
        assert f"crfrefine: error: case {case!r}: " in result.stderr
    measured = {(case, name) for case, _, _, name in read_metrics(study.output)}
    expected = {(case, name) for case in ("case0", f"case{len(BAD) + 1}") for name in ("prediction", "before")}
    other = {"prediction": "before", "before": "prediction"}
    expected |= {(case, other[BAD[spoil][0]]) for case, spoil in cases.items() if BAD[spoil][0]}
    assert measured == expected
    assert (summary["num_cases"], summary["num_failed"]) == (len(BAD) + 2, len(BAD))
    assert [case["status"] for case in summary["cases"]].count("measured") == 2
    assert summary["verdict"]["comparison"]["num_pairs"] == 2
    assert "cases are left out" in result.stdout


def test_images_are_no_label_maps(tmp_path):
    """Two thousand gray values in 1001 voxels of each map."""
    study = write_study(tmp_path, 1)
    for folder, first in ((study.labels, 1), (study.after, 5000), (study.before, 5000)):
        save_map(folder / "case0.nii.gz", np.arange(first, first + np.prod(SHAPE), dtype=np.uint16).reshape(SHAPE))
    result = run_here(*study.arguments)
    assert result.status == 1
    assert result.stderr.count("2002 different labels; expected at most 2000: is one of them an image?") == 2


def test_scores_beside_that_cannot_be_used_are_a_note_and_named_ones_a_failure(tmp_path):
    """nnU-Net's regions have sigmoid channels: its label maps can be measured, its probabilities are no distribution over labels."""
    study = write_study(tmp_path, 2)
    for case in ("case0", "case1"):
        save_npz(study.after / f"{case}.npz", np.random.default_rng(0).random((3, *SHAPE), np.float32), "probabilities")
    result = run_here(*study.arguments)
    assert result.status == 0, result.stderr
    assert result.stderr.count("prediction: no calibration: ") == 1  # of the first case, for all
    assert "ece" not in {metric for _, _, metric, _ in read_metrics(study.output)}
    # Although the masks were measured before.
    asked = run_here(*study.arguments, "--continue", "--probabilities", f"prediction={study.after}")
    assert asked.status == 1
    assert "do not sum to 1" in asked.stderr
    assert ("case0", "1", "dice", "prediction") in read_metrics(study.output)


def test_when_every_case_fails_there_is_no_verdict(tmp_path):
    study = write_study(tmp_path, 1)
    (study.before / "case0.nii.gz").write_bytes(b"not an image")
    result = run_here(*study.arguments)
    assert result.status == 1
    assert result.stdout.splitlines()[-1] == "verdict: no verdict: no case of before could be measured"
    (study.after / "case0.nii.gz").write_bytes(b"not an image")
    assert run_here(*study.arguments).status == 1
    assert read_metrics(study.output) == {}
    assert len(study.summary()["failures"]) == 2


def test_label_maps_of_background_alone(tmp_path):
    study = write_study(tmp_path, 1)
    for folder in (study.labels, study.after, study.before):
        save_map(folder / "case0.nii.gz", np.zeros(SHAPE, np.uint8))
    result = run_here(*study.arguments)
    assert result.status == 0, result.stderr
    assert result.stdout == "verdict: no verdict: all label maps have only background\n"
    assert read_metrics(study.output) == {}


def test_fail_fast_stops_at_the_first_bad_case(tmp_path):
    study = write_study(tmp_path)
    flipped(study, "case1")
    result = run_here(*study.arguments, "--fail-fast")
    assert result.status == 1
    assert "stopped at case 'case1' (--fail-fast)" in result.stderr
    assert files_in(study.output) == ["cases"]
    assert files_in(study.output / "cases") == ["case0.json"]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    study = write_study(tmp_path_factory.mktemp("one"), 1)
    (study.root / "none.json").write_text("{}")
    return study


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-b", "before={before}"], "two methods have this name"),
        (["--name", "before"], "two methods have this name"),
        (["--probabilities", "nobody={before}"], "no such method; there are prediction, before"),
        (["-r", "whole=1+x"], "'x' is not the number of a label"),
        (["-r", "nothing.json"], "no such file, and not a region"),
        (["-r", "{root}/none.json"], "none.json: holds no region; expected names and labels"),
        (["-r", "mean=1+2"], "mean over regions"),
        (["-r", "all=1+2"], "calibration of all labels together"),
        (["-r", "2=1+3"], "is the name of label 2"),
        (["-r", "a=1", "-r", "a=2"], "appears twice, with different labels"),
        (["-r", "a=1+9", "--ignore-label", "9"], "label 9 marks voxels that are ignored"),
        (["--tolerance", "-1"], "--tolerance: expected a number of mm, at least 0, got -1"),
        (["--tolerance", "nan"], "--tolerance"),
        (["--ignore-label", "0"], "--ignore-label: expected a label from 1 to 65535"),
        (["-i", "{root}/none"], "no such file or folder"),
        (["-o", "{after}"], "is an input of this run"),
        (["-o", "{after}/case0.nii.gz"], "is a file; name a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_options_that_cannot_be_followed(one, options, message):
    names = {"before": one.before, "after": one.after, "root": one.root}
    result = run_here(*one.arguments, *(text.format(**names) for text in options))
    assert result.status == 1
    assert message in result.stderr
    assert result.stderr.startswith("crfrefine: error: ")
    assert "metrics.csv" not in files_in(one.output) + files_in(one.after)


@pytest.mark.parametrize(
    "options", [["-b", "nameless"], ["-b", "=folder"], ["--probabilities", "x="], ["--processes", "0"], ["-v", "-q"]], ids=" ".join
)
def test_wrong_usage(one, options):
    assert run_here(*one.arguments, *options).status == 2


def test_a_rival_that_cannot_be_measured_is_in_the_verdict(tmp_path):
    """Six cases are enough against the baseline alone, and not for a claim about a rival of which nothing is known."""
    study = write_study(tmp_path, 6)
    (tmp_path / "rival").mkdir()
    for number in range(6):
        (tmp_path / "rival" / f"case{number}.nii.gz").write_bytes(b"not an image")
    result = run_here(*study.arguments, "-b", f"rival={tmp_path / 'rival'}")
    assert result.status == 1
    lines = result.stdout.splitlines()
    assert "note: rival could not be measured in any case." in lines
    assert lines[-1].startswith("verdict: The refinement helps. ")
    assert lines[-1].endswith(" No case allows a comparison with rival.")
    assert any(line.startswith("power: with 6 cases") and line.endswith("level 0.05)") for line in lines)
    judged = study.summary()["verdict"]
    assert judged["outcome"] == "not better than simple"
    assert judged["rivals"][0]["p_holm"] is None


def test_a_region_that_cannot_be_called_so_does_not_bring_back_the_ignored_label(tmp_path):
    study = write_study(tmp_path, 1)
    described = {"labels": {"background": 0, "core": 1, "ignore": 2}, "regions": {"mean": [1]}}
    (study.labels / "dataset.json").write_text(json.dumps(described))
    result = run_here(*study.arguments)
    assert result.status == 0, result.stderr
    assert "dataset.json: region 'mean': the name \"mean\" is reserved for the mean over regions" in result.stderr
    assert result.stderr.count("continuing without its regions") == 1
    assert {label for _, label, _, _ in read_metrics(study.output)} == {"1"}
    assert study.summary()["settings"]["ignore_label"] == 2
