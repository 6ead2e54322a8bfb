"""What is wrong with files and options of `evaluate`: one message each, the other cases go on, nothing is dropped unsaid."""

import json

import numpy as np
import pytest
from cli_helpers import files_in, run_here
from evaluation_helpers import SHAPE, affine, read_metrics, save_map, save_npz, softmax, write_study
from io_helpers import save_nifti


def flipped(study):
    save_nifti(study.after / "case1.nii.gz", study.maps["after"]["case1"], affine() @ np.diag([-1.0, 1.0, 1.0, 1.0]))


def cropped(study):
    save_nifti(study.after / "case1.nii.gz", study.maps["after"]["case1"][1:], affine())


def thicker(study):
    save_nifti(study.labels / "case1.nii.gz", study.maps["labels"]["case1"], affine() @ np.diag([1.0, 1.0, 1.01, 1.0]))


def soft(study):
    save_map(study.after / "case1.nii.gz", np.linspace(0, 1, np.prod(SHAPE), dtype=np.float32).reshape(SHAPE))


def negative(study):
    save_map(study.labels / "case1.nii.gz", study.maps["labels"]["case1"].astype(np.int16) - 1)


def not_finite(study):
    values = study.maps["after"]["case1"].astype(np.float32)
    values[2, 3, 1] = np.nan
    save_map(study.after / "case1.nii.gz", values)


def truncated(study):
    path = study.before / "case1.nii.gz"
    path.write_bytes(path.read_bytes()[:200])


def twice(study):
    save_map(study.after / "case1.mha", study.maps["after"]["case1"])


def two_references(study):
    save_map(study.labels / "case1_seg.mha", study.maps["labels"]["case1"])
    save_map(study.labels / "case1_label.mha", study.maps["labels"]["case1"])


def reference_of_scores(study):
    save_map(study.labels / "case1.nii.gz", np.zeros((*SHAPE, 3), np.float32))


def sigmoid_channels(study):
    save_map(study.after / "case1.nii.gz", np.random.default_rng(0).random((*SHAPE, 3), np.float32))


def padding_alone(study):
    save_map(study.after / "case1.nii.gz", np.full((*SHAPE, 3), 0.9, np.float32))


def an_image(study):
    """Two thousand gray values in 1001 voxels of each map."""
    for folder, first in ((study.labels, 1), (study.after, 5000)):
        save_map(folder / "case1.nii.gz", np.arange(first, first + np.prod(SHAPE), dtype=np.uint16).reshape(SHAPE))


@pytest.mark.parametrize(
    ("spoil", "method", "fragments"),
    [
        (
            flipped,
            "prediction",
            ["not on the grid of the reference", "13×11×7, 0.80×1.25×3.00 mm", "labels/case1.nii.gz", "after/case1.nii.gz"],
        ),
        (cropped, "prediction", ["not on the grid of the reference", "13×11×7", "12×11×7"]),
        (thicker, None, ["not on the grid of the reference", "3.00 mm", "3.03 mm"]),
        (padding_alone, "prediction", ["after/case1.nii.gz", "all labels have the same value at 1001 of 1001 voxels"]),
        (soft, "prediction", ["not a label map", "may be a probability map"]),
        (an_image, "prediction", ["2002 different labels; expected at most 2000: is one of them an image?"]),
        (negative, None, ["expected labels from 0", "found -1"]),
        (not_finite, "prediction", ["1 of 1001", "voxel (2, 3, 1)"]),
        (truncated, "before", ["case1.nii.gz"]),
        (twice, "prediction", ["expected one label map, found case1.mha, case1.nii.gz"]),
        (two_references, None, ["expected one label map, found case1_label.mha, case1_seg.mha"]),
        (reference_of_scores, None, ["expected a label map with one value per voxel, this file has 3"]),
        (sigmoid_channels, "prediction", ["do not sum to 1", "region-based training"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_a_bad_case_is_reported_and_the_others_are_measured(tmp_path, spoil, method, fragments):
    study = write_study(tmp_path)
    spoil(study)
    result = run_here(*study.arguments)
    assert result.status == 1
    assert "crfrefine: error: case 'case1': " in result.stderr
    assert result.stderr.splitlines()[-1] == "failed: case1 (1 of 3 cases)"
    for fragment in fragments:
        assert fragment in result.stderr
    assert "Traceback" not in result.stderr
    measured = {(case, name) for case, _, _, name in read_metrics(study.output)}
    whole = {(case, name) for case in ("case0", "case2") for name in ("prediction", "before")}
    assert whole <= measured
    if method is not None:  # the other method of the case is measured all the same
        assert measured - whole == {("case1", {"prediction": "before", "before": "prediction"}[method])}
    summary = json.loads((study.output / "summary.json").read_text())
    assert summary["num_failed"] == 1
    assert [case["status"] for case in summary["cases"]] == ["measured", "failed", "measured"]
    assert {failure["case"] for failure in summary["failures"]} == {"case1"}
    if method is not None:
        assert summary["failures"][0]["method"] == method
        assert "1 of 3 cases are left out" in result.stdout
    assert summary["verdict"]["comparison"]["num_pairs"] == 2


def test_scores_beside_that_cannot_be_used_are_a_note_and_named_ones_a_failure(tmp_path):
    """nnU-Net's regions have sigmoid channels: its label maps can be measured, its probabilities are no distribution over labels."""
    study = write_study(tmp_path, 2)
    for case in ("case0", "case1"):
        save_npz(study.after / f"{case}.npz", np.random.default_rng(0).random((3, *SHAPE), np.float32), "probabilities")
    result = run_here(*study.arguments)
    assert result.status == 0, result.stderr
    assert result.stderr.count("prediction: no calibration: ") == 1  # of the first case, for all
    assert "ece" not in {metric for _, _, metric, _ in read_metrics(study.output)}
    asked = run_here(*study.arguments, "--probabilities", f"prediction={study.after}")
    assert asked.status == 1
    assert "do not sum to 1" in asked.stderr
    assert ("case0", "1", "dice", "prediction") in read_metrics(study.output)


def test_named_probabilities_that_one_case_lacks(tmp_path):
    study = write_study(tmp_path, 2)
    probabilities = softmax(np.zeros((3, *SHAPE))).astype(np.float32)
    save_npz(tmp_path / "scores" / "case0.npz", probabilities, "probabilities")
    result = run_here(*study.arguments, "--probabilities", f"prediction={tmp_path / 'scores'}")
    assert result.status == 0, result.stderr
    assert "no probabilities of 1 of 2 cases, such as case1; the calibration of prediction covers the others" in result.stderr
    found = read_metrics(study.output)
    assert not np.isnan(found["case0", "all", "ece", "prediction"])
    assert np.isnan(found["case1", "all", "ece", "prediction"])
    assert np.isnan(found["case1", "1", "ece", "prediction"])
    assert not np.isnan(found["case1", "1", "dice", "prediction"])


def test_when_every_case_fails_there_is_no_verdict(tmp_path):
    study = write_study(tmp_path, 2)
    for case in ("case0", "case1"):
        (study.before / f"{case}.nii.gz").write_bytes(b"not an image")
    result = run_here(*study.arguments)
    assert result.status == 1
    assert result.stdout.splitlines()[-1] == "verdict: no verdict: no case of before could be measured"
    for case in ("case0", "case1"):
        (study.after / f"{case}.nii.gz").write_bytes(b"not an image")
    result = run_here(*study.arguments)
    assert result.status == 1
    assert read_metrics(study.output) == {}
    assert len(json.loads((study.output / "summary.json").read_text())["failures"]) == 4


def test_label_maps_of_background_alone(tmp_path):
    study = write_study(tmp_path, 2)
    for folder in (study.labels, study.after, study.before):
        for case in ("case0", "case1"):
            save_map(folder / f"{case}.nii.gz", np.zeros(SHAPE, np.uint8))
    result = run_here(*study.arguments)
    assert result.status == 0, result.stderr
    assert result.stdout == "verdict: no verdict: all label maps have only background\n"
    assert read_metrics(study.output) == {}


def test_fail_fast_stops_at_the_first_bad_case(tmp_path):
    study = write_study(tmp_path)
    flipped(study)
    result = run_here(*study.arguments, "--fail-fast", "--processes", 1)
    assert result.status == 1
    assert "stopped at case 'case1' (--fail-fast)" in result.stderr
    assert files_in(study.output) == ["cases"]
    assert files_in(study.output / "cases") == ["case0.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-b", "before={before}"], "two methods have this name"),
        (["--name", "before"], "two methods have this name"),
        (["--probabilities", "nobody={before}"], "no such method; there are prediction, before"),
        (["-r", "whole=1+x"], "'x' is not the number of a label"),
        (["-r", "nothing.json"], "no such file, and not a region"),
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
def test_options_that_cannot_be_followed(tmp_path, options, message):
    study = write_study(tmp_path, 1)
    names = {"before": study.before, "after": study.after, "root": tmp_path}
    result = run_here(*study.arguments, *(text.format(**names) for text in options))
    assert result.status == 1
    assert message in result.stderr
    assert result.stderr.startswith("crfrefine: error: ")
    assert "metrics.csv" not in files_in(study.output) + files_in(study.after)


@pytest.mark.parametrize("options", [["-b", "nameless"], ["-b", "=folder"], ["--probabilities", "x="], ["--processes", "0"], ["-v", "-q"]])
def test_wrong_usage(tmp_path, options):
    study = write_study(tmp_path, 1)
    assert run_here(*study.arguments, *options).status == 2


def test_ignoring_everything_is_a_failure(tmp_path):
    study = write_study(tmp_path, 2)
    save_map(study.labels / "case0.nii.gz", np.full(SHAPE, 3, np.uint8))
    result = run_here(*study.arguments, "--ignore-label", 3)
    assert result.status == 1
    assert "every voxel has the label 3, to be ignored" in result.stderr


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
    judged = json.loads((study.output / "summary.json").read_text())["verdict"]
    assert judged["outcome"] == "not better than simple"
    assert judged["rivals"][0]["p_holm"] is None


def test_a_reference_that_was_not_fetched_is_a_failure(tmp_path):
    study = write_study(tmp_path)
    (study.labels / "case1.nii.gz").unlink()
    (study.labels / "case1.nii.gz").symlink_to(tmp_path / "nowhere")
    result = run_here(*study.arguments)
    assert result.status == 1
    assert "case 'case1': " in result.stderr
    assert "labels/case1.nii.gz: is a link to a file that is not there" in result.stderr
    assert json.loads((study.output / "summary.json").read_text())["num_cases"] == 3


def test_a_file_of_no_regions(tmp_path):
    study = write_study(tmp_path, 1)
    (tmp_path / "regions.json").write_text("{}")
    result = run_here(*study.arguments, "-r", tmp_path / "regions.json")
    assert result.status == 1
    assert "regions.json: holds no region; expected names and labels" in result.stderr


def test_a_region_that_cannot_be_called_so_does_not_bring_back_the_ignored_label(tmp_path):
    study = write_study(tmp_path, 1)
    described = {"labels": {"background": 0, "core": 1, "ignore": 2}, "regions": {"mean": [1]}}
    (study.labels / "dataset.json").write_text(json.dumps(described))
    result = run_here(*study.arguments)
    assert result.status == 0, result.stderr
    assert "dataset.json: region 'mean': the name \"mean\" is reserved for the mean over regions" in result.stderr
    assert result.stderr.count("continuing without its regions") == 1
    assert {label for _, label, _, _ in read_metrics(study.output)} == {"1"}
    assert json.loads((study.output / "summary.json").read_text())["settings"]["ignore_label"] == 2
