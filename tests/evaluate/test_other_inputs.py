"""`evaluate` on sigmoid channels of regions, and on folders that hold one binary file per structure, whose labels have names."""

import json

import numpy as np
import pytest
from cli_helpers import load_nifti, run_here, save_nifti
from evaluation_helpers import SHAPE, affine, disturbed, label_map, read_metrics, save_map, save_npz, write_study

from crfrefine import RegionScheme
from crfrefine.evaluate.options import EvaluationOptions
from crfrefine.evaluate.pairing import pair_cases
from crfrefine.metrics.calibration import measure_calibration

SCHEME = RegionScheme.of({"whole": [1, 2], "core": 2})
DESCRIPTION = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}


def sigmoids(study, case):
    """Channels that mostly say what a label map says; exactly zero in a corner, as nnU-Net pads its crop."""
    inside = np.stack([np.isin(study.maps["after"][case], members) for members in SCHEME.labels])
    noise = np.random.default_rng(3).uniform(0.02, 0.65, (2, *SHAPE))
    values = np.where(inside, 1 - noise, noise).astype(np.float32)
    values[:, :2, :3] = 0.0
    return values


def dice(found, reference, members=1):
    a, b = np.isin(found, members), np.isin(reference, members)
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def brier(probabilities, truth):
    return pytest.approx(np.mean((probabilities.astype(float) - truth) ** 2), rel=1e-5)


def test_channels_become_a_label_map_and_are_calibrated(tmp_path):
    """Of an archive, of NIfTI, and as log-odds; another description of the channels means another measurement."""
    study = write_study(tmp_path, 3)
    for folder in (study.labels, study.after):
        (folder / "dataset.json").write_text(json.dumps(DESCRIPTION))
    for case in study.maps["after"]:
        values, path = sigmoids(study, case), study.after / f"{case}.nii.gz"
        if case == "case0":
            path.unlink()
            save_npz(study.after / f"{case}.npz", values, "probabilities")
        else:
            log_odds = np.log(np.maximum(values, 1e-6)) - np.log1p(-values)
            save_map(path, np.moveaxis(log_odds if case == "case2" else values, 0, -1).astype(np.float32))
    result = run_here(*study.arguments, status=0)
    found = read_metrics(study.output)
    for case, reference in study.maps["labels"].items():
        values = sigmoids(study, case).astype(float)
        labels = SCHEME.decode(values - 0.5)
        for name, members in (("whole", (1, 2)), ("2", (2,)), ("1", (1,))):
            assert found[case, name, "dice", "prediction"] == pytest.approx(dice(labels, reference, members))
        for name, channel, members in (("whole", 0, (1, 2)), ("2", 1, (2,))):
            assert found[case, name, "brier", "prediction"] == brier(values[channel], np.isin(reference, members))
        assert np.isnan([found[case, name, "brier", "prediction"] for name in ("1", "all")]).all(), "no channel is label 1 alone"
    assert result.stdout.count("whole") > 0
    (study.after / "dataset.json").write_text(json.dumps({**DESCRIPTION, "regions_class_order": [2, 2]}))
    assert run_here(*study.arguments).status == 0
    assert found["case0", "1", "dice", "prediction"] > 0 == read_metrics(study.output)["case0", "1", "dice", "prediction"]


def test_probabilities_beside_label_maps_are_calibrated(tmp_path):
    """nnU-Net's label maps with its .npz; the description is that of the reference. Voxels of an ignored label do not count."""
    study = write_study(tmp_path, 1)
    (study.root / "dataset.json").write_text(json.dumps(DESCRIPTION))
    values = sigmoids(study, "case0")
    save_npz(study.after / "case0.npz", values, "probabilities")
    reference = study.maps["labels"]["case0"].copy()
    reference[:, :, 5:] = 3
    save_map(study.labels / "case0.nii.gz", reference)
    run_here(*study.with_report, "--ignore-label", 3, status=0)
    found, counted = read_metrics(study.output), np.s_[:, :, :5]
    expected = dice(study.maps["after"]["case0"][counted], reference[counted], (1, 2))
    assert found["case0", "whole", "dice", "prediction"] == pytest.approx(expected)
    assert found["case0", "whole", "brier", "prediction"] == brier(values[0][counted], np.isin(reference, (1, 2))[counted])
    inside, both = np.where(reference < 3, reference > 0, 3).astype(np.uint8), np.stack([1 - values[0], values[0]])
    for metric, value in measure_calibration(both, inside, {"1": (1,)}, ignore_label=3)["1"].items():
        assert found["case0", "whole", metric, "prediction"] == pytest.approx(value, rel=1e-5), metric
    assert (study.output / "report.html").exists()


def test_the_channel_of_a_single_region_is_no_label_map(tmp_path):
    """A file has one value per voxel then; the other method's label maps stay label maps, also as floating-point numbers."""
    study = write_study(tmp_path, 1)
    (study.root / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "whole": [1, 2]}, "regions_class_order": [1]}))
    values, reference = sigmoids(study, "case0")[0], study.maps["labels"]["case0"]
    save_map(study.after / "case0.nii.gz", values)
    save_map(study.before / "case0.nii.gz", study.maps["before"]["case0"].astype(np.float32))
    run_here(*study.arguments, status=0)
    found = read_metrics(study.output)
    assert found["case0", "whole", "dice", "prediction"] == pytest.approx(dice(values > 0.5, reference > 0, (1,)))
    assert found["case0", "whole", "brier", "prediction"] == brier(values, reference > 0)
    assert found["case0", "2", "dice", "before"] == pytest.approx(dice(study.maps["before"]["case0"], reference, (2,)))


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


def dice_of_files(study, case_id, name):
    return dice(*(load_nifti(study / what / case_id / f"{name}.nii.gz") for what in ("pred", "ref")))


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
        expected = np.mean([dice_of_files(study, case_id, name) for case_id in ("p1", "p2")])
        assert mean_dice(summary)[str(number)] == pytest.approx(expected, rel=1e-12)


def test_two_flat_folders_are_one_case_on_request(study):
    _, summary = evaluate(study, study / "pred" / "p1", study / "ref" / "p1", "--structures")
    assert [case["case"] for case in summary["cases"]] == ["p1"]
    assert mean_dice(summary)["1"] == pytest.approx(dice_of_files(study, "p1", "aorta"), rel=1e-12)
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
