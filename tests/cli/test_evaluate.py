"""`crfrefine evaluate` from files to files: every number against the brute force, every format, what is counted apart."""

import contextlib
import json
import math
import os
import re
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from cli_helpers import command, data_folder, files_in, load_nifti, run_here, run_process
from evaluation_helpers import (
    SHAPE,
    disturbed,
    expected_calibration,
    expected_calibration_of_all,
    expected_overlap,
    label_map,
    logits_of,
    read_metrics,
    save_map,
    save_npz,
    softmax,
    write_study,
)

from crfrefine.evaluate import EvaluationOptions, run_evaluation
from crfrefine.evaluate.report_input import make_report_input
from crfrefine.metrics.registry import CALIBRATION_METRICS, MASK_METRICS
from crfrefine.report import missing_viewer
from crfrefine.statistics.paired import detectable_difference

ROUNDING = 1e-5
"""Relative: headers of NIfTI keep spacing and directions as float32, and so are read probabilities."""


def assert_equal(found: dict, case: str, label: str, method: str, expected: dict) -> None:
    for metric, value in expected.items():
        measured = found[case, label, metric, method]
        assert measured == pytest.approx(value, rel=ROUNDING, abs=1e-9, nan_ok=True), (case, label, metric, method)


def test_every_value_of_the_table_equals_the_brute_force(tmp_path):
    study = write_study(tmp_path)
    result = run_here(*study.arguments, "--regions", "whole=1+2", "--tolerance", "1.25", "--processes", 1)
    assert result.status == 0, result.stderr
    found = read_metrics(study.output)
    cases, labels, methods = (
        ("case0", "case1", "case2"),
        {"1": (1,), "2": (2,), "whole": (1, 2)},
        {"prediction": "after", "before": "before"},
    )
    assert set(found) == {
        (case, label, metric, method) for case in cases for label in labels for metric in MASK_METRICS for method in methods
    }
    for case in cases:
        for label, members in labels.items():
            for method, folder in methods.items():
                masks = (np.isin(study.maps[name][case], members) for name in (folder, "labels"))
                assert_equal(found, case, label, method, expected_overlap(*masks, tolerance_mm=1.25))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mhd", ".mha", ".nrrd", ".nhdr"])
def test_formats_may_be_mixed(tmp_path, suffix):
    """The baseline is NIfTI; SimpleITK's axes and world are others than those of nibabel."""
    study = write_study(tmp_path, 1)
    (study.after / "case0.nii.gz").unlink()
    (study.labels / "case0.nii.gz").unlink()
    save_map(study.after / f"case0{suffix}", study.maps["after"]["case0"])
    save_map(study.labels / f"case0_segmentation{suffix}", study.maps["labels"]["case0"])
    result = run_here(*study.arguments)
    assert result.status == 0, result.stderr
    found = read_metrics(study.output)
    for method, folder in (("prediction", "after"), ("before", "before")):
        masks = (study.maps[name]["case0"] == 1 for name in (folder, "labels"))
        assert_equal(found, "case0", "1", method, expected_overlap(*masks))


def test_single_files(tmp_path):
    study = write_study(tmp_path, 1)
    files = [folder / "case0.nii.gz" for folder in (study.after, study.labels, study.before)]
    result = run_here("evaluate", files[0], files[1], "-b", f"network={files[2]}", "--name", "crf", "--no-report", "-o", study.output)
    assert result.status == 0, result.stderr
    found = read_metrics(study.output)
    assert {method for *_, method in found} == {"crf", "network"}
    assert_equal(found, "case0", "2", "crf", expected_overlap(*(study.maps[name]["case0"] == 2 for name in ("after", "labels"))))


def test_without_a_baseline_there_is_nothing_to_judge(tmp_path):
    study = write_study(tmp_path)
    result = run_here("evaluate", study.after, study.labels, "--no-report", "-o", study.output)
    assert result.status == 0, result.stderr
    assert "verdict" not in result.stdout
    assert {method for *_, method in read_metrics(study.output)} == {"prediction"}
    dice = next(line.split("\t") for line in result.stdout.splitlines() if line.startswith("dice\t1\t"))
    expected = [expected_overlap(*(study.maps[name][f"case{n}"] == 1 for name in ("after", "labels")))["dice"] for n in range(3)]
    assert float(dice[4]) == pytest.approx(np.mean(expected), abs=6e-5)  # printed with four decimals
    summary = json.loads((study.output / "summary.json").read_text())
    assert summary["verdict"] is None
    assert summary["settings"]["baseline"] is None


@pytest.mark.parametrize("kind", ["npz", "npz beside", "4-D", "4-D probabilities", "beside", "elsewhere"])
def test_probabilities_are_found_and_their_calibration_equals_the_brute_force(tmp_path, kind):
    study = write_study(tmp_path, 2)
    given: tuple[object, ...] = ()
    for number in range(2):
        case, reference = f"case{number}", study.maps["labels"][f"case{number}"]
        logits = logits_of(reference, number + 90)
        stored = softmax(logits).astype(np.float32) if kind in ("4-D probabilities", "beside") else logits
        path = study.after / f"{case}.nii.gz"
        if kind in ("npz", "4-D", "4-D probabilities"):
            path.unlink()
            study.maps["after"][case] = logits.argmax(axis=0)
        if kind in ("npz", "npz beside"):
            save_npz(study.after / f"{case}.npz", stored)
        elif kind == "beside":
            save_map(study.after / f"{case}_probabilities.nii.gz", np.moveaxis(stored, 0, -1))
            save_map(study.after / f"{case}_logits.nii.gz", np.moveaxis(100 * logits, 0, -1))  # of another softmax: not to be taken
            (study.after / f"{case}_preview.png").write_bytes(b"a picture")
        elif kind == "elsewhere":
            save_npz(tmp_path / "scores" / f"{case}.npz", stored)
            given = ("--probabilities", f"prediction={tmp_path / 'scores'}")
        else:
            save_map(path, np.moveaxis(stored, 0, -1))
    result = run_here(*study.arguments, *given, "-r", "whole=1+2")
    assert result.status == 0, result.stderr
    assert "without a reference" not in result.stderr
    found = read_metrics(study.output)
    # The baseline has no probabilities, so nothing is said about them.
    assert {(metric, method) for _, _, metric, method in found if method == "before"} == {(metric, "before") for metric in MASK_METRICS}
    for number in range(2):
        case, reference = f"case{number}", study.maps["labels"][f"case{number}"]
        probabilities = softmax(logits_of(reference, number + 90))
        for label, members in (("1", (1,)), ("2", (2,)), ("whole", (1, 2))):
            expected = expected_calibration(probabilities[list(members)].sum(axis=0), np.isin(reference, members))
            assert_equal(found, case, label, "prediction", expected)
            masks = (np.isin(study.maps[name][case], members) for name in ("after", "labels"))
            assert_equal(found, case, label, "prediction", expected_overlap(*masks))
        assert_equal(found, case, "all", "prediction", expected_calibration_of_all(probabilities, reference))
        assert not [key for key in found if key[1] == "all" and key[2] not in CALIBRATION_METRICS]


def test_better_probabilities_are_told(tmp_path):
    """Those of the baseline are a hundred times too sharp: the sentence stands above what got worse, in the files and on the page."""
    study = write_study(tmp_path, 7)
    for number in range(7):
        case = f"case{number}"
        logits = logits_of(study.maps["labels"][case], number + 90)
        for folder, factor in ((study.after, 1), (study.before, 100)):
            save_npz(folder / f"{case}.npz", factor * logits)
    result = run_here(*(word for word in study.arguments if word != "--no-report"))
    assert result.status == 0, result.stderr
    told = json.loads((study.output / "summary.json").read_text())["verdict"]["probabilities"]
    assert told["change"] == "better"
    assert told["region"] == "all"
    found = read_metrics(study.output)
    means = [np.mean([found[f"case{n}", "all", "nll", method] for n in range(7)]) for method in ("before", "prediction")]
    start = f"The probabilities got better: negative log likelihood {means[0]:.5f} → {means[1]:.5f} (better in 7 of 7 cases, p 0.016), "
    assert told["sentence"].startswith(start + "calibration error (ECE) ")
    assert result.stdout.splitlines()[-3] == told["sentence"]
    assert told["sentence"] in (study.output / "report.html").read_text(encoding="utf-8")


def test_one_file_a_label_of_probabilities(tmp_path):
    """Zeros for all labels, around a cropped output, are certain background."""
    study = write_study(tmp_path, 1)
    probabilities = softmax(logits_of(study.maps["labels"]["case0"], 1)).astype(np.float32)
    probabilities[:, :, :2] = 0.0
    for label in range(3):
        save_map(tmp_path / "scores" / f"case0_ProbMapClass{label}.mha", probabilities[label])
    result = run_here(*study.arguments, "--probabilities", f"before={tmp_path / 'scores'}")
    assert result.status == 0, result.stderr
    probabilities[0, :, :2] = 1.0
    expected = expected_calibration_of_all(probabilities, study.maps["labels"]["case0"])
    assert_equal(read_metrics(study.output), "case0", "all", "before", expected)


def test_label_maps_stored_as_float_are_label_maps(tmp_path):
    study = write_study(tmp_path, 1)
    save_map(study.after / "case0.nii.gz", study.maps["after"]["case0"].astype(np.float32))
    result = run_here(*study.arguments)
    assert result.status == 0, result.stderr
    assert_equal(
        read_metrics(study.output),
        "case0",
        "1",
        "prediction",
        expected_overlap(*(study.maps[name]["case0"] == 1 for name in ("after", "labels"))),
    )


def test_empty_masks_are_counted_apart_and_never_dropped(tmp_path):
    """Of label 2, case0 has it in neither map, case1 only in the reference, case2 only in the prediction; label 7 in one reference."""
    study = write_study(tmp_path, 3)
    maps = {case: {name: study.maps[name][case].copy() for name in ("labels", "after")} for case in study.maps["labels"]}
    for case, name in (("case0", "labels"), ("case0", "after"), ("case1", "after"), ("case2", "labels")):
        maps[case][name][maps[case][name] == 2] = 0
    maps["case1"]["labels"][0, 0, :2] = 7
    for case, both in maps.items():
        for name, values in both.items():
            save_map(tmp_path / name / f"{case}.nii.gz", values)
    result = run_here(*study.arguments)
    assert result.status == 0, result.stderr
    found = read_metrics(study.output)
    for case, both in maps.items():
        for label in (1, 2, 7):
            assert_equal(found, case, str(label), "prediction", expected_overlap(both["after"] == label, both["labels"] == label))
    with (study.output / "metrics.csv").open() as file:
        lines = file.read().splitlines()
    assert {"case0,2,dice,,prediction", "case1,2,dice,0.0,prediction", "case1,2,hd_mm,,prediction"} <= set(lines)
    assert {"case2,2,dice,0.0,prediction", "case2,2,sensitivity,,prediction", "case0,7,num_components,0.0,prediction"} <= set(lines)
    counts = json.loads((study.output / "summary.json").read_text())["empty_masks"]
    assert counts["2"]["prediction"] == {"reference": 2, "prediction": 2, "both": 1, "num_cases": 3}
    assert counts["1"]["prediction"] == {"reference": 0, "prediction": 0, "both": 0, "num_cases": 3}
    assert counts["7"]["before"] == {"reference": 2, "prediction": 3, "both": 2, "num_cases": 3}
    assert "empty masks: 2: prediction of 3 cases: 1 without it in both maps, 1 missed, 1 false alarms" in result.stdout
    assert "empty masks: 7: prediction of 3 cases: 2 without it in both maps, 1 missed, 0 false alarms" in result.stdout
    assert "empty masks: 1:" not in result.stdout


def test_dataset_json_names_labels_regions_and_what_to_ignore(tmp_path):
    study = write_study(tmp_path, 2)
    labels = {"background": 0, "core": 1, "rim": 2, "rare": 3, "ignore": 4}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels, "regions": {"whole": [1, 2]}}))
    for case in ("case0", "case1"):
        marked = study.maps["labels"][case].copy()
        marked[3:9, 2:6, 1:4] = 4
        study.maps["labels"][case] = marked
        save_map(study.labels / f"{case}.nii.gz", marked)
        study.maps["after"][case][marked == 4] = 5  # a label that occurs nowhere else: no region of its own
        save_map(study.after / f"{case}.nii.gz", study.maps["after"][case])
    result = run_here(*study.arguments)
    assert result.status == 0, result.stderr
    found = read_metrics(study.output)
    assert {label for _, label, *_ in found} == {"1", "2", "3", "whole"}
    for case in ("case0", "case1"):
        counts = study.maps["labels"][case] != 4
        for label, members in (("2", (2,)), ("3", (3,)), ("whole", (1, 2))):
            masks = (np.isin(study.maps[name][case], members) & counts for name in ("after", "labels"))
            assert_equal(found, case, label, "prediction", expected_overlap(*masks))
    assert "\t1 core\t" in result.stdout
    summary = json.loads((study.output / "summary.json").read_text())
    assert summary["judged_regions"] == ["whole"]
    assert summary["settings"]["ignore_label"] == 4
    assert summary["regions"] == {"1": [1], "2": [2], "3": [3], "whole": [1, 2]}


def test_a_label_among_the_regions_of_dataset_json_is_there_once(tmp_path):
    """Region-based training: the label has a row of its own, under its number and with its name."""
    study = write_study(tmp_path, 2)
    labels = {"background": 0, "whole": [1, 2], "rim": 2}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels, "regions_class_order": [1, 2]}))
    result = run_here(*study.arguments)
    assert result.status == 0, result.stderr
    summary = json.loads((study.output / "summary.json").read_text())
    assert summary["regions"] == {"1": [1], "2": [2], "whole": [1, 2]}
    assert summary["titles"]["2"] == "2 rim"
    assert summary["judged_regions"] == ["whole", "2"]
    assert {label for _, label, *_ in read_metrics(study.output)} == {"1", "2", "whole"}


@pytest.mark.parametrize("is_beside_the_labels", [True, False])
def test_labels_of_a_dataset_json_that_is_asked_for_are_there_once(tmp_path, is_beside_the_labels):
    """`--regions dataset.json`: one row `2 posterior`, and none `posterior`; a name that dataset.json does not have stays a region."""
    study = write_study(tmp_path / "study", 2)
    path = (study.root if is_beside_the_labels else tmp_path) / "dataset.json"
    path.write_text(json.dumps({"labels": {"background": 0, "anterior": 1, "posterior": 2}, "regions": {"whole": [1, 2]}}))
    result = run_here(*study.arguments, "-r", path, "-r", "back=2")
    assert result.status == 0, result.stderr
    summary = json.loads((study.output / "summary.json").read_text())
    assert summary["regions"] == {"1": [1], "2": [2], "whole": [1, 2], "back": [2]}
    assert summary["judged_regions"] == ["1", "2", "whole", "back"]
    assert summary["titles"]["2"] == "2 posterior"
    assert [line.split("\t")[1] for line in result.stdout.splitlines() if line.startswith("dice\t")] == [
        *("1 anterior", "2 posterior", "whole", "back", "mean")
    ]


def test_ignored_voxels_count_in_the_calibration_neither(tmp_path):
    study = write_study(tmp_path, 1)
    reference = study.maps["labels"]["case0"]
    logits = logits_of(reference, 8)
    save_npz(study.after / "case0.npz", logits)
    marked = reference.copy()
    marked[:5] = 255
    save_map(study.labels / "case0.nii.gz", marked)
    result = run_here(*study.arguments, "--ignore-label", 255)
    assert result.status == 0, result.stderr
    found = read_metrics(study.output)
    assert "255" not in {label for _, label, *_ in found}
    probabilities = softmax(logits)
    assert_equal(found, "case0", "1", "prediction", expected_calibration(probabilities[1][5:], reference[5:] == 1))
    assert_equal(found, "case0", "all", "prediction", expected_calibration_of_all(probabilities[:, 5:], reference[5:]))


def test_the_verdict_is_on_the_named_regions_and_asks_about_the_rivals(tmp_path):
    """Nine cases, in each of which the prediction is better than the baseline, and the same as the rival."""
    study = write_study(tmp_path, 9)
    result = run_here(*study.arguments, "-b", f"twin={study.after}", "-r", "whole=1+2")
    assert result.status == 0, result.stderr
    judged = json.loads((study.output / "summary.json").read_text())["verdict"]
    dice = {
        name: np.array([expected_overlap(study.maps[name][f"case{n}"] > 0, study.maps["labels"][f"case{n}"] > 0)["dice"] for n in range(9)])
        for name in ("after", "before")
    }
    assert (dice["after"] > dice["before"]).all()
    assert judged["regions"] == ["whole"]
    assert judged["comparison"]["mean_difference"] == pytest.approx((dice["after"] - dice["before"]).mean())
    assert judged["comparison"]["p_value"] == pytest.approx(2 / 2**9)  # all nine signs agree
    assert judged["p_adjusted"] == judged["comparison"]["p_value"]  # the question is tested alone
    assert judged["p_holm"] == pytest.approx(2 * 2 / 2**9)  # as before families had names, of two comparisons
    assert judged["outcome"] == "not better than simple"
    lines = result.stdout.splitlines()
    assert lines[-1].startswith("verdict: The refinement helps. ")
    assert " But not shown to gain more than twin: the refinement +" in lines[-1]
    assert "simple" not in lines[-1]  # nobody said that the twin is
    deviation = (dice["after"] - dice["before"]).std(ddof=1)
    seen = 100 * detectable_difference(deviation, 9)
    assert lines[-2] == judged["harm"]["sentence"] == "No other metric got worse in most cases, nor Dice in any region."
    assert lines[-3].startswith("p (Holm): Wilcoxon's signed-rank test; Dice over the judged regions is tested alone; ")
    assert lines[-4].startswith("power: with 9 cases")
    assert "units: differences of dice, surface_dice in points (hundredths)" in lines
    assert lines[-4].endswith(f" below {seen:.2f} points could hardly have been seen (power 80 %, level 0.05)")


def _better_but_smaller(root):
    """Ten cases: the baseline has far too much of label 1, the prediction a little too little; return the summary, with the output."""
    for number in range(10):
        reference, before = np.zeros((2, *SHAPE), np.uint8)
        reference[2 : 8 + number % 3, 2:8, 2:5] = 1
        before[1:12, 1 : 9 + number % 2, 1:6] = 1
        after = reference.copy()
        after[2, 2 : 4 + number % 4] = 0
        for folder, values in (("labels", reference), ("before", before), ("after", after)):
            save_map(root / folder / f"case{number}.nii.gz", values)
    (root / "labels" / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "organ": 1}}))
    arguments = ("evaluate", root / "after", root / "labels", "-b", f"network={root / 'before'}", "-o", root / "report")
    result = run_here(*arguments)
    assert result.status == 0, result.stderr
    return json.loads((root / "report" / "summary.json").read_text()) | {"stdout": result.stdout}


def test_what_got_worse_is_said_beside_the_verdict(tmp_path):
    """Dice rises in every case, and sensitivity falls in every case: terminal, summary and page say both."""
    summary = _better_but_smaller(tmp_path)
    judged = summary["verdict"]
    assert judged["outcome"] == "helps"
    assert judged["sentence"].endswith("10 of 10 cases better). But significantly worse than with network: sensitivity.")
    (decline,) = judged["harm"]["significant"]
    assert (decline["metric"], decline["region"], decline["is_overall"]) == ("sensitivity", "1", True)
    assert (decline["comparison"]["losses"], decline["comparison"]["num_pairs"]) == (10, 10)
    compared = ("sensitivity", "precision", "volume_difference_ml", "surface_dice", "hd_mm", "hd95_mm", "assd_mm")
    assert decline["p_holm"] == pytest.approx(len(compared) * 2 / 2**10), "all signs agree, in a family of seven"
    change = 100 * decline["comparison"]["mean_difference"]
    assert {row["p_adjusted"] for row in summary["summary"] if (row["metric"], row["region"]) == ("sensitivity", "1")} == {
        None,
        decline["p_holm"],
    }, "of the baseline, and of the prediction: the same as in the sentence"
    family = "p after Holm over 7 tests of other metrics over the judged regions"
    expected = f"What got worse ({family}): sensitivity in 10 of 10 cases ({change:.2f} points on average, p 0.014)."
    assert judged["harm"]["sentence"] == expected
    assert summary["stdout"].splitlines()[-2:] == [expected, f"verdict: {judged['sentence']}"]
    assert expected in (tmp_path / "report" / "report.html").read_text()


def test_the_mean_is_over_the_regions_that_were_asked_for(tmp_path):
    study = write_study(tmp_path, 3)
    assert run_here(*study.arguments, "-r", "whole=1+2", "-r", "second=2").status == 0
    rows = json.loads((study.output / "summary.json").read_text())["summary"]
    (mean,) = [row for row in rows if (row["metric"], row["region"], row["method"]) == ("dice", "mean", "prediction")]
    expected = {
        name: np.mean(
            [
                expected_overlap(np.isin(study.maps[name][f"case{n}"], members), np.isin(study.maps["labels"][f"case{n}"], members))["dice"]
                for n in range(3)
                for members in ((1, 2), (2,))
            ]
        )
        for name in ("after", "before")
    }
    assert mean["mean"] == pytest.approx(expected["after"])
    assert mean["comparison"]["mean_difference"] == pytest.approx(expected["after"] - expected["before"])


def test_labels_that_only_probabilities_know_have_rows_too(tmp_path):
    """Four channels, of which the last is never the likeliest: empty masks, and a calibration all the same; none without probabilities."""
    study = write_study(tmp_path, 2)
    reference = study.maps["labels"]["case0"]
    logits = logits_of(reference, 2, num_labels=4)
    logits[3] -= 20
    save_npz(study.after / "case0.npz", logits)
    assert run_here(*study.arguments).status == 0
    found = read_metrics(study.output)
    nothing = np.zeros(SHAPE, bool)
    assert_equal(found, "case0", "3", "prediction", expected_overlap(nothing, nothing))
    assert_equal(found, "case0", "3", "prediction", expected_calibration(softmax(logits)[3], nothing))
    assert all(math.isnan(found["case1", "3", metric, "prediction"]) for metric in CALIBRATION_METRICS)


def test_too_few_cases_are_said_to_be_too_few(tmp_path):
    study = write_study(tmp_path, 3)
    result = run_here(*study.arguments)
    assert "power: with 3 cases no difference, however large, could have been significant" in result.stdout
    assert "verdict: Too few cases. n = 3" in result.stdout.splitlines()[-1]


def test_quiet_says_the_verdict_alone(tmp_path):
    study = write_study(tmp_path, 2)
    result = run_here(*study.arguments, "-q")
    assert result.stderr == ""
    assert result.stdout.startswith("verdict: ")
    assert result.stdout.count("\n") == 1


def test_two_processes_find_the_same_as_one(tmp_path):
    study = write_study(tmp_path, 4)
    results = []
    for number in (1, 2):
        assert run_here(*study.arguments, "--processes", number).status == 0
        results.append((study.output / "metrics.csv").read_bytes())
    assert results[0] == results[1]
    assert files_in(study.output) == ["cases", "metrics.csv", "summary.json"]


def test_a_slice_is_measured_as_a_plane(tmp_path):
    reference, found = label_map(1)[:, :, 3], disturbed(label_map(1), 2, 0.2)[:, :, 3]
    for folder, values in (("labels", reference), ("after", found)):
        (tmp_path / folder).mkdir()
        nib.save(nib.Nifti1Image(values[:, :, None], np.diag([0.8, 1.25, 3.0, 1.0])), tmp_path / folder / "case.nii.gz")
    result = run_here("evaluate", tmp_path / "after", tmp_path / "labels", "--no-report", "-o", tmp_path / "out")
    assert result.status == 0, result.stderr
    measured = read_metrics(tmp_path / "out")
    assert measured["case", "1", "dice", "prediction"] == pytest.approx(
        2 * ((found == 1) & (reference == 1)).sum() / ((found == 1).sum() + (reference == 1).sum())
    )
    # Were the third axis one, each voxel would be boundary and lie on the other map's or next to it.
    full = np.full(SHAPE[:2], 1, np.uint8)
    for folder, values in (("labels", full), ("after", full * (np.arange(SHAPE[0]) < 9)[:, None])):
        nib.save(nib.Nifti1Image(values[:, :, None].astype(np.uint8), np.diag([0.8, 1.25, 3.0, 1.0])), tmp_path / folder / "case.nii.gz")
    assert run_here("evaluate", tmp_path / "after", tmp_path / "labels", "--no-report", "-o", tmp_path / "out").status == 0
    assert read_metrics(tmp_path / "out")["case", "1", "hd_mm", "prediction"] == pytest.approx(4 * 0.8)


def test_the_report_shows_cases_with_and_without_an_image(tmp_path):
    """Predictions as .npz, images of two modalities; those of case1 are on another grid, those of case2 are not there."""
    study = write_study(tmp_path)
    images = tmp_path / "images"
    for case, reference in study.maps["labels"].items():
        (study.after / f"{case}.nii.gz").unlink()
        save_npz(study.after / f"{case}.npz", logits_of(reference, 3))
        for modality in range(2):
            save_map(images / f"{case}_{modality:04d}.nii.gz", (100.0 * reference + modality).astype(np.float32))
    save_map(images / "case1_0000.nii.gz", np.zeros((5, *SHAPE[1:]), np.float32))
    for path in images.glob("case2*"):
        path.unlink()
    result = run_here(*(argument for argument in study.arguments if argument != "--no-report"), "--images", images, "-r", "whole=1+2")
    assert result.status == 0, result.stderr
    assert "case 'case1': shown without case1_0000.nii.gz: " in result.stderr
    assert result.stderr.count("shown without") == 1, "the second modality is on the grid"
    assert "no image of 1 of 3 cases, such as case2" in result.stderr
    assert files_in(study.output) == ["cases", "metrics.csv", "report.html", "summary.json"]
    page = (study.output / "report.html").read_text(encoding="utf-8")
    assert "Too few cases. n = 3" in page
    assert "whole" in page
    assert str(images) in page


@pytest.mark.parametrize("is_one_file", [False, True])
def test_the_report_has_all_modalities_under_their_names(tmp_path, is_one_file):
    """The second one alone shows the labels, so it is the first to be seen; the names are those of `dataset.json`."""
    study = write_study(tmp_path, 2)
    for seed, (case, reference) in enumerate(study.maps["labels"].items()):
        noise = np.random.default_rng(seed).normal(0, 1, (3, *reference.shape)).astype(np.float32)
        noise[1] += 40 * (reference > 0)
        if is_one_file:
            save_map(tmp_path / "images" / f"{case}.nii.gz", np.moveaxis(noise, 0, -1))
        else:
            for modality, values in enumerate(noise):
                save_map(tmp_path / "images" / f"{case}_{modality:04d}.nii.gz", values)
    description = {"channel_names": {"0": "T1", "1": "<FLAIR>", "2": "T2"}, "labels": {"background": 0, "edema": 1, "core": 2}}
    (tmp_path / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    arguments = (argument for argument in study.arguments if argument != "--no-report")
    result = run_here(*arguments, "--images", tmp_path / "images")
    assert result.status == 0, result.stderr
    page = (study.output / "report.html").read_text(encoding="utf-8")
    assert "<figcaption>Image: &lt;FLAIR&gt;</figcaption>" in page
    assert "<title>1 edema</title>" in page
    found = re.search(r'<script type="application/json" id="viewer-specs">(.*?)</script>', page)
    if not missing_viewer():
        for spec in json.loads(found[1]).values():
            assert [modality["name"] for modality in spec["modalities"]] == ["T1", "<FLAIR>", "T2"]
            assert spec["modality"] == 1
        assert page.count('class="sprite-image"') == 2 * 3


def test_the_report_of_a_method_alone(tmp_path):
    study = write_study(tmp_path, 2)
    result = run_here("evaluate", study.after, study.labels, "--name", "crf", "-o", study.output)
    assert result.status == 0, result.stderr
    assert "case1" in (study.output / "report.html").read_text(encoding="utf-8")
    again = run_here("evaluate", study.after, study.labels, "-o", study.output, "--no-report")
    assert "report.html is from an earlier run" in again.stderr


def test_help_is_quick_and_names_the_options():
    result = run_process("evaluate", "--help")
    assert result.status == 0
    for option in ("PREDICTIONS", "LABELS", "--baseline", "--images", "--regions", "--tolerance", "--continue", "--no-report"):
        assert option in result.stdout


@pytest.mark.data
@pytest.mark.skipif(not (data_folder() / "hippocampus").is_dir(), reason="needs the real cases: set CRFREFINE_DATA")
def test_real_cases_in_both_formats(tmp_path):
    """Logits as they are against those of the weak network, with the labels of MetaImage files; Dice by hand."""
    data = data_folder()
    mhd = run_here("evaluate", data / "hippocampus_mhd/logits", data / "hippocampus_mhd/labels", "--no-report", "-o", tmp_path / "mhd")
    assert mhd.status == 0, mhd.stderr
    assert len({case for case, *_ in read_metrics(tmp_path / "mhd")}) == 5
    cases = [path.name for path in sorted((data / "hippocampus/labels").iterdir())[::20]]
    for folder in ("labels", "logits", "logits_weak"):
        (tmp_path / folder).mkdir()
        for name in cases:
            (tmp_path / folder / name).symlink_to(data / "hippocampus" / folder / name)
    result = run_here(
        "evaluate",
        tmp_path / "logits",
        tmp_path / "labels",
        "-b",
        f"weak={tmp_path / 'logits_weak'}",
        "--no-report",
        "-o",
        tmp_path / "out",
    )
    assert result.status == 0, result.stderr
    found = read_metrics(tmp_path / "out")
    for name in cases:
        case = name.removesuffix(".nii.gz")
        wanted = np.rint(load_nifti(data / "hippocampus/labels" / name)) == 1
        logits = np.moveaxis(load_nifti(data / "hippocampus/logits" / name), -1, 0)
        mask = logits.argmax(axis=0) == 1
        assert found[case, "1", "dice", "prediction"] == pytest.approx(2 * (mask & wanted).sum() / (mask.sum() + wanted.sum()))
        assert_equal(found, case, "1", "prediction", expected_calibration(softmax(logits)[1], wanted))
    assert "helps" in result.stdout.splitlines()[-1]
    assert not any(math.isnan(value) for (_, _, metric, _), value in found.items() if metric == "assd_mm")


def test_a_region_of_a_label_that_occurs_nowhere_is_empty(tmp_path):
    study = write_study(tmp_path, 1)
    result = run_here(*study.arguments, "-r", "9=9", "-r", "2=2")
    assert result.status == 0, result.stderr
    nothing = np.zeros(SHAPE, bool)
    found = read_metrics(study.output)
    assert {label for _, label, _, _ in found} == {"1", "2", "9"}
    assert_equal(found, "case0", "9", "prediction", expected_overlap(nothing, nothing))
    assert json.loads((study.output / "summary.json").read_text())["judged_regions"] == ["9", "2"]


def test_a_region_of_more_labels_than_a_file_name_has_letters(tmp_path):
    study = write_study(tmp_path, 1)
    text = "bones=" + "+".join(map(str, range(1, 120)))
    assert len(text) > 255
    result = run_here(*study.arguments, "-r", text)
    assert result.status == 0, result.stderr
    assert_equal(
        read_metrics(study.output),
        "case0",
        "bones",
        "prediction",
        expected_overlap(*(study.maps[name]["case0"] > 0 for name in ("after", "labels"))),
    )


def test_names_of_methods_stay_on_one_line(tmp_path):
    study = write_study(tmp_path, 1)
    result = run_here(*study.arguments, "--name", " my\tcrf\n", "-b", f"a\nb={study.before}")
    assert result.status == 0, result.stderr
    assert {method for *_, method in read_metrics(study.output)} == {"my crf", "before", "a b"}
    assert {line.count("\t") for line in result.stdout.splitlines() if line.startswith("dice")} == {9}


@pytest.mark.parametrize(("columns", "is_narrow"), [(80, True), (160, False)])
def test_the_table_fits_a_terminal(tmp_path, columns, is_narrow):
    pty = pytest.importorskip("pty")
    study = write_study(tmp_path, 2)
    master, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": str(columns)}
    with subprocess.Popen(
        command(*study.arguments, "--name", "my method"), stdout=terminal, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # what reading gives when the other end is closed
            while part := os.read(master, 4096):
                shown += part
    os.close(master)
    assert process.returncode == 0
    lines = re.sub(r"\x1b\[[0-9;]*m|\r", "", shown.decode()).splitlines()
    table = lines[: next(number for number, line in enumerate(lines) if line.startswith("power: "))]
    assert max(map(len, table)) <= columns
    dice = [
        expected_overlap(*(study.maps[name][f"case{n}"] == 2 for name in (folder, "labels")))["dice"]
        for folder in ("before", "after")
        for n in (0, 1)
    ]
    means = [f"{(dice[0] + dice[1]) / 2:.4f}", f"{(dice[2] + dice[3]) / 2:.4f}"]
    first = next(number for number, line in enumerate(table) if " ".join(line.split()).startswith(("dice, my method", "dice 1")))
    row = table[first + 1 + is_narrow].split()
    expected = ["2", "2", *means] if is_narrow else ["dice", "2", "my", "method", "2", *means]
    assert row[: len(expected)] == expected


def test_no_method_takes_the_place_of_a_setting_in_the_report(tmp_path):
    study = write_study(tmp_path, 1)
    options = EvaluationOptions(study.after, study.labels, study.output, "version", baselines=(("images", study.before),), report=False)
    settings = make_report_input(run_evaluation(options), print).settings
    assert settings["method version"] == str(study.after)
    assert settings["method images"] == str(study.before)
    assert settings["images"] == "none"
    assert settings["version"].startswith("crfrefine ")


@pytest.mark.parametrize("kind", ["npz", "4-D"])
def test_named_probabilities_change_the_calibration_and_not_the_masks(tmp_path, kind):
    """The prediction itself is logits, whose likeliest labels are others than those of the named ones."""
    study = write_study(tmp_path, 1)
    reference = study.maps["labels"]["case0"]
    own, named = logits_of(reference, 1), logits_of(np.roll(reference, 2, axis=0), 2)
    (study.after / "case0.nii.gz").unlink()
    if kind == "npz":
        save_npz(study.after / "case0.npz", own)
    else:
        save_map(study.after / "case0.nii.gz", np.moveaxis(own, 0, -1))
    save_npz(tmp_path / "scores" / "case0.npz", named)
    result = run_here(*study.arguments, "--probabilities", f"prediction={tmp_path / 'scores'}")
    assert result.status == 0, result.stderr
    found = read_metrics(study.output)
    assert_equal(found, "case0", "1", "prediction", expected_overlap(own.argmax(axis=0) == 1, reference == 1))
    assert_equal(found, "case0", "1", "prediction", expected_calibration(softmax(named)[1], reference == 1))
    assert_equal(found, "case0", "all", "prediction", expected_calibration_of_all(softmax(named), reference))


def test_the_fields_of_the_summary_are_documented(tmp_path):
    study = write_study(tmp_path, 2)
    assert run_here(*study.arguments, "-b", f"rival={study.before}").status == 0
    summary = json.loads((study.output / "summary.json").read_text())
    judged, row = summary["verdict"], next(row for row in summary["summary"] if row["comparison"])
    text = (Path(__file__).parents[2] / "docs" / "reference" / "summary.md").read_text()
    worse = _better_but_smaller(tmp_path / "worse")["verdict"]["harm"]
    parts = (judged["rivals"][0], judged["comparison"], row, row["comparison"], summary["cases"][0], worse, worse["significant"][0])
    for part in (summary, judged, *parts):
        assert [name for name in part if f"`{name}`" not in text] == []
