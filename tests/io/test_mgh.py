"""FreeSurfer's volumes: compared with nibabel, both ways."""

import gzip

import nibabel as nib
import numpy as np
import pytest
from io_helpers import OBLIQUE, affine_of, numbers, save_nifti

from crfrefine import io

SHAPE = (5, 6, 7)
AFFINE = affine_of((0.7, 1.1, 2.5), (10.0, -20.0, 30.0), OBLIQUE)


def save(path, data, affine=AFFINE):
    content = nib.MGHImage(data, affine).to_bytes()
    path.write_bytes(gzip.compress(content) if path.name.endswith("z") else content)
    return path


@pytest.mark.parametrize(
    ("name", "dtype"), [("a.mgz", np.uint8), ("a.mgh", np.int16), ("a.mgh.gz", np.int32), ("a.MGZ", np.float32)], ids=str
)
def test_voxels_and_geometry_are_those_of_nibabel(name, dtype, tmp_path):
    data = numbers(SHAPE, dtype=dtype)
    read = io.read_volume(save(tmp_path / name.lower(), data).rename(tmp_path / name))
    np.testing.assert_array_equal(read.data, data)
    np.testing.assert_allclose(read.affine, AFFINE, atol=1e-5)
    np.testing.assert_allclose(read.spacing, (0.7, 1.1, 2.5), rtol=1e-6)
    assert read.header.dtype == np.dtype(dtype).name
    assert read.header.remarks == ()


def test_a_header_without_place_is_said(tmp_path):
    path = save(tmp_path / "a.mgh", numbers(SHAPE))
    content = path.read_bytes()
    path.write_bytes(content[:28] + bytes(2) + content[30:])
    read = io.read_volume(path)
    assert "coronal slices of 1 mm" in read.header.notes[0]
    np.testing.assert_allclose(read.affine, nib.MGHImage.from_bytes(path.read_bytes()).affine)


@pytest.mark.parametrize(("name", "largest"), [("out.mgz", 3), ("out.mgh", 300), ("out.mgh.gz", 300)])
def test_label_maps_are_read_by_nibabel(name, largest, tmp_path):
    like = io.read_volume(save(tmp_path / "like.mgz", numbers(SHAPE)))
    labels = numbers(SHAPE, dtype=np.int32) % 4 * (largest // 3)
    io.write_label_map(tmp_path / name, labels, like)
    content = (tmp_path / name).read_bytes()
    written = nib.MGHImage.from_bytes(gzip.decompress(content) if name.endswith("z") else content)
    np.testing.assert_array_equal(np.asarray(written.dataobj), labels)
    np.testing.assert_array_equal(written.affine, like.affine)
    assert written.get_data_dtype() == (">u1" if largest == 3 else ">i4")
    np.testing.assert_array_equal(io.read_labels(tmp_path / name).data, labels)
    assert io.is_whole(tmp_path / name)


@pytest.mark.parametrize("shape", [SHAPE, (5, 6)])
def test_the_geometry_of_another_format_is_converted(shape, tmp_path):
    like = io.read_volume(save_nifti(tmp_path / "like.nii", numbers(shape), AFFINE))
    channels = numbers((3, *shape))
    io.write_channels(tmp_path / "out.mgz", channels, like)
    written = nib.MGHImage.from_bytes(gzip.decompress((tmp_path / "out.mgz").read_bytes()))
    np.testing.assert_array_equal(np.moveaxis(np.asarray(written.dataobj), 3, 0).reshape(channels.shape), channels)
    np.testing.assert_allclose(written.affine, like.affine, atol=1e-5)
    assert io.read_header(tmp_path / "out.mgz").on_same_grid(like.header)
    np.testing.assert_array_equal(io.read_logits([tmp_path / "out.mgz"]).values.reshape(channels.shape), channels)
