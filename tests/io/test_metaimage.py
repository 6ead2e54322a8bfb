"""MetaImage and NRRD, against SimpleITK: what one writes the other reads."""

import tempfile
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from hypothesis import given, settings
from hypothesis import strategies as st
from io_helpers import OBLIQUE, affine_of, affines, grid_shapes, itk_affine, itk_array, numbers, save_itk, volume

from crfrefine import io
from crfrefine.errors import UnsupportedFormatError

SUFFIXES = [".mhd", ".mha", ".nrrd", ".nhdr"]
# Text headers keep all digits; direction times spacing and back costs two roundings of float64, at positions up to 1000 mm.
FLOAT64_MM = 1e-12


@settings(deadline=None, max_examples=40)
@given(shape=grid_shapes(), affine=affines(), suffix=st.sampled_from(SUFFIXES), largest=st.sampled_from([1, 255, 256, 65535]))
def test_simpleitk_reads_the_label_maps_written(shape, affine, suffix, largest):
    if len(shape) == 2:
        affine = affine_of((0.7, 1.3, 1.0), (5.25, -6.125, 0.0))
    labels = numbers(shape, dtype=np.int64) % (largest + 1)
    labels.flat[0] = largest
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "case" + suffix)
        io.write_label_map(path, labels, volume(labels, affine))
        itks = sitk.ReadImage(str(path))
        assert itks.GetPixelID() == (sitk.sitkUInt8 if largest <= 255 else sitk.sitkUInt16)
        np.testing.assert_array_equal(itk_array(itks), labels)
        np.testing.assert_allclose(itk_affine(itks), affine, atol=FLOAT64_MM)
        ours = io.read_labels(path)
        np.testing.assert_array_equal(ours.data, labels)
        np.testing.assert_allclose(ours.affine, affine, atol=FLOAT64_MM)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_geometry_is_kept_to_the_last_bit(suffix, tmp_path):
    image = save_itk(tmp_path / f"image{suffix}", numbers((4, 5, 6)), direction=OBLIQUE, spacing=(0.1, 1 / 3, 2.123456789012345))
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / f"image{suffix}"
    io.write_label_map(out, np.ones((4, 5, 6), np.uint8), io.read_volume(image))
    before, after = sitk.ReadImage(str(image)), sitk.ReadImage(str(out))
    assert before.GetOrigin() == after.GetOrigin()
    assert before.GetSpacing() == after.GetSpacing()
    assert before.GetDirection() == after.GetDirection()
    names = {".mhd": {"image.mhd", "image.zraw"}, ".nhdr": {"image.nhdr", "image.raw.gz"}}
    assert {path.name for path in out.parent.iterdir()} == names.get(suffix, {f"image{suffix}"})
    io.write_label_map(tmp_path / "back.nii.gz", np.ones((4, 5, 6), np.uint8), io.read_volume(out))
    np.testing.assert_allclose(nib.load(tmp_path / "back.nii.gz").affine, itk_affine(before), atol=1e-5)  # float32 in NIfTI


@pytest.mark.parametrize(("suffix", "shape"), [(".mhd", (4, 5)), (".mha", (4, 5, 6)), (".nrrd", (4, 5)), (".nhdr", (4, 5, 6))])
def test_channels_written_are_read_by_simpleitk(suffix, shape, tmp_path):
    logits = numbers((3, *shape)) - 30.5
    like = io.read_volume(save_itk(tmp_path / f"image{suffix}", numbers(shape)))
    io.write_channels(tmp_path / f"logits{suffix}", logits, like)
    itks = sitk.ReadImage(str(tmp_path / f"logits{suffix}"))
    np.testing.assert_array_equal(itk_array(itks), logits)
    np.testing.assert_array_equal(itk_affine(itks), like.affine)
    read = io.read_logits([tmp_path / f"logits{suffix}"])
    np.testing.assert_array_equal(read.values, logits)
    np.testing.assert_array_equal(read.affine, like.affine)
    assert read.values.strides[1] == 4, "x is the fastest axis"


def test_sheared_axes_are_refused(tmp_path):
    affine = affine_of((1.0, 2.0, 3.0))
    affine[0, 1] = 0.4
    labels = np.ones((3, 4, 5), np.uint8)
    with pytest.raises(UnsupportedFormatError, match=r"cannot hold the sheared axes of the volume; write NIfTI"):
        io.write_label_map(tmp_path / "a.mhd", labels, volume(labels, affine))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("suffix", "compress"), [(".mhd", True), (".mha", False), (".nrrd", True), (".nhdr", False)])
def test_every_cut_is_noticed(suffix, compress, tmp_path, capfd):
    path = save_itk(tmp_path / f"a{suffix}", numbers((4, 5, 6)), compress=compress)
    voxels = next((file for file in tmp_path.iterdir() if file != path), path)
    content = voxels.read_bytes()
    for length in [*range(0, len(content), 61), len(content) - 1]:
        voxels.write_bytes(content[:length])
        with pytest.raises(UnsupportedFormatError, match=r"a\..*(cut off|is empty|not a MetaImage|not an NRRD|cannot read)"):
            io.read_volume(path)
        assert not io.is_whole(path)
    out, err = capfd.readouterr()
    assert (out, err) == ("", ""), "only the error itself may report anything"


def test_a_wrong_promise_of_compressed_bytes(tmp_path):
    """Too few bytes promised are not believed: SimpleITK leaves the last voxels at zero without a word."""
    data = numbers((6, 5, 4), dtype="<i2")
    for voxels in (data, data[:3]):
        packed = zlib.compress(voxels.tobytes())
        (tmp_path / "a.zraw").write_bytes(packed)
        lines = ["NDims = 3", "DimSize = 4 5 6", "ElementType = MET_SHORT", "CompressedData = True"]
        lines += [f"CompressedDataSize = {len(packed) - 30}", "ElementDataFile = a.zraw", ""]
        (tmp_path / "a.mhd").write_text("\n".join(lines))
        if voxels is data:
            np.testing.assert_array_equal(io.read_volume(tmp_path / "a.mhd").data, data.transpose())
    with pytest.raises(
        UnsupportedFormatError, match=r"a\.zraw: the file is cut off: its header promises 240 bytes of voxels, it holds 120"
    ):
        io.read_volume(tmp_path / "a.mhd")
