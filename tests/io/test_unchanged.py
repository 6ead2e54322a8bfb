"""A file that is replaced, cut or removed between its header and its last voxel is an error, never a mixture of two files."""

import os

import numpy as np
import pytest
from io_helpers import affine_of, numbers

from crfrefine import io
from crfrefine.errors import InputError
from crfrefine.io.pieces import read_pieces
from crfrefine.io.volume import Volume
from crfrefine.io.volumes import allocate, read_into

SHAPE = (4, 7, 6, 5)


def write(path, factor=1.0):
    values = (numbers(SHAPE) * factor).astype(np.float32)
    io.write_channels(path, values, Volume(values[0], affine_of((1.0, 1.5, 2.25)), (1.0, 1.5, 2.25)))
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nhdr", ".npz"])
def test_a_file_replaced_after_its_header_was_read(suffix, tmp_path):
    """By one of the same size and shape, as a further run of a network would."""
    path = write(tmp_path / f"a{suffix}")
    header = io.read_header(path)
    read_into(header, allocate(header))
    write(path, factor=2.0)
    with pytest.raises(InputError, match="was changed while it was read; run again"):
        read_into(header, allocate(header))


def test_voxels_beside_a_header_count(tmp_path):
    path = write(tmp_path / "a.mhd")
    header = io.read_header(path)
    voxels = path.with_suffix(".zraw")
    os.utime(voxels, ns=(0, voxels.stat().st_mtime_ns + 1))
    with pytest.raises(InputError, match=r"a\.zraw: was changed"):
        read_into(header, allocate(header))


def test_a_file_cut_while_it_is_read_is_not_called_damaged(tmp_path):
    path = write(tmp_path / "a.nii")
    pieces = read_pieces(io.read_header(path), most_bytes=100)
    next(pieces)
    os.truncate(path, 400)
    with pytest.raises(InputError, match=r"a\.nii: was changed"):
        list(pieces)
