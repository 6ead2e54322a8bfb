"""`convert SEGMENTATION FOLDER` writes a binary file per segment, whatever its layers."""

import nibabel as nib
import nrrd
import numpy as np
import pytest
from cli_helpers import files_in, load_nifti, run_here

SHAPE = (9, 8, 7)
SEGMENTS = [("Liver", 1, 0), ("Tumor, left", 1, 1), ("Kidney", 2, 0), ("kidney", 3, 1)]


def voxels():
    """Two layers, in which the tumor is a part of the liver, and label 1 means two segments."""
    layers = np.zeros((2, *SHAPE), np.uint8)
    layers[0, 1:6, 1:5, 1:4] = 1
    layers[1, 2:4, 2:5, 2:3] = 1
    layers[0, 7:, 1:3, 5:] = 2
    layers[1, 7:, 6:, 4:] = 3
    return layers


def write_layers(path, layers, segments=SEGMENTS):
    steps = np.diag([-1.0, -1.5, 2.0])
    header = {
        "space": "left-posterior-superior",
        "space directions": np.vstack([[np.nan] * 3, steps]),
        "space origin": [10, 5, 7],
        "kinds": ["list", "domain", "domain", "domain"],
        "encoding": "gzip",
    }
    for number, (name, label, layer) in enumerate(segments):
        header[f"Segment{number}_Name"] = name
        header[f"Segment{number}_LabelValue"] = str(label)
        header[f"Segment{number}_Layer"] = str(layer)
    nrrd.write(str(path), layers, header)
    return path


def test_each_segment_becomes_a_mask_with_its_name(tmp_path):
    source = write_layers(tmp_path / "a.seg.nrrd", voxels())
    target = tmp_path / "out"
    done = run_here("convert", source, target, status=0)
    assert "4 segments" in done.stderr
    names = ["Kidney.nii.gz", "Liver.nii.gz", "Tumor__left.nii.gz", "kidney_3.nii.gz"]
    assert files_in(target) == sorted(names)
    for file, (_, label, layer) in zip(
        ("Liver", "Tumor__left", "Kidney", "kidney_3"), SEGMENTS, strict=True
    ):
        path = target / f"{file}.nii.gz"
        np.testing.assert_array_equal(load_nifti(path), voxels()[layer] == label)
    affine = nib.load(target / "Liver.nii.gz").affine
    np.testing.assert_allclose(
        affine, [[1, 0, 0, -10], [0, 1.5, 0, -5], [0, 0, 2, 7], [0, 0, 0, 1]]
    )


def test_a_segmentation_of_one_layer_can_be_split_too_in_another_format(tmp_path):
    segments = [SEGMENTS[0], SEGMENTS[2]]
    source = write_layers(tmp_path / "a.seg.nrrd", voxels()[:1], segments)
    run_here("convert", source, tmp_path / "out", "--output-format", ".nrrd", status=0)
    assert files_in(tmp_path / "out") == ["Kidney.nrrd", "Liver.nrrd"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--map", "1=2"), "of the options this takes --output-format only"),
        (("--output-format", ".xyz"), "unknown file type; expected one of"),
    ],
)
def test_other_options_are_refused(tmp_path, options, message):
    source = write_layers(tmp_path / "a.seg.nrrd", voxels())
    refused = run_here("convert", source, tmp_path / "out", *options, status=1)
    assert message in refused.stderr


def test_errors_elsewhere_name_the_command_that_splits(tmp_path):
    source = write_layers(tmp_path / "a.seg.nrrd", voxels())
    refused = run_here("convert", source, tmp_path / "a.nii.gz", status=1)
    assert (
        "`crfrefine convert a.seg.nrrd FOLDER` writes a binary file per segment" in refused.stderr
    )
    save = nib.Nifti1Image(np.moveaxis(voxels(), 0, -1), np.eye(4))
    save.to_filename(tmp_path / "4d.nii.gz")
    (tmp_path / "p.nii.gz").write_bytes((tmp_path / "4d.nii.gz").read_bytes())
    arguments = ("evaluate", tmp_path / "p.nii.gz", tmp_path / "4d.nii.gz", "-o", tmp_path / "rep")
    refused = run_here(*arguments, status=1)
    assert "`crfrefine convert 4d.nii.gz FOLDER --split` writes each" in refused.stderr
