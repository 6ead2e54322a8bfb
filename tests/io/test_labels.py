"""Label maps and masks: read piece by piece, a byte or two per voxel."""

import tracemalloc

import numpy as np
import pytest
from io_helpers import affine_of, save_itk, save_nifti

from crfrefine import io
from crfrefine.errors import InputError
from crfrefine.io.labels import read_where, read_whole_numbers

SHAPE = (70, 190, 180)  # Several pieces, whatever the type.
TYPES = ["uint8", "int8", "int16", "uint16", "int32", "int64", "float32", "float64"]


def saved(path, data):
    if path.suffix == ".gz":
        return save_nifti(path, data.astype("int32") if data.dtype == "int64" else data, affine_of((1, 2, 3)))
    return save_itk(path, data, compress=False)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ["a.nii.gz", "a.mha", "a.nrrd"])
@pytest.mark.parametrize(("largest", "expected"), [(117, np.uint8), (255, np.uint8), (256, np.uint16), (65535, np.uint16)])
def test_the_smallest_type_whatever_is_stored(dtype, name, largest, expected, tmp_path):
    """The largest label is in the last plane, where most pieces are in place already."""
    if np.dtype(dtype).kind in "iu" and largest > np.iinfo(dtype).max:
        largest, expected = np.iinfo(dtype).max, np.uint8 if dtype in ("uint8", "int8") else expected
    labels = (np.arange(np.prod(SHAPE)) % 101).reshape(SHAPE).astype(dtype)
    labels[-3, -2, -1] = largest
    read = io.read_labels(saved(tmp_path / name, labels))
    assert read.data.dtype == expected
    np.testing.assert_array_equal(read.data, labels)
    mask = io.read_mask(tmp_path / name)
    assert mask.data.dtype == np.bool_
    np.testing.assert_array_equal(mask.data, labels != 0)


@pytest.mark.parametrize(("low", "high"), [(-3, 7), (0, 70000)])
def test_the_range_of_all_voxels_is_told(low, high, tmp_path):
    values = np.zeros(SHAPE, np.int32)
    values[0, 0, 0], values[-1, -1, -1] = low, high
    path = saved(tmp_path / "a.nii.gz", values)
    with pytest.raises(InputError, match=rf"a\.nii\.gz: not a label map: expected labels from 0 to 65535, found {low} to {high}$"):
        io.read_labels(path)


def test_how_far_from_whole_numbers_is_told(tmp_path):
    values = np.ones(SHAPE, np.float32)
    values[0, 0, 0], values[-1, -1, -1] = 1.375, 0.75
    path = saved(tmp_path / "a.nii.gz", values)
    with pytest.raises(InputError, match=r"a\.nii\.gz: not a label map: expected whole numbers, found values up to 0\.38 away from one"):
        io.read_labels(path)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
@pytest.mark.parametrize("read", [read_whole_numbers, lambda header: read_where(header, np.isfinite)], ids=["labels", "mask"])
def test_a_byte_per_voxel_and_a_few_megabytes(dtype, read, tmp_path):
    """Neither a float32 array nor a second one of the stored type."""
    shape = (256, 256, 300)
    values = np.zeros(shape, dtype, order="F")
    values[..., 9] = 3
    header = io.read_header(save_nifti(tmp_path / "a.nii", values))
    tracemalloc.start()
    try:
        read(header)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < np.prod(shape) + (8 << 20)


def test_several_values_per_voxel_are_no_labels(tmp_path):
    path = save_nifti(tmp_path / "a.nii", np.zeros((4, 5, 6, 2), np.uint8))
    with pytest.raises(InputError, match="expected a label map with one value per voxel, this file has 2"):
        io.read_labels(path)
    with pytest.raises(InputError, match="expected a mask with one value per voxel, this file has 2"):
        io.read_mask(path)
