"""`--resample` of infer and evaluate, from folders to files."""

import json

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from cli_helpers import AFFINE, GRID_SHAPE, infer, load_nifti, run_here, write_folders
from evaluation_helpers import SHAPE, affine, expected_overlap, logits_of, read_metrics, write_study
from io_helpers import itk_resampled
from io_helpers import save_nifti as save_on
from oracles import softmax

from crfrefine.refinement import networks

COARSE = (11, 9, 8)


def on_grid(scores, given, shape, target):
    """Logits (L, x, y, z), each channel as SimpleITK resamples it."""
    return np.stack([itk_resampled(np.ascontiguousarray(channel), given, shape, target) for channel in scores])


def to_coarse(path, shape=GRID_SHAPE, coarse=COARSE, interpolator=sitk.sitkLinear):
    """Replace a NIfTI file by itself on a grid of fewer and larger voxels around the same center; return the affine."""
    image, ratio = nib.load(path), np.array(shape) / np.array(coarse)
    target = image.affine @ np.diag([*ratio, 1.0])
    target[:3, 3] += image.affine[:3, :3] @ ((np.array(shape) - 1) / 2 - ratio * (np.array(coarse) - 1) / 2)
    values = np.asanyarray(image.dataobj)
    channels = np.moveaxis(values.reshape(*values.shape[:3], -1), -1, 0)
    resampled = [itk_resampled(np.ascontiguousarray(channel), image.affine, coarse, target, interpolator) for channel in channels]
    save_on(path, np.stack(resampled, axis=-1) if values.ndim == 4 else resampled[0], target)
    return target


def test_infer_brings_logits_onto_the_grid_of_the_image(tmp_path):
    folders = write_folders(tmp_path, "a", "b")
    target = to_coarse(folders.logits / "b.nii.gz")
    stored = folders.scores("b")
    result = infer(folders, status=1)
    assert "case 'b': logits and image are on different grids" in result.stderr
    assert "give --resample" in result.stderr
    summary = tmp_path / "summary.json"
    options = ("--set", "bilateral.weight=0", "--set", "spatial.weight=0")  # the network's labels, so that interpolation alone shows
    result = infer(folders, "--resample", "--summary", summary, *options, status=0)
    assert "b: logits interpolated linearly from 11×9×8" in result.stderr
    assert ["read.resample" in case["times"] for case in json.loads(summary.read_text())["cases"]] == [False, True]
    refined = nib.load(folders.output / "b.nii.gz")
    np.testing.assert_array_equal(refined.affine, AFFINE)
    expected = on_grid(stored, target, GRID_SHAPE, AFFINE).argmax(axis=0)
    # Where two labels tie to a rounding, either may win.
    assert np.count_nonzero(np.asanyarray(refined.dataobj) != expected) <= 2
    assert np.unique(expected).tolist() == [0, 1, 3]


@pytest.mark.parametrize(("form", "how"), [("nii.gz", "linear"), ("npz", "cubic"), ("npy", "linear"), ("mha", "cubic")])
def test_large_logits_are_interpolated_while_they_stream(form, how, tmp_path, monkeypatch):
    """The results are those of the whole interpolated array: labels, volumes that a preset keeps, and saved logits."""
    folders = write_folders(tmp_path, "a")
    path = folders.logits / "a.nii.gz"
    to_coarse(path)
    stored = np.moveaxis(load_nifti(path), -1, 0)
    if form in ("npz", "npy"):
        by_axis = stored.transpose(0, 3, 2, 1).copy()
        np.savez(folders.logits / "a.npz", logits=by_axis) if form == "npz" else np.save(folders.logits / "a.npy", by_axis)
        path.unlink()
    elif form == "mha":
        run_here("convert", path, folders.logits / "a.mha", status=0)
        path.unlink()
    seen = []
    plan = networks.plan_coarse
    monkeypatch.setattr(networks, "plan_coarse", lambda *given: seen.append("streamed") or plan(*given))
    results = {}
    for name, limit in (("memory", 1 << 40), ("streamed", 0)):
        for what in ("MAX_IN_MEMORY", "MIN_STREAMED"):
            monkeypatch.setattr(f"crfrefine.runs.cases.case.{what}", limit)
        for preset in (("--set", "bilateral.weight=0"), ("-c", "default"), ("-c", "sharp")):
            own = (*folders.arguments[:4], "-o", tmp_path / name / preset[1])
            words = ("--resample",) if how == "linear" else ("--resample", how)
            result = run_here("infer", *own, *words, "--save-logits", *preset, status=0)
            assert f"logits interpolated {'linearly' if how == 'linear' else 'cubically'} from 11×9×8" in result.stderr
            assert ("has no geometry" in result.stderr) == (form in ("npz", "npy"))
            results[name, preset[1]] = load_nifti(tmp_path / name / preset[1] / "a.nii.gz")
            logits = load_nifti(tmp_path / name / preset[1] / "a_logits.nii.gz")
            assert np.mean(logits.argmax(axis=-1) != results[name, preset[1]]) < 1e-3
    assert len(seen) == 3
    for preset in ("bilateral.weight=0", "default", "sharp"):
        assert np.mean(results["memory", preset] != results["streamed", preset]) < 1e-3
    plain, sharp = (np.bincount(results["streamed", preset].ravel(), minlength=4) for preset in ("bilateral.weight=0", "sharp"))
    assert (results["streamed", "sharp"] != results["streamed", "bilateral.weight=0"]).any()
    assert np.abs(plain - sharp).max() <= 2


def test_evaluate_brings_label_maps_onto_the_grid_of_the_reference(tmp_path):
    study = write_study(tmp_path, 2)
    for folder in (study.after, study.before):
        for case in study.maps["labels"]:
            target = to_coarse(folder / f"{case}.nii.gz", SHAPE, (7, 9, 5), interpolator=sitk.sitkNearestNeighbor)
    result = run_here(*study.arguments, status=1)
    assert "not on the grid of the reference" in result.stderr
    assert "give --resample, which interpolates onto the reference's grid" in result.stderr
    result = run_here(*study.arguments, "--resample", "-v", status=0)
    assert study.summary()["settings"]["resample"] is True
    assert "prediction: label map taken by nearest neighbor from 7×9×5" in result.stderr
    metrics = read_metrics(study.output)
    for folder, method in ((study.after, "prediction"), (study.before, "before")):
        found = itk_resampled(load_nifti(folder / "case1.nii.gz"), target, SHAPE, affine(), sitk.sitkNearestNeighbor) == 1
        dice = expected_overlap(found, study.maps["labels"]["case1"] == 1)["dice"]
        assert 0.2 < dice < 1
        assert metrics["case1", "1", "dice", method] == pytest.approx(dice, abs=1e-12)


def test_evaluate_interpolates_logits_and_takes_voxels_outside_for_certain_background(tmp_path):
    """Of case0 every other plane: other voxels, the same world; of case1 the upper four of seven planes."""
    study = write_study(tmp_path, 2)
    grids = {"case0": affine() @ np.diag([1.0, 1.0, 2.0, 1.0]), "case1": affine()}
    grids["case1"][:3, 3] += 3 * affine()[:3, 2]
    scores = {}
    for case, planes in (("case0", slice(0, None, 2)), ("case1", slice(3, None))):
        (study.after / f"{case}.nii.gz").unlink()
        scores[case] = logits_of(study.maps["after"][case], 3)[..., planes].copy()
        save_on(study.after / f"{case}.nii.gz", np.moveaxis(scores[case], 0, -1), grids[case])
    assert run_here(*study.arguments, "--resample").status == 0
    metrics = read_metrics(study.output)
    interpolated = on_grid(scores["case0"], grids["case0"], SHAPE, affine())
    dice = expected_overlap(interpolated.argmax(axis=0) == 2, study.maps["labels"]["case0"] == 2)["dice"]
    assert metrics["case0", "2", "dice", "prediction"] == pytest.approx(dice, abs=1e-12)
    padded = np.concatenate([np.zeros((*SHAPE[:2], 3)), softmax(scores["case1"])[2]], axis=-1)
    assert (study.maps["labels"]["case1"][..., :3] == 2).any()
    for case, probability in (("case0", softmax(interpolated)[2]), ("case1", padded)):
        expected = ((probability - (study.maps["labels"][case] == 2)) ** 2).mean()
        # The headers keep float32: positions are off by some 1e-6 voxels, and scores by 1e-5 at most.
        assert metrics[case, "2", "brier", "prediction"] == pytest.approx(expected, abs=1e-5)
