"""Folders that hold one binary file per structure: one case each, whose labels have names."""

import json

import numpy as np
import pytest
from cli_helpers import load_nifti, run_here, save_nifti
from evaluation_helpers import SHAPE, affine, disturbed, label_map

from crfrefine.evaluate.options import EvaluationOptions
from crfrefine.evaluate.pairing import pair_cases

NAMES = {"aorta": 1, "kidney_left": 2, "kidney_right": 3, "nothing": 4}


def write_structures(folder, labels, names=NAMES):
    for name, number in names.items():
        save_nifti(folder / f"{name}.nii.gz", (labels == number).astype(np.uint8), affine())


@pytest.fixture
def study(tmp_path):
    for seed, case_id in enumerate(("p1", "p2")):
        reference = label_map(seed, (1, 2, 3))
        write_structures(tmp_path / "ref" / case_id, reference)
        write_structures(tmp_path / "pred" / case_id, disturbed(reference, seed, 0.2))
    return tmp_path


def evaluate(study, predictions, labels, *options, status=0):
    result = run_here("evaluate", predictions, labels, "-o", study / "report", "--processes", 1, *options, status=status)
    return result, json.loads((study / "report" / "summary.json").read_text())


def dice(study, case_id, name):
    one, other = (load_nifti(study / what / case_id / f"{name}.nii.gz") != 0 for what in ("pred", "ref"))
    return 2 * (one & other).sum() / (one.sum() + other.sum())


def mean_dice(summary):
    return {row["region"]: row["mean"] for row in summary["summary"] if row["metric"] == "dice"}


def test_a_folder_per_case_has_named_labels(study):
    """A structure that is nowhere has no row."""
    result, summary = evaluate(study, study / "pred", study / "ref")
    assert "4 structures in 2 cases" in result.stderr
    assert [case["case"] for case in summary["cases"]] == ["p1", "p2"]
    assert list(summary["regions"]) == ["1", "2", "3"]
    assert summary["titles"]["2"] == "2 kidney_left"
    for name, number in list(NAMES.items())[:3]:
        expected = np.mean([dice(study, case_id, name) for case_id in ("p1", "p2")])
        assert mean_dice(summary)[str(number)] == pytest.approx(expected, rel=1e-12)


def test_two_flat_folders_are_one_case_on_request(study):
    _, summary = evaluate(study, study / "pred" / "p1", study / "ref" / "p1", "--structures")
    assert [case["case"] for case in summary["cases"]] == ["p1"]
    assert mean_dice(summary)["1"] == pytest.approx(dice(study, "p1", "aorta"), rel=1e-12)
    assert len((study / "report" / "report.html").read_bytes()) < 2_000_000
    _, summary = evaluate(study, study / "pred" / "p1", study / "ref" / "p1", "--no-report")
    assert [case["case"] for case in summary["cases"]] == ["aorta", "kidney_left", "kidney_right", "nothing"]


def test_a_label_map_with_names_is_compared_by_name(study):
    numbers = {"kidney_right": 1, "aorta": 2, "nothing": 3, "kidney_left": 7}
    for case_id in ("p1", "p2"):
        labels = np.zeros(SHAPE, np.uint8)
        for name, number in numbers.items():
            labels[load_nifti(study / "pred" / case_id / f"{name}.nii.gz") != 0] = number
        save_nifti(study / "maps" / f"{case_id}.nii.gz", labels, affine())
    (study / "maps" / "dataset.json").write_text(json.dumps({"labels": {"background": 0, **numbers}}))
    by_name, plain = (evaluate(study, study / folder, study / "ref", "--no-report")[1] for folder in ("maps", "pred"))
    assert mean_dice(by_name) == mean_dice(plain)
    (study / "maps" / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "aorta": 2}}))
    result, _ = evaluate(study, study / "maps", study / "ref", "--no-report", status=1)
    assert "has no name in dataset.json" in result.stderr
    (study / "maps" / "dataset.json").unlink()
    result, _ = evaluate(study, study / "maps" / "p1.nii.gz", study / "ref" / "p1", "--no-report", "--structures", status=1)
    assert "compared with structures by the names of its labels; expected a dataset.json" in result.stderr


def test_incomplete_cases_are_left_out(study):
    (study / "pred" / "p2").rename(study / "pred" / "p3")
    pairing = pair_cases(EvaluationOptions(study / "pred", study / "ref", study / "report"))
    assert [pair.case_id for pair in pairing.cases] == ["p1"]
    expected = {"p2": [f"no prediction in {study / 'pred'}"], "p3": [f"no label map in {study / 'ref'}"]}
    assert pairing.left_out == expected


def test_a_union_that_its_parts_cover_is_named_on_both_sides(study):
    """Its parts keep all of its voxels in reference and prediction alike, so that it has no value in any case."""
    for what in ("ref", "pred"):
        for case_id in ("p1", "p2"):
            parts = [load_nifti(study / what / case_id / f"kidney_{side}.nii.gz") for side in ("left", "right")]
            save_nifti(study / what / case_id / "kidneys.nii.gz", np.maximum(*parts), affine())
    result, summary = evaluate(study, study / "pred", study / "ref", "--structures", "--no-report")
    told = "structures that lose most of their voxels to smaller ones: kidneys keeps 0 of "
    for part in ("reference", "prediction"):
        assert result.stderr.count(f"note: case 'p1': {part}: {told}") == 1
        assert all(any(note.startswith(f"{part}: {told}") for note in case["notes"]) for case in summary["cases"])
    assert "case 'p2'" not in result.stderr, "once per side"


def test_of_many_structures_the_terminal_shows_means(tmp_path):
    labels = np.arange(np.prod(SHAPE)).reshape(SHAPE) % 25
    names = {f"organ_{chr(97 + number)}": number for number in range(1, 25)}
    for what, found in (("pred", np.roll(labels, 1, axis=1)), ("ref", labels)):
        write_structures(tmp_path / what, np.where(np.indices(SHAPE)[0] < 9, found, labels), names)
    arguments = (tmp_path, tmp_path / "pred", tmp_path / "ref", "--structures", "--no-report")
    result, summary = evaluate(*arguments)
    assert "24 regions: the table has their means" in result.stderr
    assert [line.split("\t")[1] for line in result.stdout.splitlines()[1:]] == ["mean"] * 4
    assert len(summary["regions"]) == 24
    assert len([line for line in evaluate(*arguments, "-v")[0].stdout.splitlines() if line.startswith("dice")]) == 25
