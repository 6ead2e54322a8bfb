"""Files that promise more than they hold, or more than memory holds: refused, or read without taking what they promise."""

import gzip
import struct

import numpy as np
import pytest
from io_helpers import affine_of, numbers, peak_memory, save_nifti

from crfrefine import io
from crfrefine.base.memory import SMALL, MemoryLimit
from crfrefine.errors import CapacityError
from crfrefine.io import decode

SHAPE = (4, 5, 6)
MIB = 1 << 20


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_skipping_to_far_voxels_takes_no_memory(suffix, tmp_path):
    """32 MiB before the voxels; blocks of 1 MiB are read. Ten of them allow for copies, and a third of what is skipped."""
    path = save_nifti(tmp_path / "near.nii", numbers(SHAPE), affine_of((1, 2, 3)))
    data = bytearray(path.read_bytes())
    data[108:112] = struct.pack("<f", 32 * MIB)
    data[352:352] = bytes(32 * MIB - 352)
    far = tmp_path / f"far{suffix}"
    far.write_bytes(gzip.compress(data, 1) if suffix == ".nii.gz" else data)
    del data
    read = []
    assert peak_memory(lambda: read.append(io.read_volume(far).data)) < 10 * MIB
    np.testing.assert_array_equal(read[0], numbers(SHAPE))


def test_an_npz_of_zeros_is_read(tmp_path):
    """The best that deflate can do, more than 1010 bytes in one, is not taken for damage."""
    path, zeros = tmp_path / "zeros.npz", np.zeros((3, 200, 210, 220), np.uint8)
    np.savez_compressed(path, logits=zeros)
    assert zeros.size > 1010 * path.stat().st_size
    assert io.read_header(path).num_channels == 3


def test_an_array_that_cannot_fit_is_refused_by_name_and_size(monkeypatch, tmp_path):
    monkeypatch.setattr(decode, "memory_limit", lambda: MemoryLimit(SMALL, "the batch system (X)"))
    decode.allocate_array((SMALL // 4,), tmp_path / "fits.nii.gz")
    with pytest.raises(CapacityError) as caught:
        decode.allocate_array((SMALL // 4 + 256,), tmp_path / "large.nii.gz")
    expected = (
        f"{tmp_path}/large.nii.gz: its voxels, read as float32, take 16.0 MiB of memory, more than the 16.0 MiB of the batch system (X)"
    )
    assert str(caught.value).splitlines()[0] == expected
