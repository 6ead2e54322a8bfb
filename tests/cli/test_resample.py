"""`--resample` of infer, train-crf and evaluate, from folders to files; and on real cases, whose folder CRFREFINE_DATA names."""

import json

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from cli_helpers import AFFINE, GRID_SHAPE, load_nifti, run_here, write_folders
from evaluation_helpers import SHAPE, Study, affine, logits_of, read_metrics, softmax, write_study
from io_helpers import save_nifti as save_on
from resampling_helpers import itk_resampled
from training_helpers import write_cases

FAST = ("--set", "mean_field.filter=lattice")
COARSE = (11, 9, 8)


def coarser(fine: np.ndarray, shape=GRID_SHAPE, coarse=COARSE, shift=0.0) -> np.ndarray:
    """An affine around the same center, with fewer and larger voxels; `shift` in fine voxels along their first axis."""
    ratio = np.array(shape) / np.array(coarse)
    found = fine @ np.diag([*ratio, 1.0])
    found[:3, 3] = fine[:3, :3] @ ((np.array(shape) - 1) / 2 - ratio * (np.array(coarse) - 1) / 2 + [shift, 0.0, 0.0]) + fine[:3, 3]
    return found


def to_coarse(path, shape=GRID_SHAPE, coarse=COARSE, shift=0.0, interpolator=sitk.sitkLinear) -> np.ndarray:
    """Replace a NIfTI file by itself on a coarser grid, as SimpleITK resamples it; return the affine."""
    image = nib.load(path)
    target = coarser(image.affine, shape, coarse, shift)
    values = np.asanyarray(image.dataobj)
    channels = values[..., np.newaxis] if values.ndim == 3 else values
    resampled = [
        itk_resampled(np.ascontiguousarray(channels[..., c]), image.affine, coarse, target, interpolator) for c in range(channels.shape[-1])
    ]
    save_on(path, np.stack(resampled, axis=-1) if values.ndim == 4 else resampled[0], target)
    return target


def test_infer_brings_logits_onto_the_grid_of_the_image(tmp_path):
    folders = write_folders(tmp_path, "a", "b")
    target = to_coarse(folders.logits / "b.nii.gz")
    stored = load_nifti(folders.logits / "b.nii.gz")
    result = run_here("infer", *folders.arguments)
    assert result.status == 1
    assert "case 'b': logits and image are on different grids" in result.stderr
    assert "give --resample" in result.stderr
    summary = tmp_path / "summary.json"
    options = ("--set", "bilateral.weight=0", "--set", "spatial.weight=0")  # the network's labels, so that interpolation alone shows
    result = run_here("infer", *folders.arguments, "--resample", "--summary", summary, *options)
    assert result.status == 0, result.stderr
    assert "b: logits interpolated linearly from 11×9×8" in result.stderr
    here, there = json.loads(summary.read_text())["cases"]
    assert "read.resample" in there["times"]
    assert "read.resample" not in here["times"]
    refined = nib.load(folders.output / "b.nii.gz")
    np.testing.assert_array_equal(refined.affine, AFFINE)
    expected = np.stack([itk_resampled(np.ascontiguousarray(stored[..., c]), target, GRID_SHAPE, AFFINE) for c in range(4)]).argmax(axis=0)
    # Where two labels tie to a rounding, either may win.
    assert np.count_nonzero(np.asanyarray(refined.dataobj) != expected) <= 2
    assert np.unique(expected).tolist() == [0, 1, 3]


def test_logits_of_a_part_of_the_image_leave_background_outside(tmp_path):
    folders = write_folders(tmp_path, "a")
    to_coarse(folders.logits / "a.nii.gz", shift=10.0)
    summary = tmp_path / "summary.json"
    result = run_here("infer", *folders.arguments, "--resample", "--summary", summary, *FAST)
    assert result.status == 0, result.stderr
    case = json.loads(summary.read_text())["cases"][0]
    assert case["num_padding_voxels"] == 10 * 15 * 11, "ten of 18 planes"
    assert not load_nifti(folders.output / "a.nii.gz")[:10].any()
    assert "1650 of 2970 voxels (55.6%); do the files belong together?" in result.stderr


@pytest.mark.long
def test_train_crf_takes_logits_of_another_grid(tmp_path):
    data = write_cases(tmp_path / "data", 4)
    for number in (1, 2):
        to_coarse(data / "logits" / f"case{number}.nii.gz")
    short = ("--folds", 2, "--num-iterations", 2, "--threads", 1)
    result = run_here("train-crf", data, "-o", tmp_path / "refused.toml", *short)
    assert result.status == 1
    assert "2 of 4 cases cannot be trained on" in result.stderr
    assert "give --resample" in result.stderr
    result = run_here("train-crf", data, "-o", tmp_path / "params.toml", *short, "--resample")
    assert result.status == 0, result.stderr
    assert "note: files of 2 of 4 cases are interpolated onto the grid of the image: case1, case2\n" in result.stderr
    assert json.loads((tmp_path / "params.report.json").read_text())["options"]["resample"] is True


def coarse_study(root) -> tuple[Study, np.ndarray]:
    """A study whose label maps are coarser than its reference; and their affine."""
    study = write_study(root, 2)
    for folder in (study.after, study.before):
        for case in study.maps["labels"]:
            target = to_coarse(folder / f"{case}.nii.gz", SHAPE, (7, 9, 5), interpolator=sitk.sitkNearestNeighbor)
    return study, target


def test_evaluate_brings_label_maps_onto_the_grid_of_the_reference(tmp_path):
    study, target = coarse_study(tmp_path)
    result = run_here(*study.arguments)
    assert result.status == 1
    assert "not on the grid of the reference" in result.stderr
    assert "give --resample, which interpolates onto the reference's grid" in result.stderr
    result = run_here(*study.arguments, "--resample", "-v")
    assert result.status == 0, result.stderr
    assert json.loads((study.output / "summary.json").read_text())["settings"]["resample"] is True
    assert "prediction: label map taken by nearest neighbor from 7×9×5" in result.stderr
    metrics = read_metrics(study.output)
    for folder in (study.after, study.before):
        found = itk_resampled(load_nifti(folder / "case1.nii.gz"), target, SHAPE, affine(), sitk.sitkNearestNeighbor) == 1
        wanted = study.maps["labels"]["case1"] == 1
        dice = 2 * (found & wanted).sum() / (found.sum() + wanted.sum())
        assert 0.2 < dice < 1
        assert metrics["case1", "1", "dice", "prediction" if folder == study.after else "before"] == pytest.approx(dice, abs=1e-12)


def test_evaluate_takes_the_argmax_after_it_has_interpolated_logits(tmp_path):
    study = write_study(tmp_path, 2)
    (study.after / "case0.nii.gz").unlink()
    scores = logits_of(study.maps["after"]["case0"], 3)[..., ::2].copy()  # every other plane: other voxels, the same world
    target = affine() @ np.diag([1.0, 1.0, 2.0, 1.0])
    save_on(study.after / "case0.nii.gz", np.moveaxis(scores, 0, -1), target)
    assert run_here(*study.arguments, "--resample").status == 0
    interpolated = np.stack([itk_resampled(np.ascontiguousarray(channel), target, SHAPE, affine()) for channel in scores])
    found, wanted = interpolated.argmax(axis=0), study.maps["labels"]["case0"]
    metrics = read_metrics(study.output)
    dice = 2 * ((found == 2) & (wanted == 2)).sum() / ((found == 2).sum() + (wanted == 2).sum())
    assert metrics["case0", "2", "dice", "prediction"] == pytest.approx(dice, abs=1e-12)
    brier = ((softmax(interpolated)[2] - (wanted == 2)) ** 2).mean()
    # The headers keep float32: scores are off by 1e-5 at most.
    assert metrics["case0", "2", "brier", "prediction"] == pytest.approx(brier, abs=1e-5)


def test_evaluate_counts_voxels_outside_the_logits_as_certain_background(tmp_path):
    study = write_study(tmp_path, 2)
    (study.after / "case0.nii.gz").unlink()
    scores = logits_of(study.maps["after"]["case0"], 3)[..., 3:].copy()  # the upper four of seven planes
    target = affine()
    target[:3, 3] += 3 * target[:3, 2]
    save_on(study.after / "case0.nii.gz", np.moveaxis(scores, 0, -1), target)
    assert run_here(*study.arguments, "--resample").status == 0
    wanted = study.maps["labels"]["case0"] == 2
    probability = np.zeros(SHAPE)
    probability[..., 3:] = softmax(scores)[2]
    assert wanted[..., :3].any()
    # Positions are off by some 1e-6 voxels, and scores by as much.
    expected = ((probability - wanted) ** 2).mean()
    assert read_metrics(study.output)["case0", "2", "brier", "prediction"] == pytest.approx(expected, abs=1e-5)
