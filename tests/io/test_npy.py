"""NumPy's .npy as logits, against numpy."""

import numpy as np
import pytest
from io_helpers import affine_of, numbers

from crfrefine import io
from crfrefine.errors import UnsupportedFormatError
from crfrefine.io.volume import Volume


@pytest.mark.parametrize("dtype", ["f2", ">f4", "i2", "f8"])
def test_label_z_y_x_becomes_label_x_y_z(dtype, tmp_path):
    stored = numbers((3, 6, 5, 4)).astype(dtype)
    np.save(tmp_path / "case.npy", stored)
    logits = io.read_logits([tmp_path / "case.npy"])
    assert logits.values.dtype == np.float32
    np.testing.assert_array_equal(logits.values, stored.transpose(0, 3, 2, 1))
    assert (logits.kind, logits.affine, logits.header.grid_shape) == (None, None, (4, 5, 6))


def test_numpy_reads_what_is_written(tmp_path):
    values = numbers((3, 4, 5, 6)) / 7
    io.write_channels(tmp_path / "a.npy", values, Volume(values[0], affine_of((1, 2, 3)), (1.0, 2.0, 3.0)))
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy", allow_pickle=False), values.transpose(0, 3, 2, 1))
    assert io.is_whole(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([None, {}], dtype=object), "pickle"),
        (np.zeros((4, 5), "f4"), "has shape"),
        (np.zeros((2, 3, 4, 5), "c8"), "real numbers"),
        (np.asfortranarray(numbers((3, 6, 5, 4))), "Fortran order"),
    ],
)
def test_arrays_that_are_no_scores(array, words, tmp_path):
    np.save(tmp_path / "case.npy", array, allow_pickle=True)
    with pytest.raises(UnsupportedFormatError, match=words):
        io.read_header(tmp_path / "case.npy")


def test_cut_off(tmp_path):
    path = tmp_path / "case.npy"
    np.save(path, numbers((3, 6, 5, 4)).astype("f4"))
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UnsupportedFormatError, match="cut off"):
        io.read_header(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UnsupportedFormatError, match="damaged"):
        io.read_header(path)
