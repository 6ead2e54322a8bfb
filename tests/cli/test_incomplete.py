"""Half-finished cross-validations: `train-crf` and `evaluate` take the cases that are complete and say what the others lack."""

import json

import pytest
from cli_helpers import files_in, run_here
from evaluation_helpers import read_metrics, write_study
from training_helpers import shorten, write_cases


@pytest.fixture
def half(tmp_path):
    folder = write_cases(tmp_path / "half", 7)
    for case in LACKING:
        (folder / "logits" / f"{case}.nii.gz").unlink()
    return folder


LACKING, DONE = [f"case{number}" for number in range(2, 7)], ["case0", "case1"]


@pytest.mark.long
def test_training_takes_the_cases_that_are_complete(half, tmp_path, monkeypatch):
    shorten(monkeypatch)
    result = run_here("train-crf", half, "-o", tmp_path / "p.toml", "--folds", 2, "--num-iterations", 1, status=0)
    assert f"note: 5 of 7 cases are left out: no logits in {half / 'logits'} (5): case2, case3, case4 and 2 more\n" in result.stderr
    assert "2 cases, 4 labels" in result.stderr
    report = json.loads((tmp_path / "p.report.json").read_text())
    assert report["cases"] == DONE
    assert report["left_out"] == [{"case": name, "reasons": [f"no logits in {half / 'logits'}"]} for name in LACKING]
    assert {line["case"] for line in report["measurements"]} == set(DONE)
    head = (tmp_path / "p.toml").read_text()
    assert "2 cases, 2 cross-validation folds" in head
    assert "5 further cases were left out" in head


def test_strict_training_refuses_and_names_every_case(half, tmp_path):
    result = run_here("train-crf", half, "-o", tmp_path / "new" / "p.toml", "--strict", status=1)
    assert "crfrefine: error: 5 of 7 cases are incomplete, which --strict refuses:\n" in result.stderr
    assert f"  no logits in {half / 'logits'} (5): {', '.join(LACKING)}\n" in result.stderr
    (half / "logits" / "case1.nii.gz").write_bytes(b"not an image")
    result = run_here("train-crf", half, "-o", tmp_path / "new" / "p.toml", status=1)
    assert "logits/case1.nii.gz" in result.stderr
    assert "cases are left out" not in result.stderr
    assert files_in(tmp_path / "new") == []


@pytest.fixture
def study(tmp_path):
    """Six cases, of which case 1 lacks its prediction, case 2 its baseline, case 3 its reference."""
    study = write_study(tmp_path, 6)
    for path in (study.after / "case1.nii.gz", study.before / "case2.nii.gz", study.labels / "case3.nii.gz"):
        path.unlink()
    return study


def test_evaluate_is_over_the_cases_that_every_method_has(study):
    reasons = {
        "case1": f"no prediction in {study.after}",
        "case2": f"no prediction in {study.before}",
        "case3": f"no label map in {study.labels}",
    }
    result = run_here(*study.arguments, "--strict", status=1)
    assert "crfrefine: error: 3 of 6 cases are incomplete, which --strict refuses:\n" in result.stderr
    assert not study.output.exists()
    (study.after / "case4.nii.gz").write_bytes(b"not an image")
    result = run_here(*(argument for argument in study.arguments if argument != "--no-report"), status=1)
    assert result.stderr.splitlines()[-1] == "failed: case4 (1 of 3 cases)"
    said = "3 of 6 cases are left out: " + "; ".join(f"{reason} (1): {case}" for case, reason in reasons.items())
    assert f"note: {said}\n" in result.stderr
    assert f"<li>{said}" in (study.output / "report.html").read_text()
    assert {case for case, _, _, name in read_metrics(study.output) if name == "prediction"} == {"case0", "case5"}
    summary = study.summary()
    assert summary["left_out"] == [{"case": case, "reasons": [reason]} for case, reason in reasons.items()]
    assert (summary["num_cases"], summary["num_failed"], summary["num_left_out"]) == (3, 1, 3)
    assert [failure["case"] for failure in summary["failures"]] == ["case4"]
    comparison = summary["verdict"]["comparison"]
    assert (comparison["num_pairs"], comparison["num_only_baseline"], comparison["num_only_method"]) == (2, 0, 0)
