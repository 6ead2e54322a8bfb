"""Half-finished cross-validations: `train-crf` and `evaluate` take the cases that are complete and say what the others lack."""

import json
import shutil

import numpy as np
import pytest
from cli_helpers import files_in, run_here
from evaluation_helpers import SHAPE, read_metrics, save_map, save_npz, softmax, write_study
from training_helpers import write_cases


@pytest.fixture
def half(tmp_path):
    """Thirteen cases; the network has seen to four of them."""
    folder = write_cases(tmp_path / "half", 13)
    for number in range(4, 13):
        (folder / "logits" / f"case{number}.nii.gz").unlink()
    return folder


LACKING = sorted(f"case{number}" for number in range(4, 13))
DONE = [f"case{number}" for number in range(4)]


@pytest.mark.long
def test_training_takes_the_cases_that_are_complete(half, tmp_path):
    result = run_here("train-crf", half, "-o", tmp_path / "p.toml", "--folds", 2, "--num-iterations", 1)
    assert result.status == 0, result.stderr
    said = f"note: 9 of 13 cases are left out: no logits in {half / 'logits'} (9): case10, case11, case12 and 6 more\n"
    assert said in result.stderr
    assert "4 cases, 4 labels" in result.stderr
    report = json.loads((tmp_path / "p.report.json").read_text())
    assert report["cases"] == DONE
    assert report["left_out"] == [{"case": name, "reasons": [f"no logits in {half / 'logits'}"]} for name in LACKING]
    assert {line["case"] for line in report["measurements"]} == set(DONE)
    head = (tmp_path / "p.toml").read_text()
    assert "4 cases, 2 folds" in head
    assert "9 further cases were left out" in head


def test_strict_training_refuses_and_names_every_case(half, tmp_path):
    result = run_here("train-crf", half, "-o", tmp_path / "new" / "p.toml", "--strict")
    assert result.status == 1
    assert "crfrefine: error: 9 of 13 cases are incomplete, which --strict refuses:\n" in result.stderr
    assert f"  no logits in {half / 'logits'} (9): {', '.join(LACKING)}\n" in result.stderr
    assert files_in(tmp_path / "new") == []


def test_a_damaged_file_is_an_error_in_training_even_if_other_cases_are_left_out(half, tmp_path):
    (half / "logits" / "case2.nii.gz").write_bytes(b"not an image")
    result = run_here("train-crf", half, "-o", tmp_path / "p.toml")
    assert result.status == 1
    assert "logits/case2.nii.gz" in result.stderr
    assert "cases are left out" not in result.stderr
    assert not (tmp_path / "p.toml").exists()


def test_info_names_each_incomplete_case_of_a_study(half):
    (half / "labels" / "case8.nii.gz").unlink()
    for path in (half / "images").glob("case3_*"):
        path.unlink()
    result = run_here("info", half)
    assert result.status == 1
    assert result.stdout.splitlines()[0] == f"{half}: 3 cases in order, 10 problems"
    wrong = [line for line in result.stdout.splitlines() if line.startswith("  wrong: case ")]
    assert sorted(line.split("'")[1] for line in wrong) == sorted([*LACKING, "case3"])
    (both,) = (line for line in wrong if "'case8'" in line)
    assert f"no logits in {half / 'logits'}; expected case8.nii.gz, " in both
    assert both.endswith(f"; no labels in {half / 'labels'}")
    assert run_here("info", half / "images").status == 0  # The images alone are well, and no reason to go on.
    shutil.rmtree(half / "logits")
    said = f"  note: {half}: no case has logits: there is no folder {half / 'logits'}, which train-crf needs\n"
    assert said in run_here("info", half).stdout


@pytest.fixture
def study(tmp_path):
    """Nine cases, of which case 1 lacks its prediction, case 2 its baseline, case 3 its reference."""
    study = write_study(tmp_path, 9)
    for path in (study.after / "case1.nii.gz", study.before / "case2.nii.gz", study.labels / "case3.nii.gz"):
        path.unlink()
    return study


def test_evaluate_is_over_the_cases_that_every_method_has(study):
    """The page of the report says which are left out."""
    result = run_here(*(argument for argument in study.arguments if argument != "--no-report"))
    assert result.status == 0, result.stderr
    reasons = {
        "case1": f"no prediction in {study.after}",
        "case2": f"no prediction in {study.before}",
        "case3": f"no label map in {study.labels}",
    }
    said = "; ".join(f"{reason} (1): {case}" for case, reason in reasons.items())
    assert f"note: 3 of 9 cases are left out: {said}\n" in result.stderr
    assert f"<li>3 of 9 cases are left out: no prediction in {study.after} (1): case1; " in (study.output / "report.html").read_text()
    assert "failed" not in result.stderr
    whole = {(f"case{number}", name) for number in (0, 4, 5, 6, 7, 8) for name in ("prediction", "before")}
    assert {(case, name) for case, _, _, name in read_metrics(study.output)} == whole
    summary = json.loads((study.output / "summary.json").read_text())
    assert summary["left_out"] == [{"case": case, "reasons": [reason]} for case, reason in reasons.items()]
    assert (summary["num_cases"], summary["num_failed"], summary["num_left_out"]) == (6, 0, 3)
    comparison = summary["verdict"]["comparison"]
    assert (comparison["num_pairs"], comparison["num_only_baseline"], comparison["num_only_method"]) == (6, 0, 0)


def test_a_case_that_fails_is_still_a_failure_beside_those_left_out(study):
    (study.after / "case4.nii.gz").write_bytes(b"not an image")
    result = run_here(*study.arguments)
    assert result.status == 1
    assert result.stderr.splitlines()[-1] == "failed: case4 (1 of 6 cases)"
    summary = json.loads((study.output / "summary.json").read_text())
    assert (summary["num_cases"], summary["num_failed"], summary["num_left_out"]) == (6, 1, 3)
    assert [failure["case"] for failure in summary["failures"]] == ["case4"]


def test_strict_evaluation_refuses_and_writes_nothing(study):
    result = run_here(*study.arguments, "--strict")
    assert result.status == 1
    assert "crfrefine: error: 3 of 9 cases are incomplete, which --strict refuses:\n" in result.stderr
    for line in (f"no prediction in {study.after} (1): case1", f"no label map in {study.labels} (1): case3"):
        assert f"  {line}\n" in result.stderr
    assert not study.output.exists()
    for number in (1, 2, 3):
        for folder in (study.labels, study.after, study.before):
            (folder / f"case{number}.nii.gz").unlink(missing_ok=True)
    assert run_here(*study.arguments, "--strict").status == 0


def test_strict_also_asks_for_named_probabilities_and_images(tmp_path):
    study = write_study(tmp_path, 2)
    save_npz(tmp_path / "scores" / "case0.npz", softmax(np.zeros((3, *SHAPE))).astype(np.float32), "probabilities")
    save_map(tmp_path / "images" / "case1.nii.gz", np.ones(SHAPE, np.float32))
    result = run_here(*study.arguments, "--strict", "-i", tmp_path / "images", "--probabilities", f"before={tmp_path / 'scores'}")
    assert result.status == 1
    assert f"  no image in {tmp_path / 'images'} (1): case0\n  no probabilities in {tmp_path / 'scores'} (1): case1\n" in result.stderr


def test_where_no_case_is_complete_the_error_says_what_each_side_lacks(tmp_path):
    study = write_study(tmp_path, 2)
    for number in (0, 1):
        (study.after / f"case{number}.nii.gz").rename(study.after / f"other{number}.nii.gz")
    result = run_here(*study.arguments)
    assert result.status == 1
    assert "crfrefine: error: no case is complete; expected cases with one name in the labels and in every method\n" in result.stderr
    assert f"  no prediction in {study.after} (2): case0, case1\n" in result.stderr
    assert f"  no label map in {study.labels} (2): other0, other1\n" in result.stderr
    assert not study.output.exists()
