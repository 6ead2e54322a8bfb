"""`crfrefine evaluate` from files to files: every number against the brute force, every format,
what is counted apart.
"""

import dataclasses
import itertools
import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from cli_helpers import files_in, run_here
from evaluation_helpers import (
    SHAPE,
    SPACING,
    Study,
    assert_equal,
    expected_calibration,
    expected_calibration_of_all,
    expected_overlap,
    logits_of,
    read_metrics,
    save_map,
    save_npz,
    write_study,
)
from oracles import softmax

from crfrefine.evaluate import report as report_page
from crfrefine.metrics.registry import CALIBRATION_METRICS, MASK_METRICS
from crfrefine.statistics.harm import Decline
from crfrefine.statistics.paired import detectable_difference

NUM_CASES = 9
REGIONS = {"1": (1,), "2": (2,), "whole": (1, 2)}
NOTHING = np.zeros(SHAPE, bool)


def evaluated(study, *options):
    run_here(*study.arguments, *options, status=0)
    return read_metrics(study.output)


def lines_of(result, start):
    """The lines of the output that begin so."""
    return [line for line in result.stdout.splitlines() if line.startswith(start)]


def describe(study, labels, **more):
    path = study.root / "dataset.json"
    path.write_text(json.dumps({"labels": labels, **more}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A study and its run: probabilities, those of the baseline a hundred times too sharp, a rival
    that is the same, and a report.
    """
    study = write_study(tmp_path_factory.mktemp("judged"), NUM_CASES)
    for case, reference in study.maps["labels"].items():
        for folder, factor in ((study.after, 1), (study.before, 100)):
            save_npz(folder / f"{case}.npz", factor * logits_of(reference, 90 + int(case[-1])))
    result = run_here(
        *study.with_report,
        "-b",
        f"twin={study.after}",
        "-r",
        "whole=1+2",
        "--tolerance",
        "1.25",
        status=0,
    )
    return study, result


def test_every_value_of_the_table_equals_the_brute_force(judged):
    study, _ = judged
    found = read_metrics(study.output)
    cases = [f"case{n}" for n in range(NUM_CASES)]
    methods = ("prediction", "before", "twin")
    all_metrics = (*MASK_METRICS, *CALIBRATION_METRICS)
    keys = {*itertools.product(cases, REGIONS, all_metrics, methods)}
    keys |= {*itertools.product(cases, ["all"], CALIBRATION_METRICS, methods)}
    assert set(found) == keys
    for case in ("case0", "case1"):
        for label, members in REGIONS.items():
            for method, folder in {"prediction": "after", "before": "before"}.items():
                assert_equal(
                    found,
                    case,
                    label,
                    method,
                    study.overlap(case, members, folder, tolerance_mm=1.25),
                )


def test_the_verdict_is_on_the_named_regions_and_asks_about_the_rivals(judged):
    study, result = judged
    told = study.summary()["verdict"]
    lines = result.stdout.splitlines()
    after = np.zeros(NUM_CASES)
    before = np.zeros(NUM_CASES)
    for n in range(NUM_CASES):
        after[n] = study.overlap(f"case{n}", (1, 2), "after")["dice"]
        before[n] = study.overlap(f"case{n}", (1, 2), "before")["dice"]
    assert (after > before).all()
    assert (told["regions"], told["outcome"]) == (["whole"], "not better than simple")
    assert told["comparison"]["mean_difference"] == pytest.approx((after - before).mean())
    # All nine signs agree, and the question is tested alone.
    assert told["p_adjusted"] == told["comparison"]["p_value"] == pytest.approx(2 / 2**9)
    assert ": the prediction is better than before." in lines[-1]
    assert " But not shown to gain more than twin: the prediction +" in lines[-1]
    seen = 100 * detectable_difference((after - before).std(ddof=1), NUM_CASES)
    assert lines[-2] == told["harm"]["sentence"]
    assert lines[-4].startswith(
        "p (Holm): Wilcoxon's signed-rank test, after Holm's correction within each method and "
        "family: endpoint "
    )
    assert lines[-5].startswith("power: with 9 cases")
    assert lines[-5].endswith(
        f", a true difference of {seen:.2f} points would be found with probability 80 %, "
        "a smaller one less often"
    )
    assert sum("Holm's correction" in line for line in lines) == 1, (
        "families of tests are explained once"
    )
    assert "units: differences of dice, surface_dice in points (hundredths)" in lines


def test_the_share_of_what_the_ceiling_leads_by(tmp_path):
    """Against labels as the ceiling Dice goes to 1; the ceiling is no rival, and the tolerance is
    the shortest side of a voxel.
    """
    study = write_study(tmp_path, 6)
    options = ("-b", f"full={study.root / 'labels'}", "--ceiling", "full", "--tolerance", "voxel")
    result = run_here(*study.with_report, *options, status=0)
    told = study.summary()
    side = min(SPACING)
    for metric in ("dice", "surface_dice"):
        means = []
        for folder in ("before", "after"):
            values = np.zeros((6, 2))
            for n, label in np.ndindex(6, 2):
                overlap = study.overlap(f"case{n}", (label + 1,), folder, tolerance_mm=side)
                values[n, label] = overlap[metric]
            means.append(np.nanmean(values, axis=1).mean())
        share = (means[1] - means[0]) / (1 - means[0])
        assert told["recovered"][metric]["mean"] == pytest.approx(share)
        (line,) = lines_of(result, "the prediction recovers")
        assert f"{100 * share:.0f} % of " in line
    assert told["recovered"]["dice"].keys() == {"1", "2", "mean"}
    assert (
        told["verdict"]["outcome"],
        told["verdict"]["rivals"],
        told["settings"]["tolerance_mm"],
    ) == ("helps", [], "voxel")
    assert "of what before loses against full" in (study.output / "report.html").read_text(
        encoding="utf-8"
    )


def test_the_share_of_a_region_is_not_taken_for_that_of_the_mean(tmp_path):
    """The ceiling leads in label 1 and loses more in label 2, so that the mean has no lead."""
    for case in range(3):
        reference = np.zeros((9, 8, 7), np.uint8)
        reference[1:4, 1:6, 1:5] = 1
        reference[5:8, 2 : 6 + case % 2, 2:6] = 2
        maps = {"labels": reference}
        for name, label, row in (("before", 1, 2), ("after", 1, 1), ("full", 2, 5)):
            maps[name] = reference.copy()
            lost = maps[name][row : row + 2]
            lost[lost == label] = 0
        maps["after"][1, 1:6, 1:5] = 1
        for name, values in maps.items():
            save_map(tmp_path / name / f"case{case}.nii.gz", values)
    places = [tmp_path / "after", tmp_path / "labels", "-o", tmp_path / "report", "--no-report"]
    baselines = ["-b", f"before={tmp_path / 'before'}", "-b", f"full={tmp_path / 'full'}"]
    options = ("--ceiling", "full", "--processes", 1)
    result = run_here("evaluate", *places, *baselines, *options, status=0)
    summary = json.loads((tmp_path / "report" / "summary.json").read_text(encoding="utf-8"))
    assert summary["recovered"]["dice"].keys() == {"1"}
    (line,) = lines_of(result, "the prediction recovers")
    assert "% of Dice" not in line


def test_better_probabilities_are_told_in_the_files_and_on_the_page(judged):
    study, result = judged
    told = study.summary()["verdict"]["probabilities"]
    found = read_metrics(study.output)
    assert (told["change"], told["region"]) == ("better", "all")
    before = np.mean([found[f"case{n}", "all", "nll", "before"] for n in range(NUM_CASES)])
    after = np.mean([found[f"case{n}", "all", "nll", "prediction"] for n in range(NUM_CASES)])
    assert told["sentence"].startswith(
        "The probabilities of all labels: better, negative log likelihood "
        f"{before:.5f} → {after:.5f} "
        "(better in 9 of 9 cases, p 0.0039), calibration error (ECE) "
    )
    assert result.stdout.splitlines()[-3] == told["sentence"]
    assert told["sentence"] in (study.output / "report.html").read_text(encoding="utf-8")


def test_the_fields_of_the_summary_are_documented(judged):
    study, _ = judged
    summary = study.summary()
    verdict = summary["verdict"]
    row = next(row for row in summary["summary"] if row["comparison"])
    text = (Path(__file__).parents[2] / "docs" / "reference" / "summary.md").read_text()
    parts = (
        summary,
        verdict,
        verdict["rivals"][0],
        verdict["comparison"],
        row,
        row["comparison"],
        summary["cases"][0],
        verdict["harm"],
    )
    for part in (*parts, [field.name for field in dataclasses.fields(Decline)]):
        for name in part:
            assert f"`{name}`" in text


def test_probabilities_are_found_and_their_calibration_equals_the_brute_force(tmp_path):
    """Each case has them in another way; in the last one, the fourth label is never the likeliest.
    Those of the baseline are named.
    """
    kinds = ("npz", "npz beside", "4-D", "4-D probabilities", "beside", "four labels")
    study = write_study(tmp_path, len(kinds))
    expected = []
    for number, (kind, (case, reference)) in enumerate(
        zip(kinds, study.maps["labels"].items(), strict=True)
    ):
        path = study.after / f"{case}.nii.gz"
        logits = logits_of(reference, number + 90, num_labels=4 if kind == "four labels" else 3)
        if kind == "four labels":
            logits[3] -= 20
        if kind in ("4-D probabilities", "beside"):
            stored = softmax(logits).astype(np.float32)
        else:
            stored = logits
        if kind in ("npz", "4-D", "4-D probabilities"):
            path.unlink()
            study.maps["after"][case] = logits.argmax(axis=0)
        if kind.startswith("4-D"):
            save_map(path, np.moveaxis(stored, 0, -1))
        elif kind == "beside":
            save_map(study.after / f"{case}_probabilities.nii.gz", np.moveaxis(stored, 0, -1))
            save_map(
                study.after / f"{case}_logits.nii.gz", np.moveaxis(100 * logits, 0, -1)
            )  # of another softmax: not to be taken
            (study.after / f"{case}_preview.png").write_bytes(b"a picture")
        else:
            save_npz(study.after / f"{case}.npz", stored)
        expected.append(softmax(logits))
    # A file for each label; zeros for all labels, around a cropped output, are certain background.
    cropped = softmax(logits_of(study.maps["labels"]["case0"], 1)).astype(np.float32)
    cropped[:, :, :2] = 0.0
    for label in range(3):
        save_map(tmp_path / "scores" / f"case0_ProbMapClass{label}.mha", cropped[label])
    cropped[0, :, :2] = 1.0
    result = run_here(
        *study.arguments,
        "--probabilities",
        f"before={tmp_path / 'scores'}",
        "-r",
        "whole=1+2",
        status=0,
    )
    assert "without a reference" not in result.stderr
    assert (
        "scores for 5 of 6 cases, such as case1; the calibration of before covers the others"
        in result.stderr
    )
    found = read_metrics(study.output)
    for (case, reference), probabilities in zip(
        study.maps["labels"].items(), expected, strict=True
    ):
        for label, members in REGIONS.items():
            of_region = expected_calibration(
                probabilities[list(members)].sum(axis=0), np.isin(reference, members)
            )
            assert_equal(found, case, label, "prediction", of_region | study.overlap(case, members))
        assert_equal(
            found, case, "all", "prediction", expected_calibration_of_all(probabilities, reference)
        )
    assert not [key for key in found if key[1] == "all" and key[2] not in CALIBRATION_METRICS]
    assert_equal(
        found,
        "case0",
        "all",
        "before",
        expected_calibration_of_all(cropped, study.maps["labels"]["case0"]),
    )
    assert all(np.isnan(found["case1", label, "ece", "before"]) for label in ("all", "1"))
    assert_equal(
        found,
        "case5",
        "3",
        "prediction",
        expected_overlap(NOTHING, NOTHING) | expected_calibration(expected[5][3], NOTHING),
    )
    assert_equal(found, "case0", "3", "prediction", dict.fromkeys(CALIBRATION_METRICS, 0.0))


def test_empty_masks_are_counted_apart_and_never_dropped(tmp_path):
    """Of label 2, case0 has it in neither map, case1 only in the reference, case2 only in the
    prediction; label 7 in one reference.
    """
    study = write_study(tmp_path, 3)
    for case, name in (
        ("case0", "labels"),
        ("case0", "after"),
        ("case1", "after"),
        ("case2", "labels"),
    ):
        study.maps[name][case][study.maps[name][case] == 2] = 0
    study.maps["labels"]["case1"][0, 0, :2] = 7
    for name in ("labels", "after"):
        for case, values in study.maps[name].items():
            save_map(tmp_path / name / f"{case}.nii.gz", values)
    result = run_here(*study.arguments, status=0)
    found = read_metrics(study.output)
    for case in study.maps["labels"]:
        for label in (1, 2, 7):
            assert_equal(found, case, str(label), "prediction", study.overlap(case, (label,)))
    lines = set((study.output / "metrics.csv").read_text().splitlines())
    assert {
        "case0,2,dice,,prediction",
        "case1,2,dice,0.0,prediction",
        "case1,2,hd_mm,,prediction",
    } <= lines
    assert {
        "case2,2,dice,0.0,prediction",
        "case2,2,sensitivity,,prediction",
        "case0,7,num_components,0.0,prediction",
    } <= lines
    counts = study.summary()["empty_masks"]
    for label, method, numbers in (
        ("2", "prediction", (2, 2, 1, 3)),
        ("1", "prediction", (0, 0, 0, 3)),
        ("7", "before", (2, 3, 2, 3)),
    ):
        assert counts[label][method] == dict(
            zip(("reference", "prediction", "both", "num_cases"), numbers, strict=True)
        )
    assert (
        "empty masks: 2: prediction of 3 cases: 1 without it in both maps, 1 missed, 1 false alarms"
        in result.stdout
    )
    assert (
        "empty masks: 7: prediction of 3 cases: 2 without it in both maps, 1 missed, 0 false alarms"
        in result.stdout
    )
    assert "empty masks: 1:" not in result.stdout
    assert study.summary()["power_note"] is None
    assert ": too few cases, at least 6 are needed" in result.stdout.splitlines()[-1]
    quiet = run_here(*study.arguments, "-q")
    assert (quiet.stderr, quiet.stdout) == ("", result.stdout.splitlines(keepends=True)[-1])


@pytest.mark.parametrize("has_baseline", [True, False])
def test_predictions_without_foreground_are_named(tmp_path, has_baseline):
    """Of case0, the reference is empty, too; case2 lacks only one of its labels."""
    study = write_study(tmp_path, 4)
    for name, case, labels in (
        ("labels", 0, (1, 2)),
        ("after", 0, (1, 2)),
        ("after", 1, (1, 2)),
        ("after", 2, (2,)),
        ("after", 3, (1, 2)),
    ):
        values = study.maps[name][f"case{case}"]
        values[np.isin(values, labels)] = 0
        save_map(tmp_path / name / f"case{case}.nii.gz", values)
    arguments = list(study.arguments)
    if not has_baseline:
        arguments.remove("-b")
        arguments.remove(f"before={study.before}")
    result = run_here(*arguments, status=0)
    note = (
        "prediction has no foreground in 2 of 4 cases though the reference has some: case1, case3."
    )
    assert f"note: {note}\n" in result.stdout
    summary = study.summary()
    assert summary["empty_predictions"] == {"prediction": ["case1", "case3"]}
    if has_baseline:
        assert note in summary["verdict"]["notes"]
    else:
        assert summary["verdict"] is None


def test_dataset_json_names_labels_regions_and_what_to_ignore(tmp_path):
    """The prediction has a label under the ignored voxels that occurs nowhere else: no region of
    its own.
    """
    study = write_study(tmp_path, 1)
    describe(study, {"background": 0, "core": 1, "rim": 2, "rare": 3, "ignore": 4})
    marked = study.maps["labels"]["case0"]
    found = study.maps["after"]["case0"]
    logits = logits_of(marked, 8, 4)
    for folder, values, ignored in ((study.labels, marked, 4), (study.after, found, 5)):
        values[3:9, 2:6, 1:4] = ignored
        save_map(folder / "case0.nii.gz", values)
    save_npz(study.after / "case0.npz", logits)
    measured = evaluated(study, "-r", "whole=1+2")
    counts = marked != 4
    assert {label for _, label, *_ in measured} == {"1", "2", "3", "whole", "all"}
    for label, members in (("2", (2,)), ("3", (3,)), ("whole", (1, 2))):
        mask = np.isin(found, members) & counts
        reference = np.isin(marked, members) & counts
        expected = expected_overlap(mask, reference)
        assert_equal(measured, "case0", label, "prediction", expected)
    probabilities = softmax(logits)[:, counts]
    assert_equal(
        measured,
        "case0",
        "1",
        "prediction",
        expected_calibration(probabilities[1], marked[counts] == 1),
    )
    assert_equal(
        measured,
        "case0",
        "all",
        "prediction",
        expected_calibration_of_all(probabilities, marked[counts]),
    )
    summary = study.summary()
    assert (
        summary["judged_regions"],
        summary["settings"]["ignore_label"],
        summary["titles"]["1"],
    ) == (["whole"], 4, "1 core")
    assert summary["regions"] == {"1": [1], "2": [2], "3": [3], "whole": [1, 2]}
    evaluated(study, "--ignore-label", 3)
    assert study.summary()["settings"]["ignore_label"] == 3


def test_a_label_among_the_regions_of_dataset_json_is_there_once(tmp_path):
    """Of region-based training, or asked for by its name: one row `2 rim`, and none `rim`."""
    study = write_study(tmp_path, 2)
    describe(study, {"background": 0, "whole": [1, 2], "rim": 2}, regions_class_order=[1, 2])
    evaluated(study)
    summary = study.summary()
    assert summary["regions"] == {"1": [1], "2": [2], "whole": [1, 2]}
    assert (summary["titles"]["2"], summary["judged_regions"]) == ("2 rim", ["whole", "2"])
    describe(study, {"background": 0, "core": 1, "rim": 2})
    result = run_here(*study.arguments, "-r", "rim=2", "-r", "whole=1+2", "-r", "back=2")
    summary = study.summary()
    assert summary["regions"] == {"1": [1], "2": [2], "whole": [1, 2], "back": [2]}
    assert summary["judged_regions"] == ["2", "whole", "back"]
    shown = [line.split("\t")[1] for line in lines_of(result, "dice\t")]
    assert shown == ["1 core", "2 rim", "whole", "back", "mean"]


def test_a_slice_is_measured_as_a_plane(tmp_path):
    """Without a baseline. Were the third axis one, each voxel would be boundary and lie on the
    other map's or next to it.
    """
    study = Study(tmp_path, {})
    full = np.ones((*SHAPE[:2], 1), np.uint8)
    for folder, values in (
        (study.labels, full),
        (study.after, full * (np.arange(SHAPE[0]) < 9)[:, None, None]),
    ):
        save_map(folder / "a.nii.gz", values.astype(np.uint8))
    arguments = ("evaluate", study.after, study.labels, "--processes", 1, "-o", study.output)
    result = run_here(*arguments, status=0)
    found = read_metrics(study.output)
    assert {method for *_, method in found} == {"prediction"}
    assert (
        found["a", "1", "hd_mm", "prediction"],
        found["a", "1", "dice", "prediction"],
    ) == pytest.approx((4 * 0.8, 18 / 22))
    assert "verdict" not in result.stdout
    (dice,) = lines_of(result, "dice\t1\t")
    assert dice.split("\t")[4:] == ["0.8182", "0.8182"], "mean and median"
    summary = study.summary()
    assert (summary["verdict"], summary["settings"]["baseline"]) == (None, None)
    assert "<!DOCTYPE html>" in (study.output / "report.html").read_text(encoding="utf-8")
    assert "report.html is from an earlier run" in run_here(*arguments, "--no-report").stderr


def test_the_report_shows_cases_with_and_without_an_image(tmp_path, monkeypatch):
    """The names are those of `dataset.json`."""
    study = write_study(tmp_path)
    images = tmp_path / "images"
    spy = Mock(wraps=report_page.draw_preview)
    monkeypatch.setattr(report_page, "draw_preview", spy)
    for seed, (case, reference) in enumerate(study.maps["labels"].items()):
        noise = np.random.default_rng(seed).normal(0, 1, (3, *reference.shape)).astype(np.float32)
        noise[1] += 40 * (reference > 0)
        if case == "case0":
            save_map(images / f"{case}.nii.gz", np.moveaxis(noise, 0, -1))
        if case == "case1":
            for modality, values in enumerate(noise):
                save_map(images / f"{case}_{modality:04d}.nii.gz", values)
    save_map(images / "case1_0000.nii.gz", np.zeros((5, *SHAPE[1:]), np.float32))
    description = {
        "channel_names": {"0": "T1", "1": "<FLAIR>", "2": "T2"},
        "labels": {"background": 0, "edema": 1, "core": 2},
    }
    (tmp_path / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    result = run_here(*study.with_report, "--images", images, "-r", "whole=1+2", status=0)
    assert "case 'case1': shown without case1_0000.nii.gz: " in result.stderr
    assert result.stderr.count("shown without") == 1, "the other modalities are on the grid"
    assert "images for 1 of 3 cases, such as case2" in result.stderr
    assert files_in(study.output) == ["metrics.csv", "report.html", "summary.json"]
    page = (study.output / "report.html").read_text(encoding="utf-8")
    for text in ("too few cases, at least 6", "whole", str(images)):
        assert text in page
    assert page.count('class="picture"') == 3
    shown = {}
    for call in spy.call_args_list:
        image = call.args[0]
        num_modalities = None if image is None else len(image)
        shown[call.kwargs["title"]] = (num_modalities, call.kwargs["modality_names"])
    assert shown == {
        "case0": (3, ("T1", "<FLAIR>", "T2")),
        "case1": (2, ("<FLAIR>", "T2")),
        "case2": (None, ()),
    }
    label_names = spy.call_args_list[0].kwargs["label_names"]
    assert label_names == {1: "1 edema", 2: "2 core"}
