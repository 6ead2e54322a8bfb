"""nnU-Net's .npz, against numpy."""

import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from io_helpers import affine_of, numbers

from crfrefine import io
from crfrefine.errors import UnsupportedFormatError
from crfrefine.io.volume import Volume


@pytest.mark.parametrize(
    ("key", "save", "dtype"),
    [("probabilities", np.savez, "f8"), ("logits", np.savez_compressed, "f2"), ("logits", np.savez, ">f4")],
)
def test_label_z_y_x_becomes_label_x_y_z(key, save, dtype, tmp_path):
    """float16 keeps whole numbers up to 2048: all that are here."""
    stored = numbers((3, 6, 5, 4)).astype(dtype)
    stored = np.asfortranarray(stored) if key == "probabilities" else stored
    save(tmp_path / "case.npz", spacing=np.ones(3), **{key: stored})
    logits = io.read_logits([tmp_path / "case.npz"])
    assert logits.values.dtype == np.float32
    np.testing.assert_array_equal(logits.values, stored.transpose(0, 3, 2, 1))
    assert (logits.kind, logits.affine, logits.header.grid_shape) == (key, None, (4, 5, 6))
    header = io.read_header(tmp_path / "case.npz")
    assert (header.num_channels, header.grid_shape, header.dtype, header.orientation) == (3, (4, 5, 6), np.dtype(dtype).name, None)


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_numpy_reads_what_is_written(kind, tmp_path):
    values = numbers((3, 4, 5, 6)) / 7
    like = Volume(values[0], affine_of((1, 2, 3)), (1.0, 2.0, 3.0))
    written = set()
    for name in ("a.npz", "b.npz"):
        io.write_channels(tmp_path / name, values, like, kind=kind)
        written.add((tmp_path / name).read_bytes())
    assert len(written) == 1, "the same data give the same bytes"
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert archive.files == [kind]
        np.testing.assert_array_equal(archive[kind], values.transpose(0, 3, 2, 1))
    assert io.read_logits([tmp_path / "a.npz"]).kind == kind
    assert io.is_whole(tmp_path / "a.npz")


class Bomb:
    def __reduce__(self):
        return (Path.write_text, (Path("exploded"), "a pickle was read"))


def test_pickles_are_never_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "objects.npz", probabilities=np.array([Bomb()], dtype=object))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(
        UnsupportedFormatError, match=r"objects\.npz: the array 'probabilities' is a pickle, which may run code and is never read"
    ):
        io.read_logits([tmp_path / "objects.npz"])
    with pytest.raises(UnsupportedFormatError, match=r"pickle\.npz: not an \.npz file.*pickles are never read"):
        io.read_logits([tmp_path / "pickle.npz"])
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"softmax": np.zeros((2, 3, 4, 5), np.float16)},
            r"the array `softmax` is that of nnU-Net version 1, on the network's cropped grid",
        ),
        ({}, "expected one array named probabilities or logits, found none"),
        ({"a": np.zeros((2, 3, 4, 5)), "b": np.zeros(3)}, r"expected one array named probabilities or logits, found a, b"),
        (
            {"logits": np.zeros((2, 3, 4, 5)), "probabilities": np.zeros((2, 3, 4, 5))},
            "expected one array named probabilities or logits, found",
        ),
        ({"logits": np.zeros((4, 5))}, r"has shape \(4, 5\); expected \(channel, z, y, x\)"),
        ({"logits": np.zeros((2, 3, 4, 5), complex)}, "holds complex128; expected real numbers"),
    ],
    ids=["version 1", "none", "other names", "two", "shape", "complex"],
)
def test_other_contents_are_explained(arrays, message, tmp_path):
    np.savez_compressed(tmp_path / "case.npz", **arrays)
    with pytest.raises(UnsupportedFormatError, match=message) as caught:
        io.read_logits([tmp_path / "case.npz"])
    assert "case.npz" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"patient,dice\n", b"PK\x03\x04" + bytes(100)], ids=["empty", "text", "zip magic"])
def test_what_is_no_archive(content, tmp_path):
    (tmp_path / "case.npz").write_bytes(content)
    with pytest.raises(UnsupportedFormatError, match=r"case\.npz: (the file is empty|not an \.npz file, or cut off)"):
        io.read_logits([tmp_path / "case.npz"])
    assert not io.is_whole(tmp_path / "case.npz")


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("<f4", "9" * 5000 + ", 2, 2"),
        ("<f" + "9" * 5000, "3, 2, 2"),
        ("<f4", "3 4, 2, 2"),
        ("<f4", ", 3, 2, 2"),
        ("<f4", "0, 3, 2, 2"),
    ],
    ids=["digits", "width", "no comma", "no axis", "no voxels"],
)
def test_an_array_of_a_shape_that_makes_no_sense(tmp_path, dtype, shape):
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({shape}), }}".encode()
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("logits.npy", b"\x93NUMPY\2\0" + len(text).to_bytes(4, "little") + text + bytes(400))
    with pytest.raises(UnsupportedFormatError) as caught:
        io.read_header(tmp_path / "a.npz")
    assert len(str(caught.value).removeprefix(str(tmp_path))) < 300


@pytest.mark.parametrize("names", [("logits", "logits.npy"), ("logits.npy", "logits.npy")])
def test_two_members_of_one_name_are_refused(names, tmp_path):
    """numpy takes `logits`, and the last one of two."""
    np.save(tmp_path / "a.npy", numbers((3, 6, 5, 4)))
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "case.npz", "w") as archive:
        warnings.simplefilter("ignore")  # zipfile's, of a name that is there twice.
        for name in names:
            archive.write(tmp_path / "a.npy", name)
    with pytest.raises(
        UnsupportedFormatError, match=r"case\.npz: expected one array 'logits', found logits(\.npy)?, logits(\.npy)?: programs differ"
    ):
        io.read_header(tmp_path / "case.npz")
