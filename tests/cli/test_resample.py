"""`--resample` of infer and evaluate, from folders to files."""

import json
from unittest.mock import Mock

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from cli_helpers import (
    AFFINE,
    GRID_SHAPE,
    SPACING,
    infer,
    load_nifti,
    run_here,
    save_nifti,
    set_streaming,
    write_folders,
)
from evaluation_helpers import SHAPE, affine, expected_overlap, logits_of, read_metrics, write_study
from io_helpers import itk_resampled
from io_helpers import save_nifti as save_on
from oracles import softmax
from training_helpers import write_cases

from crfrefine import CrfParameters, RegionScheme, refine
from crfrefine.refinement.tiles import coarse

COARSE = (11, 9, 8)


def on_grid(scores, given, shape, target):
    """Logits (L, x, y, z), each channel as SimpleITK resamples it."""
    return np.stack(
        [itk_resampled(np.ascontiguousarray(channel), given, shape, target) for channel in scores]
    )


def to_coarse(path, shape=GRID_SHAPE, coarse=COARSE, interpolator=sitk.sitkLinear):
    """Replace a NIfTI file by itself on a grid of fewer and larger voxels around the same center;
    return the affine.
    """
    image = nib.load(path)
    ratio = np.array(shape) / np.array(coarse)
    target = image.affine @ np.diag([*ratio, 1.0])
    target[:3, 3] += image.affine[:3, :3] @ (
        (np.array(shape) - 1) / 2 - ratio * (np.array(coarse) - 1) / 2
    )
    values = np.asanyarray(image.dataobj)
    channels = np.moveaxis(values.reshape(*values.shape[:3], -1), -1, 0)
    resampled = [
        itk_resampled(np.ascontiguousarray(channel), image.affine, coarse, target, interpolator)
        for channel in channels
    ]
    save_on(path, np.stack(resampled, axis=-1) if values.ndim == 4 else resampled[0], target)
    return target


def test_infer_brings_logits_onto_the_grid_of_the_image(tmp_path):
    folders = write_folders(tmp_path, "a", "b")
    target = to_coarse(folders.logits / "b.nii.gz")
    stored = folders.scores("b")
    refused = infer(folders, status=1).stderr
    assert "case 'b': logits and image are on different grids" in refused
    assert "give --resample" in refused
    summary = tmp_path / "summary.json"
    options = (
        "--set",
        "bilateral.weight=0",
        "--set",
        "spatial.weight=0",
    )  # the network's labels, so that interpolation alone shows
    result = infer(folders, "--resample", "--summary", summary, *options, status=0)
    assert "b: logits interpolated linearly from 11×9×8" in result.stderr
    assert [
        "read.resample" in case["times"] for case in json.loads(summary.read_text())["cases"]
    ] == [False, True]
    refined = nib.load(folders.output / "b.nii.gz")
    np.testing.assert_array_equal(refined.affine, AFFINE)
    expected = on_grid(stored, target, GRID_SHAPE, AFFINE).argmax(axis=0)
    # Where two labels tie to a rounding, either may win.
    assert np.count_nonzero(np.asanyarray(refined.dataobj) != expected) <= 2
    assert np.unique(expected).tolist() == [0, 1, 3]


PRESETS = {
    "plain": ("--set", "bilateral.weight=0"),
    "default": ("-c", "default"),
    "sharp": ("-c", "sharp"),
}


@pytest.mark.parametrize(
    ("form", "how"),
    [("nii.gz", "linear"), ("nii.gz", "cubic"), ("nrrd", "linear"), ("mha", "cubic")],
)
def test_large_logits_are_interpolated_while_they_stream(form, how, tmp_path, monkeypatch):
    """The results are those of the whole interpolated array: labels, volumes that a preset keeps,
    and saved logits.
    """
    folders = write_folders(tmp_path, "a")
    path = folders.logits / "a.nii.gz"
    to_coarse(path)
    if form != "nii.gz":
        run_here("convert", path, folders.logits / f"a.{form}", status=0)
        path.unlink()
    spy = Mock(wraps=coarse.plan_coarse)
    results = {}
    manner = {"linear": "linearly", "cubic": "cubically"}[how]
    monkeypatch.setattr(coarse, "plan_coarse", spy)
    for name in ("memory", "streamed"):
        set_streaming(monkeypatch, name == "streamed")
        for preset, options in PRESETS.items():
            output = tmp_path / name / preset
            words = (*options, "--save-logits", "--resample", *([] if how == "linear" else [how]))
            result = run_here("infer", *folders.arguments[:4], "-o", output, *words, status=0)
            assert f"logits interpolated {manner} from 11×9×8" in result.stderr
            results[name, preset] = load_nifti(output / "a.nii.gz")
            assert (
                np.mean(
                    load_nifti(output / "a_logits.nii.gz").argmax(axis=-1) != results[name, preset]
                )
                < 1e-3
            )
    assert spy.call_count == 3
    for preset in PRESETS:
        np.testing.assert_array_equal(results["memory", preset], results["streamed", preset])
    plain, sharp = (results["streamed", preset] for preset in ("plain", "sharp"))
    assert (plain != sharp).any()
    assert (
        np.abs(
            np.bincount(plain.ravel(), minlength=4) - np.bincount(sharp.ravel(), minlength=4)
        ).max()
        <= 2
    )


def test_evaluate_brings_label_maps_onto_the_grid_of_the_reference(tmp_path):
    study = write_study(tmp_path, 2)
    for folder in (study.after, study.before):
        for case in study.maps["labels"]:
            target = to_coarse(
                folder / f"{case}.nii.gz", SHAPE, (7, 9, 5), interpolator=sitk.sitkNearestNeighbor
            )
    refused = run_here(*study.arguments, status=1).stderr
    assert "not on the grid of the reference" in refused
    assert "give --resample, which interpolates onto the reference's grid" in refused
    result = run_here(*study.arguments, "--resample", "-v", status=0)
    assert study.summary()["settings"]["resample"] is True
    assert "prediction: label map taken by nearest neighbor from 7×9×5" in result.stderr
    metrics = read_metrics(study.output)
    for folder, method in ((study.after, "prediction"), (study.before, "before")):
        found = (
            itk_resampled(
                load_nifti(folder / "case1.nii.gz"),
                target,
                SHAPE,
                affine(),
                sitk.sitkNearestNeighbor,
            )
            == 1
        )
        dice = expected_overlap(found, study.maps["labels"]["case1"] == 1)["dice"]
        assert 0.2 < dice < 1
        assert metrics["case1", "1", "dice", method] == pytest.approx(dice, abs=1e-12)


def test_evaluate_interpolates_logits_and_takes_voxels_outside_for_certain_background(tmp_path):
    """Of case0 every other plane: other voxels, the same world; of case1 the upper four of seven
    planes.
    """
    study = write_study(tmp_path, 2)
    grids = {"case0": affine() @ np.diag([1.0, 1.0, 2.0, 1.0]), "case1": affine()}
    grids["case1"][:3, 3] += 3 * affine()[:3, 2]
    scores = {}
    for case, planes in (("case0", slice(0, None, 2)), ("case1", slice(3, None))):
        (study.after / f"{case}.nii.gz").unlink()
        scores[case] = logits_of(study.maps["after"][case], 3)[..., planes].copy()
        save_on(study.after / f"{case}.nii.gz", np.moveaxis(scores[case], 0, -1), grids[case])
    run_here(*study.arguments, "--resample", status=0)
    metrics = read_metrics(study.output)
    interpolated = on_grid(scores["case0"], grids["case0"], SHAPE, affine())
    dice = expected_overlap(interpolated.argmax(axis=0) == 2, study.maps["labels"]["case0"] == 2)[
        "dice"
    ]
    assert metrics["case0", "2", "dice", "prediction"] == pytest.approx(dice, abs=1e-12)
    padded = np.concatenate([np.zeros((*SHAPE[:2], 3)), softmax(scores["case1"])[2]], axis=-1)
    assert (study.maps["labels"]["case1"][..., :3] == 2).any()
    for case, probability in (("case0", softmax(interpolated)[2]), ("case1", padded)):
        expected = ((probability - (study.maps["labels"][case] == 2)) ** 2).mean()
        # The headers keep float32: positions are off by some 1e-6 voxels, and scores by 1e-5 at
        # most.
        assert metrics[case, "2", "brier", "prediction"] == pytest.approx(expected, abs=1e-5)


BRATS = {
    "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3},
    "regions_class_order": [1, 2, 3],
}
SCHEME = RegionScheme.of({"whole": [1, 2, 3], "core": [2, 3], "enhancing": 3})
ON_THE_LINE = ("--regions", "whole=1+2+3", "--regions", "core=2+3", "--regions", "enhancing=3")


def write_regions(root, *case_ids, description=BRATS, npz=False):
    """The phantoms' softmax summed over each region, as a network with sigmoid channels would write
    it; returns the log-odds too.
    """
    folders = write_folders(root, *case_ids)
    log_odds = {}
    for case_id in case_ids:
        shares = softmax(folders.scores(case_id))
        sigmoids = np.stack([shares[list(labels)].sum(0) for labels in SCHEME.labels]).astype(
            np.float32
        )
        if npz:  # (region, z, y, x), beside nnU-Net's own label map
            np.savez(
                folders.logits / f"{case_id}.npz", probabilities=sigmoids.transpose(0, 3, 2, 1)
            )
            save_nifti(folders.logits / f"{case_id}.nii.gz", SCHEME.decode(sigmoids - 0.5))
        else:
            save_nifti(folders.logits / f"{case_id}.nii.gz", np.moveaxis(sigmoids, 0, -1))
        inside = np.maximum(sigmoids.astype(float), 1e-7)
        log_odds[case_id] = np.log(inside) - np.log(np.maximum(1 - sigmoids.astype(float), 1e-7))
    if description is not None:
        (folders.logits / "dataset.json").write_text(json.dumps(description))
    return folders, log_odds


@pytest.mark.parametrize("npz", [False, True], ids=["nifti", "npz"])
def test_a_folder_as_nnunet_leaves_it(tmp_path, npz):
    folders, log_odds = write_regions(tmp_path, "a", npz=npz)
    summary = tmp_path / "summary.json"
    result = infer(
        folders,
        "--save-probabilities",
        "--save-logits",
        "--preview",
        "--summary",
        summary,
        status=0,
    )
    assert (
        "is taken as sigmoid probabilities of 3 regions (whole, core, enhancing; " in result.stderr
    )
    parameters = CrfParameters().replace(**{"mean_field.filter": "lattice"})
    expected = refine(
        log_odds["a"], folders.image("a"), spacing=SPACING, regions=SCHEME, parameters=parameters
    )
    found, probabilities, logits = (
        load_nifti(folders.output / f"a{end}.nii.gz") for end in ("", "_probabilities", "_logits")
    )
    np.testing.assert_array_equal(found, expected.label_map)
    assert found.dtype == np.uint8
    assert set(np.unique(found)) == {0, 1, 2, 3}
    np.testing.assert_allclose(np.moveaxis(probabilities, -1, 0), expected.marginals, atol=1e-4)
    np.testing.assert_array_equal(SCHEME.decode(np.moveaxis(probabilities, -1, 0) - 0.5), found)
    np.testing.assert_allclose(np.moveaxis(logits, -1, 0), expected.logits, atol=1e-3)
    assert (folders.output / "a_preview.png").stat().st_size > 1000
    first = json.loads(summary.read_text())["cases"][0]
    assert (first["num_labels"], first["input_type"], len(first["voxels_after"])) == (
        4,
        "probabilities",
        4,
    )
    regions = {"whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}
    assert first["regions"] == {"labels": regions, "regions_class_order": [1, 2, 3]}


def test_regions_of_the_command_line(tmp_path):
    folders, _ = write_regions(tmp_path / "line", "a", description=None)
    described, _ = write_regions(tmp_path / "described", "a")
    infer(folders, *ON_THE_LINE, status=0)
    infer(described, status=0)
    np.testing.assert_array_equal(
        load_nifti(folders.output / "a.nii.gz"), load_nifti(described.output / "a.nii.gz")
    )
    for options, told in (
        (("--regions", "a=1", "--regions", "a=2"), "region 'a' appears twice"),
        # They would be passed over; or, of a single region, the labels would be taken for log-odds.
        ((*ON_THE_LINE, "--input-type", "labels"), "leave --regions out"),
        (ON_THE_LINE, "leave --regions out"),
        (("--regions", "tumor=2"), "the largest is 3, as in a label map"),
    ):
        if "labels" in options:
            save_nifti(
                folders.logits / "a.nii.gz",
                (np.indices(GRID_SHAPE).sum(axis=0) % 4).astype(np.uint8),
            )
        assert told in infer(folders, *options, status=1).stderr


def test_convert_puts_the_label_map_together(tmp_path):
    folders, log_odds = write_regions(tmp_path, "a")
    channels = folders.logits / "a.nii.gz"
    run_here("convert", channels, tmp_path / "labels.nii.gz", "--to", "labels", status=0)
    np.testing.assert_array_equal(
        load_nifti(tmp_path / "labels.nii.gz"), SCHEME.decode(log_odds["a"])
    )
    run_here("convert", channels, tmp_path / "a.npz", status=0)
    np.testing.assert_array_equal(
        np.load(tmp_path / "a.npz")["probabilities"].transpose(3, 2, 1, 0), load_nifti(channels)
    )
    (tmp_path / "dataset.json").write_text(json.dumps(BRATS))
    run_here("convert", channels, tmp_path / "odds.nii.gz", "--to", "logits", status=0)
    np.testing.assert_allclose(
        np.moveaxis(load_nifti(tmp_path / "odds.nii.gz"), -1, 0), log_odds["a"], atol=1e-3
    )
    run_here(
        "convert",
        tmp_path / "odds.nii.gz",
        tmp_path / "back.nii.gz",
        "--to",
        "probabilities",
        status=0,
    )
    np.testing.assert_allclose(
        load_nifti(tmp_path / "back.nii.gz"), load_nifti(channels), atol=1e-6
    )


def test_every_command_stops_at_a_description_that_cannot_be_read(tmp_path):
    """Log-odds of regions could be taken for logits of labels, and a label to ignore counted."""
    cases = write_cases(tmp_path, 2)
    written = cases / "logits" / "dataset.json"
    written.write_text("{broken")
    for arguments in (
        (
            "infer",
            "-i",
            cases / "images",
            "-p",
            cases / "logits",
            "-o",
            tmp_path / "refined",
            "--input-type",
            "logits",
        ),
        ("train-crf", cases, "-o", tmp_path / "p.toml"),
        (
            "evaluate",
            cases / "logits",
            cases / "labels",
            "-o",
            tmp_path / "report",
            "--no-report",
            "--processes",
            1,
        ),
        (
            "convert",
            cases / "logits" / "case0.nii.gz",
            tmp_path / "labels.nii.gz",
            "--to",
            "labels",
        ),
    ):
        result = run_here(*arguments, status=1)
        assert result.stderr.count(f"{written}: not a dataset.json as nnU-Net writes it: ") == 1
        assert "mend it, or move it away" in result.stderr
        assert "continuing without it" not in result.stderr
    for name in ("refined", "p.toml", "report", "labels.nii.gz"):
        assert not (tmp_path / name).exists()
