"""Label maps and masks: read piece by piece, a byte or two per voxel."""

import numpy as np
import pytest
from io_helpers import affine_of, peak_memory, save_itk, save_nifti

from crfrefine import io
from crfrefine.errors import InputError
from crfrefine.io.pieces import is_nonzero, read_mask, read_whole_numbers

SHAPE = (70, 190, 180)  # Several pieces, whatever the type.


def saved(path, data):
    if ".nii" in path.name:
        return save_nifti(path, data.astype("int32") if data.dtype == "int64" else data, affine_of((1, 2, 3)))
    return save_itk(path, data, compress=False)


@pytest.mark.parametrize(
    ("dtype", "name", "largest", "expected"),
    [
        ("uint8", "a.mha", 255, np.uint8),
        ("int16", "a.nii", 255, np.uint8),
        ("uint16", "a.mha", 256, np.uint16),
        ("int64", "a.nrrd", 65535, np.uint16),
        ("float64", "a.nii.gz", 256, np.uint16),
    ],
)
def test_the_smallest_type_whatever_is_stored(dtype, name, largest, expected, tmp_path):
    """The largest label is in the last plane, where most pieces are in place already."""
    labels = (np.arange(np.prod(SHAPE)) % 101).reshape(SHAPE).astype(dtype)
    labels[-3, -2, -1] = largest
    read = io.read_labels(saved(tmp_path / name, labels))
    assert read.data.dtype == expected
    np.testing.assert_array_equal(read.data, labels)


def test_how_far_from_whole_numbers_is_told(tmp_path):
    values = np.ones(SHAPE, np.float32)
    values[0, 0, 0], values[-1, -1, -1] = 1.375, 0.75
    path = saved(tmp_path / "a.nii", values)
    with pytest.raises(InputError, match=r"a\.nii: not a label map: expected whole numbers, found values up to 0\.38 away from one"):
        io.read_labels(path)


@pytest.mark.parametrize(
    ("dtype", "read"), [("uint8", read_whole_numbers), ("float32", lambda header: read_mask(header, np.isfinite))], ids=["labels", "mask"]
)
def test_a_byte_per_voxel_and_a_few_megabytes(dtype, read, tmp_path):
    """Neither a float32 array nor a second one of the stored type."""
    shape = (160, 150, 400)
    values = np.zeros(shape, dtype, order="F")
    values[..., 9] = 3
    header = io.read_header(save_nifti(tmp_path / "a.nii", values))
    assert peak_memory(lambda: read(header)) < np.prod(shape) + (8 << 20)


def test_several_values_per_voxel_are_no_mask(tmp_path):
    path = save_nifti(tmp_path / "a.nii", np.zeros((4, 5, 6, 2), np.uint8))
    with pytest.raises(InputError, match="expected a mask with one value per voxel, this file has 2"):
        read_mask(io.read_header(path), is_nonzero)
