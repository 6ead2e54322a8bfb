"""`crfrefine convert`: formats, and logits to probabilities to labels; read back by the other libraries."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from cli_helpers import AFFINE, GRID_SHAPE, NUM_LABELS, load_nifti, run_here, save_nifti

RNG = np.random.default_rng(3)
LOGITS = RNG.normal(0, 3, (*GRID_SHAPE, NUM_LABELS)).astype(np.float32)
LABELS = LOGITS.argmax(axis=-1).astype(np.uint8)
PROBABILITIES = np.exp(LOGITS.astype(np.float64)) / np.exp(LOGITS.astype(np.float64)).sum(axis=-1, keepdims=True)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {
        "logits": save_nifti(tmp_path / "logits.nii.gz", LOGITS),
        "labels": save_nifti(tmp_path / "labels.nii.gz", LABELS),
        "image": save_nifti(tmp_path / "image.nii.gz", LABELS.astype(np.int16) * 100),
    }


def convert(*arguments: object) -> str:
    result = run_here("convert", *arguments)
    assert result.status == 0, result.stderr
    return result.stdout


def test_output_is_the_name_of_the_file_alone(files, tmp_path):
    result = run_here("convert", files["labels"], tmp_path / "out.mha")
    assert (result.status, result.stdout) == (0, f"{tmp_path / 'out.mha'}\n")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("suffix", [".nii", ".mhd", ".nrrd"])
def test_label_maps_keep_voxels_and_geometry(files, tmp_path, suffix):
    target = tmp_path / f"out{suffix}"
    convert(files["labels"], target)
    there, back = sitk.ReadImage(str(files["labels"])), sitk.ReadImage(str(target))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back), LABELS.transpose(2, 1, 0))
    for get in ("GetOrigin", "GetSpacing", "GetDirection"):
        # NIfTI stores its affine as float32.
        np.testing.assert_allclose(getattr(back, get)(), getattr(there, get)(), atol=1e-5)
    again = tmp_path / "again.nii.gz"
    convert(target, again)
    np.testing.assert_array_equal(load_nifti(again), LABELS)
    np.testing.assert_allclose(nib.load(again).affine, AFFINE, atol=1e-5)


@pytest.mark.parametrize("suffix", [".mha"])
def test_logits_keep_their_values_there_and_back(files, tmp_path, suffix):
    convert(files["logits"], tmp_path / f"out{suffix}", "--to", "logits")
    convert(tmp_path / f"out{suffix}", tmp_path / "again.nii.gz")
    np.testing.assert_array_equal(load_nifti(tmp_path / "again.nii.gz"), LOGITS)
    np.testing.assert_allclose(nib.load(tmp_path / "again.nii.gz").affine, AFFINE, atol=1e-5)


def test_npz_is_channel_z_y_x_and_needs_an_image_on_the_way_back(files, tmp_path):
    convert(files["logits"], tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as archive:
        np.testing.assert_array_equal(archive["logits"], LOGITS.transpose(3, 2, 1, 0))
    alone = run_here("convert", tmp_path / "out.npz", tmp_path / "again.nii.gz")
    assert alone.status == 1
    assert "--like" in alone.stderr
    convert(tmp_path / "out.npz", tmp_path / "again.nii.gz", "--like", files["image"])
    np.testing.assert_array_equal(load_nifti(tmp_path / "again.nii.gz"), LOGITS)
    np.testing.assert_array_equal(nib.load(tmp_path / "again.nii.gz").affine, nib.load(files["image"]).affine)


def test_npz_says_which_kind_its_values_are(files, tmp_path):
    convert(files["logits"], tmp_path / "p.nii.gz", "--to", "probabilities")
    convert(tmp_path / "p.nii.gz", tmp_path / "p.npz")
    with np.load(tmp_path / "p.npz") as archive:
        assert list(archive) == ["probabilities"]
    convert(tmp_path / "p.npz", tmp_path / "p2.npz")
    with np.load(tmp_path / "p2.npz") as archive:
        assert list(archive) == ["probabilities"]


def test_softmax_argmax_and_logarithm(files, tmp_path):
    convert(files["logits"], tmp_path / "p.nii.gz", "--to", "probabilities")
    # A softmax of four float32 numbers: a few roundings of 6e-8 each.
    np.testing.assert_allclose(load_nifti(tmp_path / "p.nii.gz"), PROBABILITIES, rtol=2e-6, atol=1e-7)
    for source in (files["logits"], tmp_path / "p.nii.gz"):
        convert(source, tmp_path / "l.nii.gz", "--to", "labels")
        np.testing.assert_array_equal(load_nifti(tmp_path / "l.nii.gz"), LABELS)
        assert nib.load(tmp_path / "l.nii.gz").get_data_dtype() == np.uint8
    convert(tmp_path / "p.nii.gz", tmp_path / "again.nii.gz", "--to", "logits")
    # Logits are known up to one constant a voxel; probabilities below 1e-7 are raised to it.
    expected = np.log(np.maximum(PROBABILITIES, 1e-7))
    np.testing.assert_allclose(load_nifti(tmp_path / "again.nii.gz"), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param(["{labels}", "{root}/x.nii.gz", "--to", "probabilities"], "a label map cannot become probabilities", id="labels"),
        pytest.param(["{labels}", "{root}/x.npz"], "x.npz", id="labels to npz"),
        pytest.param(["{logits}", "{root}/x.png"], "x.png: unknown file type", id="unknown target"),
        pytest.param(["{root}/nowhere.nii", "{root}/x.nii"], "nowhere.nii: no such file", id="no source"),
        pytest.param(["{logits}", "{logits}"], "is also the input", id="onto itself"),
        pytest.param(["{logits}", "{image}", "--like", "{image}"], "is also the input", id="onto --like"),
        pytest.param(["{cut}", "{root}/x.npz", "--to", "labels"], "unknown file type", id="refused before it is read"),
        pytest.param(["{logits}", "{root}/nowhere/x.nii"], "there is no folder", id="no folder"),
        pytest.param(["{logits}", "{root}/x.nii", "--like", "{other}"], "not on the grid of --like", id="other grid"),
        pytest.param(["{archive}", "{root}/x.nii", "--like", "{other}"], "not on the grid of --like", id="other grid of an archive"),
        pytest.param(["{float}", "{root}/x.nii"], "not a label map", id="an image"),
    ],
)
def test_bad_input(files, tmp_path, arguments, expected):
    other = save_nifti(tmp_path / "other.nii.gz", LABELS[:-1])
    floats = save_nifti(tmp_path / "float.nii.gz", LOGITS[..., 0])
    archive = tmp_path / "archive.npz"
    np.savez_compressed(archive, logits=LOGITS.T)
    (tmp_path / "cut.nii.gz").write_bytes(files["logits"].read_bytes()[:9999])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    places = {**files, "root": tmp_path, "other": other, "float": floats, "archive": archive, "cut": tmp_path / "cut.nii.gz"}
    result = run_here("convert", *(text.format(**places) for text in arguments))
    assert result.status == 1
    assert result.stdout == ""
    assert result.stderr.startswith("crfrefine: error: ")
    assert expected in result.stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("end", "voxels", "as_like"), [(".mhd", ".zraw", False), (".nhdr", ".raw.gz", True)])
def test_the_voxels_of_an_input_are_never_replaced(files, tmp_path, end, voxels, as_like):
    """A header in capitals is another file, but its voxels have the name that the target's would get."""
    sitk.WriteImage(sitk.ReadImage(str(files["labels"])), str(tmp_path / f"a{end}"), useCompression=True)
    source = (tmp_path / f"a{end}").rename(tmp_path / f"a{end.upper()}")
    before = (tmp_path / f"a{voxels}").read_bytes()
    arguments = (files["labels"], tmp_path / f"a{end}", "--like", source) if as_like else (source, tmp_path / f"a{end}")
    result = run_here("convert", *arguments)
    assert result.status == 1
    assert "is also the input" in result.stderr
    assert (tmp_path / f"a{voxels}").read_bytes() == before
    assert not (tmp_path / f"a{end}").exists()


def test_an_image_of_whole_numbers_is_called_an_image(files, tmp_path):
    image = save_nifti(tmp_path / "scan.nii.gz", np.random.default_rng(0).integers(0, 900, GRID_SHAPE).astype(np.int16))
    told = run_here("convert", image, tmp_path / "out.nrrd")
    assert told.status == 0
    assert told.stderr == f"{image}: image, 18×15×11 -> {tmp_path / 'out.nrrd'}: image\n"
    assert ": label map" in run_here("convert", files["labels"], tmp_path / "out.nrrd").stderr


def test_a_note_is_a_line_of_its_own(files, tmp_path):
    (tmp_path / "dataset.json").write_text("no JSON")
    lines = run_here("convert", files["logits"], tmp_path / "out.nrrd").stderr.splitlines()
    assert lines[0].endswith("continuing without it")
    assert "out.nrrd" in lines[1]
