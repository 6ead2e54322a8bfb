"""`infer` on the sigmoid channels of nnU-Net's region-based training, as users run it."""

import json

import numpy as np
import pytest
from cli_helpers import GRID_SHAPE, SPACING, infer, load_nifti, run_here, save_nifti, write_folders
from training_helpers import write_cases

import crfrefine
from crfrefine import CrfParameters, RegionScheme

BRATS = {"labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}, "regions_class_order": [1, 2, 3]}
SCHEME = RegionScheme.of({"whole": [1, 2, 3], "core": [2, 3], "enhancing": 3})
ON_THE_LINE = ("--regions", "whole=1+2+3", "--regions", "core=2+3", "--regions", "enhancing=3")


def write_regions(root, *case_ids, description=BRATS, npz=False):
    """The phantoms' softmax summed over each region, as a network with sigmoid channels would write it; returns the log-odds too."""
    folders = write_folders(root, *case_ids)
    log_odds = {}
    for case_id in case_ids:
        logits = folders.scores(case_id).astype(float)
        softmax = np.exp(logits) / np.exp(logits).sum(0)
        sigmoids = np.stack([softmax[list(labels)].sum(0) for labels in SCHEME.labels]).astype(np.float32)
        if npz:  # (region, z, y, x), beside nnU-Net's own label map
            np.savez(folders.logits / f"{case_id}.npz", probabilities=sigmoids.transpose(0, 3, 2, 1))
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
    result = infer(folders, "--save-probabilities", "--save-logits", "--preview", "--summary", summary, status=0)
    assert "is taken as sigmoid probabilities of 3 regions (whole, core, enhancing; " in result.stderr
    parameters = CrfParameters().replace(**{"mean_field.filter": "lattice"})
    expected = crfrefine.refine(log_odds["a"], folders.image("a"), spacing=SPACING, regions=SCHEME, parameters=parameters)
    found, probabilities, logits = (load_nifti(folders.output / f"a{end}.nii.gz") for end in ("", "_probabilities", "_logits"))
    np.testing.assert_array_equal(found, expected.label_map)
    assert found.dtype == np.uint8
    assert set(np.unique(found)) == {0, 1, 2, 3}
    np.testing.assert_allclose(np.moveaxis(probabilities, -1, 0), expected.marginals, atol=1e-4)
    np.testing.assert_array_equal(SCHEME.decode(np.moveaxis(probabilities, -1, 0) - 0.5), found)
    np.testing.assert_allclose(np.moveaxis(logits, -1, 0), expected.logits, atol=1e-3)
    assert (folders.output / "a_preview.png").stat().st_size > 1000
    first = json.loads(summary.read_text())["cases"][0]
    assert (first["num_labels"], first["input_type"], len(first["voxels_after"])) == (4, "probabilities", 4)
    regions = {"whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}
    assert first["regions"] == {"labels": regions, "regions_class_order": [1, 2, 3]}


def test_regions_of_the_command_line(tmp_path):
    folders, _ = write_regions(tmp_path / "line", "a", description=None)
    described, _ = write_regions(tmp_path / "described", "a")
    assert infer(folders, *ON_THE_LINE).status == 0
    assert infer(described).status == 0
    np.testing.assert_array_equal(load_nifti(folders.output / "a.nii.gz"), load_nifti(described.output / "a.nii.gz"))
    infer(folders, *ON_THE_LINE, "--regions-class-order", "2,3,3", status=0)
    assert set(np.unique(load_nifti(folders.output / "a.nii.gz"))) == {0, 2, 3}
    for options, told in (
        (("--regions-class-order", "1,2"), "it belongs to the regions of --regions"),
        ((*ON_THE_LINE, "--regions-class-order", "1;2;3"), "expected one label per region, separated by commas"),
        (("--regions", "a=1", "--regions", "a=2"), "region 'a' appears twice"),
        # They would be passed over; or, of a single region, the labels would be taken for log-odds.
        ((*ON_THE_LINE, "--input-type", "labels"), "leave --regions out"),
        (ON_THE_LINE, "leave --regions out"),
        (("--regions", "tumor=2"), "whole numbers from 0 to 3, as in a label map; "),
    ):
        if "labels" in options:
            save_nifti(folders.logits / "a.nii.gz", (np.indices(GRID_SHAPE).sum(axis=0) % 4).astype(np.uint8))
        assert told in infer(folders, *options, status=1).stderr


def test_convert_puts_the_label_map_together(tmp_path):
    folders, log_odds = write_regions(tmp_path, "a")
    channels = folders.logits / "a.nii.gz"
    assert run_here("convert", channels, tmp_path / "labels.nii.gz", "--to", "labels").status == 0
    np.testing.assert_array_equal(load_nifti(tmp_path / "labels.nii.gz"), SCHEME.decode(log_odds["a"]))
    assert run_here("convert", channels, tmp_path / "a.npz").status == 0
    with np.load(tmp_path / "a.npz") as archive:
        np.testing.assert_array_equal(archive["probabilities"].transpose(3, 2, 1, 0), load_nifti(channels))
    (tmp_path / "dataset.json").write_text(json.dumps(BRATS))
    assert run_here("convert", channels, tmp_path / "odds.nii.gz", "--to", "logits").status == 0
    np.testing.assert_allclose(np.moveaxis(load_nifti(tmp_path / "odds.nii.gz"), -1, 0), log_odds["a"], atol=1e-3)
    assert run_here("convert", tmp_path / "odds.nii.gz", tmp_path / "back.nii.gz", "--to", "probabilities").status == 0
    np.testing.assert_allclose(load_nifti(tmp_path / "back.nii.gz"), load_nifti(channels), atol=1e-6)


def test_a_description_that_cannot_be_read_is_told(tmp_path):
    """Log-odds of regions could be taken for logits of labels. Training stops; the others go on and say so."""
    cases = write_cases(tmp_path, 2)
    written = cases / "logits" / "dataset.json"
    written.write_text("{broken")
    for arguments in (
        ("infer", "-i", cases / "images", "-p", cases / "logits", "-o", tmp_path / "refined", "--input-type", "logits"),
        ("train-crf", cases, "-o", tmp_path / "p.toml"),
        ("evaluate", cases / "logits", cases / "labels", "-o", tmp_path / "report", "--no-report", "--processes", 1),
        ("convert", cases / "logits" / "case0.nii.gz", tmp_path / "labels.nii.gz", "--to", "labels"),
    ):
        is_training = arguments[0] == "train-crf"
        result = run_here(*arguments, status=int(is_training))
        assert result.stderr.count(f"{written}: not a dataset.json as nnU-Net writes it: ") == 1
        assert ("continuing without it" in result.stderr) != is_training
