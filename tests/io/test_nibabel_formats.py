"""NIfTI pairs, Analyze and FreeSurfer volumes: compared with nibabel and SimpleITK, both ways."""

import gzip

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from cli_helpers import files_in, run_here
from data_sets import found_cases
from io_helpers import OBLIQUE, affine_of, itk_affine, itk_array, numbers, save_nifti

from crfrefine import io
from crfrefine.errors import InputError, UnsupportedFormatError
from crfrefine.io.paths import files_read

SHAPE = (5, 6, 7)
AFFINE = affine_of((0.7, 1.1, 2.5), (10.0, -20.0, 30.0), OBLIQUE)


def save(folder, kind=nib.Nifti1Pair, data=None, affine=AFFINE):
    folder.mkdir(exist_ok=True)
    if data is None:
        data = numbers(SHAPE, dtype=np.int16)
    nib.save(kind(data, affine), folder / "a.img")
    return folder / "a.hdr"


@pytest.mark.parametrize(
    ("kind", "dtype"), [(nib.Nifti1Pair, np.float32), (nib.Nifti2Pair, np.int16)]
)
def test_a_nifti_pair_is_read_as_by_nibabel(kind, dtype, tmp_path):
    header = save(tmp_path, kind, numbers(SHAPE, dtype=dtype))
    for path in (header, header.with_suffix(".img")):
        read = io.read_volume(path)
        np.testing.assert_array_equal(read.data, numbers(SHAPE, dtype=dtype))
        np.testing.assert_allclose(read.affine, nib.load(header).affine)
        assert read.header.notes == ()
        assert read.header.path == header
        assert files_read(path) == (header, header.with_suffix(".img"))
    (tmp_path / "a.img.gz").write_bytes(gzip.compress((tmp_path / "a.img").read_bytes()))
    (tmp_path / "a.img").unlink()
    for path in (header, tmp_path / "a.img.gz"):
        np.testing.assert_array_equal(io.read_volume(path).data, numbers(SHAPE, dtype=dtype))


@pytest.mark.parametrize("kind", [nib.AnalyzeImage, nib.Spm99AnalyzeImage, nib.Spm2AnalyzeImage])
def test_analyze_is_read_as_by_nibabel(kind, tmp_path):
    header = save(tmp_path, kind, affine=np.diag([-0.7, 1.1, 2.5, 1.0]))
    (tmp_path / "a.mat").unlink(missing_ok=True)
    read = io.read_volume(header)
    np.testing.assert_array_equal(read.data, numbers(SHAPE, dtype=np.int16))
    np.testing.assert_allclose(read.affine, nib.load(header).affine)
    assert "which side is left" in str(read.header.notes[0])


MAKERS = {
    "pair": lambda folder: save(folder / "in"),
    "nifti": lambda folder: save_nifti(folder / "like.nii.gz", numbers(SHAPE), AFFINE),
    "plane": lambda folder: save_nifti(folder / "like.nii", numbers(SHAPE[:2]), AFFINE),
    "mgz": lambda folder: save_mgh(folder / "like.mgz", numbers(SHAPE)),
}
WRITTEN = ["hdr pair", "hdr nifti", "mgz mgz", "mgh mgz", "mgh.gz nifti", "mgz plane"]


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("largest", [3, 300])
def test_label_maps_and_channels_are_read_by_others(written, largest, tmp_path):
    ending, kind = written.split()
    like = io.read_header(MAKERS[kind](tmp_path))
    read = nib.load if ending == "hdr" else read_mgh
    path = tmp_path / f"a.{ending}"
    scores = tmp_path / f"scores.{ending}"
    labels = numbers(like.grid_shape, dtype=np.int32) % 4 * (largest // 3)
    io.write_label_map(path, labels, like)
    image = read(path)
    channels = numbers((3, *like.grid_shape))
    np.testing.assert_array_equal(np.asarray(image.dataobj).reshape(labels.shape), labels)
    np.testing.assert_allclose(image.affine, like.affine, atol=1e-5)
    np.testing.assert_array_equal(io.read_labels(path).data.reshape(labels.shape), labels)
    assert io.is_intact(path)
    assert io.read_header(path).on_same_grid(like)
    io.write_channels(scores, channels, like)
    stored = np.moveaxis(np.asarray(read(scores).dataobj), 3, 0)
    np.testing.assert_array_equal(stored.reshape(channels.shape), channels)
    np.testing.assert_array_equal(io.read_logits([scores]).reshape(channels.shape), channels)
    if ending == "hdr":
        assert isinstance(image, nib.Nifti1Pair)
        by_itk = sitk.ReadImage(str(path))
        np.testing.assert_array_equal(itk_array(by_itk), labels)
        np.testing.assert_allclose(itk_affine(by_itk), like.affine, atol=1e-4)
    else:
        assert image.get_data_dtype() == (">u1" if largest == 3 else ">i4")


def test_a_missing_half_is_told(tmp_path):
    header = save(tmp_path)
    voxels = tmp_path / "a.img"
    other = tmp_path / "b.img"
    voxels.rename(other)
    with pytest.raises(
        InputError,
        match=r"a\.hdr: its voxels are missing; expected them in .*a\.img, put both files",
    ):
        io.read_header(header)
    with pytest.raises(
        UnsupportedFormatError,
        match=r"b\.img: unknown file type.*\n  It is half of an Analyze .*: put",
    ):
        io.read_header(other)
    voxels.write_bytes(other.read_bytes()[:-3])
    with pytest.raises(UnsupportedFormatError, match="cut off"):
        io.read_header(header)


def test_pairs_are_cases_and_outputs(tmp_path):
    save(tmp_path / "images")
    np.savez(
        tmp_path / "a.npz",
        logits=np.random.default_rng(0).normal(size=(3, *SHAPE[::-1])).astype(np.float32),
    )
    assert [case.case_id for case in found_cases(tmp_path / "images", None)] == ["a"]
    for given in ("a.hdr", "a.img"):
        run_here(
            "infer",
            "-i",
            tmp_path / "images" / given,
            "-p",
            tmp_path / "a.npz",
            "-o",
            tmp_path / given[2:],
            status=0,
        )
        assert files_in(tmp_path / given[2:]) == ["a.hdr", "a.img"]


def save_mgh(path, data, affine=AFFINE):
    content = nib.MGHImage(data, affine).to_bytes()
    if path.name.endswith("z"):
        content = gzip.compress(content)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("a.mgz", np.uint8), ("a.mgh", np.int16), ("a.mgh.gz", np.int32), ("a.MGZ", np.float32)],
    ids=str,
)
def test_voxels_and_geometry_are_those_of_nibabel(name, dtype, tmp_path):
    data = numbers(SHAPE, dtype=dtype)
    read = io.read_volume(save_mgh(tmp_path / name.lower(), data).rename(tmp_path / name))
    np.testing.assert_array_equal(read.data, data)
    np.testing.assert_allclose(read.affine, AFFINE, atol=1e-5)
    np.testing.assert_allclose(read.spacing, (0.7, 1.1, 2.5), rtol=1e-6)
    assert read.header.dtype == np.dtype(dtype).name
    assert read.header.notes == ()


def test_a_header_without_place_is_said(tmp_path):
    path = save_mgh(tmp_path / "a.mgh", numbers(SHAPE))
    content = path.read_bytes()
    path.write_bytes(content[:28] + bytes(2) + content[30:])
    read = io.read_volume(path)
    assert "coronal slices of 1 mm" in str(read.header.notes[0])
    np.testing.assert_allclose(read.affine, nib.MGHImage.from_bytes(path.read_bytes()).affine)


def test_a_volume_that_is_compressed_twice_is_told(tmp_path):
    path = save_mgh(tmp_path / "a.mgz", numbers(SHAPE))
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(UnsupportedFormatError, match=r"not a FreeSurfer.*\n.*compressed twice"):
        io.read_header(path)


def read_mgh(path):
    content = path.read_bytes()
    if path.name.endswith("z"):
        content = gzip.decompress(content)
    return nib.MGHImage.from_bytes(content)
