"""`crfrefine convert`: archives, and logits to probabilities to labels; the formats themselves are in tests/io."""

import nibabel as nib
import numpy as np
import pytest
from cli_helpers import GRID_SHAPE, NUM_LABELS, load_nifti, run_here, save_nifti

RNG = np.random.default_rng(3)
LOGITS = RNG.normal(0, 3, (*GRID_SHAPE, NUM_LABELS)).astype(np.float32)
LABELS = LOGITS.argmax(axis=-1).astype(np.uint8)
PROBABILITIES = np.exp(LOGITS.astype(np.float64)) / np.exp(LOGITS.astype(np.float64)).sum(axis=-1, keepdims=True)


@pytest.fixture
def files(tmp_path):
    return {
        "logits": save_nifti(tmp_path / "logits.nii.gz", LOGITS),
        "labels": save_nifti(tmp_path / "labels.nii.gz", LABELS),
        "image": save_nifti(tmp_path / "image.nii.gz", LABELS.astype(np.int16) * 100),
    }


def convert(*arguments):
    run_here("convert", *arguments, status=0)


def test_npz_is_channel_z_y_x_and_needs_an_image_on_the_way_back(files, tmp_path):
    convert(files["logits"], tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as archive:
        np.testing.assert_array_equal(archive["logits"], LOGITS.transpose(3, 2, 1, 0))
    alone = run_here("convert", tmp_path / "out.npz", tmp_path / "again.nii.gz", status=1)
    assert "--like" in alone.stderr
    convert(tmp_path / "out.npz", tmp_path / "again.nii.gz", "--like", files["image"])
    np.testing.assert_array_equal(load_nifti(tmp_path / "again.nii.gz"), LOGITS)
    np.testing.assert_array_equal(nib.load(tmp_path / "again.nii.gz").affine, nib.load(files["image"]).affine)


def test_softmax_argmax_and_logarithm(files, tmp_path):
    convert(files["logits"], tmp_path / "p.nii.gz", "--to", "probabilities")
    # A softmax of four float32 numbers: a few roundings of 6e-8 each.
    np.testing.assert_allclose(load_nifti(tmp_path / "p.nii.gz"), PROBABILITIES, rtol=2e-6, atol=1e-7)
    for source in (files["logits"], tmp_path / "p.nii.gz"):
        convert(source, tmp_path / "l.nii.gz", "--to", "labels")
        np.testing.assert_array_equal(load_nifti(tmp_path / "l.nii.gz"), LABELS)
        assert load_nifti(tmp_path / "l.nii.gz").dtype == np.uint8
    for source, target in (("p.nii.gz", "p.npz"), ("p.npz", "p2.npz")):
        convert(tmp_path / source, tmp_path / target)
        with np.load(tmp_path / target) as archive:
            assert list(archive) == ["probabilities"]
    convert(tmp_path / "p.nii.gz", tmp_path / "again.nii.gz", "--to", "logits")
    # Logits are known up to one constant a voxel; probabilities below 1e-7 are raised to it.
    expected = np.log(np.maximum(PROBABILITIES, 1e-7))
    np.testing.assert_allclose(load_nifti(tmp_path / "again.nii.gz"), expected, atol=2e-5)


BAD = {
    "{labels} {root}/x.nii.gz --to probabilities": "a label map cannot become probabilities",
    "{labels} {root}/x.npz": "x.npz",
    "{logits} {root}/x.png": "x.png: unknown file type",
    "{root}/nowhere.nii {root}/x.nii": "nowhere.nii: no such file",
    "{logits} {logits}": "would replace an input",
    "{logits} {image} --like {image}": "would replace an input",
    "{cut} {root}/x.txt --to labels": "unknown file type",  # before it is read
    "{logits} {root}/nowhere/x.nii": "there is no folder",
    "{logits} {root}/x.nii --like {other}": "not on the grid of --like",
    "{archive} {root}/x.nii --like {other}": "not on the grid of --like",
    "{float} {root}/x.nii": "not a label map",
}


def test_bad_input(files, tmp_path):
    np.savez_compressed(tmp_path / "archive.npz", logits=LOGITS.T)
    (tmp_path / "cut.nii.gz").write_bytes(files["logits"].read_bytes()[:9999])
    places = {"other": save_nifti(tmp_path / "other.nii.gz", LABELS[:-1]), "float": save_nifti(tmp_path / "float.nii.gz", LOGITS[..., 0])}
    places |= {**files, "root": tmp_path, "archive": tmp_path / "archive.npz", "cut": tmp_path / "cut.nii.gz"}
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for arguments, words in BAD.items():
        result = run_here("convert", *arguments.format(**places).split())
        assert (result.status, result.stdout) == (1, "")
        assert result.stderr.startswith("crfrefine: error: ")
        assert words in result.stderr, arguments
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
