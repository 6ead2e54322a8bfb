"""Files that promise more than memory holds, files that change while they are read, and label maps
and masks.
"""

import gzip
import os
import re
import struct

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from io_helpers import affine_of, affines, numbers, peak_memory, save_itk, save_nifti

from crfrefine import io
from crfrefine.base.geometry import is_sheared, orientation_codes, same_grid, spacing_of
from crfrefine.base.limits import SMALL
from crfrefine.errors import CapacityError, InputError, UnsupportedFormatError
from crfrefine.io import streams
from crfrefine.io.reading import read_mask, read_pieces, read_whole_numbers
from crfrefine.io.volume import header_of_grid

SHAPE = (4, 5, 6)
MIB = 1 << 20


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_skipping_to_far_voxels_takes_no_memory(suffix, tmp_path):
    """32 MiB before the voxels; blocks of 1 MiB are read. Ten of them allow for copies, and a third
    of what is skipped.
    """
    path = save_nifti(tmp_path / "near.nii", numbers(SHAPE), affine_of((1, 2, 3)))
    data = bytearray(path.read_bytes())
    data[108:112] = struct.pack("<f", 32 * MIB)
    data[352:352] = bytes(32 * MIB - 352)
    far = tmp_path / f"far{suffix}"
    if suffix == ".nii.gz":
        data = gzip.compress(data, 1)
    far.write_bytes(data)
    del data
    read = []
    assert peak_memory(lambda: read.append(io.read_volume(far).data)) < 10 * MIB
    np.testing.assert_array_equal(read[0], numbers(SHAPE))


def test_an_npz_of_zeros_is_read(tmp_path):
    """The best that deflate can do, more than 1010 bytes in one, is not taken for damage."""
    path = tmp_path / "zeros.npz"
    zeros = np.zeros((3, 200, 210, 220), np.uint8)
    np.savez_compressed(path, logits=zeros)
    assert zeros.size > 1010 * path.stat().st_size
    assert io.read_header(path).num_channels == 3


def test_an_array_that_cannot_fit_is_refused_by_name_and_size(control_group, tmp_path):
    (control_group / "memory.max").write_text(f"{SMALL}\n", encoding="ascii")
    streams.allocate_array((SMALL // 4,), tmp_path / "fits.nii.gz")
    expected = (
        "large.nii.gz: its voxels, read as float32, take 16.0 MiB of memory, "
        "more than the 16.0 MiB of the control group (cgroup) of this process"
    )
    with pytest.raises(CapacityError, match=re.escape(expected)):
        streams.allocate_array((SMALL // 4 + 256,), tmp_path / "large.nii.gz")


PACKED = {
    "a.nii": False,
    "a.nii.gz": True,
    "a.mhd": True,
    "a.mha": False,
    "a.nrrd": True,
    "a.nhdr": False,
}


@pytest.mark.parametrize(("name", "is_packed"), PACKED.items())
def test_every_cut_is_noticed(name, is_packed, tmp_path, capfd):
    """In a file that is not compressed, from the header alone, before any voxel is read."""
    path = tmp_path / name
    if ".nii" in name:
        save_nifti(path, numbers(SHAPE))
    else:
        save_itk(path, numbers(SHAPE), compress=is_packed)
    # The voxels, if they are apart.
    cut = next((file for file in tmp_path.iterdir() if file != path), path)
    assert io.is_intact(path)
    content = cut.read_bytes()
    for length in [
        0,
        1,
        10,
        100,
        *range(300, len(content), 53),
        len(content) - 8,
        len(content) - 1,
    ]:
        cut.write_bytes(content[:length])
        for read in (io.read_volume, io.read_header)[: 1 if is_packed else 2]:
            with pytest.raises(
                UnsupportedFormatError,
                match=r"a\..*(cut off|is empty|not compressed|not a|cannot read)",
            ):
                read(path)
        assert not io.is_intact(path)
    assert capfd.readouterr() == ("", ""), "only the error itself may report anything"


@pytest.mark.parametrize("name", ["a.nii", "a.hdr", "a.mha", "a.mhd", "a.nrrd", "a.nhdr", "a.mgh"])
def test_what_is_behind_the_voxels_of_a_longer_file_is_ignored_with_a_note(name, tmp_path):
    """As in ITK and nibabel, which say nothing; FreeSurfer's programs write tags behind them."""
    path = tmp_path / name
    if name in ("a.mhd", "a.mha", "a.nrrd", "a.nhdr"):
        save_itk(path, numbers(SHAPE), compress=False)
    else:
        save_nifti(path, numbers(SHAPE))
    assert io.read_header(path).notes == ()
    longer = next((file for file in tmp_path.iterdir() if file != path), path)
    with longer.open("ab") as file:
        file.write(bytes(48))
    notes = [str(note) for note in io.read_header(path).notes]
    assert [note.startswith("48 bytes behind its voxels are ignored") for note in notes] == (
        [] if name == "a.mgh" else [True]
    )
    np.testing.assert_array_equal(io.read_volume(path).data, numbers(SHAPE))


CHANNELS = (4, 7, 6, 5)


def write(path, factor=1.0):
    values = (numbers(CHANNELS) * factor).astype(np.float32)
    io.write_channels(path, values, header_of_grid(CHANNELS[1:], affine_of((1.0, 1.5, 2.25))))
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".mhd", ".nhdr", ".npz"])
def test_a_file_replaced_after_its_header_was_read(suffix, tmp_path):
    """By one of the same size and shape, as a further run of a network would; voxels beside a
    header count.
    """
    path = write(tmp_path / f"a{suffix}")
    header = io.read_header(path)
    io.read_channels(header)
    if suffix == ".mhd":
        voxels = path.with_suffix(".zraw")
        os.utime(voxels, ns=(0, voxels.stat().st_mtime_ns + 1))
    else:
        write(path, factor=2.0)
    with pytest.raises(InputError, match="was changed while it was read; run again"):
        io.read_channels(header)


def test_a_file_cut_while_it_is_read_is_not_called_damaged(tmp_path):
    path = write(tmp_path / "a.nii")
    pieces = read_pieces(io.read_header(path), most_bytes=100)
    next(pieces)
    os.truncate(path, 400)
    with pytest.raises(InputError, match=r"a\.nii: was changed"):
        list(pieces)


LARGE = (70, 190, 180)  # Several pieces, whatever the type.


def saved(path, data):
    if ".nii" in path.name:
        if data.dtype == "int64":
            data = data.astype("int32")
        return save_nifti(path, data, affine_of((1, 2, 3)))
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
    labels = (np.arange(np.prod(LARGE)) % 101).reshape(LARGE).astype(dtype)
    labels[-3, -2, -1] = largest
    read = io.read_labels(saved(tmp_path / name, labels))
    assert read.data.dtype == expected
    np.testing.assert_array_equal(read.data, labels)


@pytest.mark.parametrize(("dtype", "read"), [("uint8", read_whole_numbers), ("float32", read_mask)])
def test_a_byte_per_voxel_and_a_few_megabytes(dtype, read, tmp_path):
    """Neither a float32 array nor a second one of the stored type."""
    shape = (160, 150, 400)
    values = np.zeros(shape, dtype, order="F")
    values[..., 9] = 3
    header = io.read_header(save_nifti(tmp_path / "a.nii", values))
    assert peak_memory(lambda: read(header)) < np.prod(shape) + (8 << 20)


@given(affines())
def test_spacing_orientation_and_right_angles_of_any_affine(affine):
    """The distance between neighboring voxels, to the rounding of float64: points are up to 500 mm
    away.
    """
    for axis in range(3):
        step = affine @ np.eye(4)[axis] - affine @ np.zeros(4)
        assert spacing_of(affine)[axis] == pytest.approx(np.linalg.norm(step[:3]), rel=1e-12)
    assert orientation_codes(affine) == "".join(nib.aff2axcodes(affine))
    assert orientation_codes(affine, 2) == orientation_codes(affine)[:2]
    assert not is_sheared(affine)
    affine[:3, 1] += 0.01 * affine[:3, 0]
    assert is_sheared(affine)


@given(affines(), st.integers(0, 2), st.sampled_from([-1, 1]))
def test_a_grid_equals_itself_in_float32_and_none_that_is_a_tenth_of_a_voxel_away_or_mirrored(
    affine, axis, sign
):
    """A tenth along the finest axis is ten times the tolerance; along others it is more."""
    shifted = affine.copy()
    shifted[:3, 3] += sign * 0.1 * affine[:3, axis]
    flip = np.eye(4)  # The same box in the world, the voxels in reverse order.
    flip[axis, axis] = -1
    flip[axis, 3] = (5, 6, 7)[axis] - 1
    assert not same_grid((5, 6, 7), affine, (5, 6, 7), shifted)
    assert not same_grid((5, 6, 7), affine, (5, 6, 7), affine @ flip)
    assert same_grid(
        (240, 200, 155), affine, (240, 200, 155), affine.astype(np.float32).astype(np.float64)
    )


@pytest.mark.parametrize(
    ("shape", "other", "same"),
    [((4, 5), (4, 5, 1), True), ((4, 5), (4, 5, 2), False), ((4, 1), (4,), False)],
)
def test_a_plane_equals_a_single_slice(shape, other, same):
    assert same_grid(shape, None, other, None) is same
    assert same_grid(other, None, shape, None) is same
    if len(shape) == 2 and len(other) == 3 and same:
        assert same_grid(shape, np.eye(4), other, affine_of((1, 1, 5)))
        assert same_grid(other, affine_of((1, 1, 5)), shape, np.eye(4))
