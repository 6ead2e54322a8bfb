"""nnU-Net's .npz, against numpy."""

import pickle
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from io_helpers import affine_of, numbers

from crfrefine import io
from crfrefine.errors import UnsupportedFormatError
from crfrefine.io.volume import Volume


@pytest.mark.parametrize(
    ("key", "save", "dtype"), [("probabilities", np.savez, "f8"), ("logits", np.savez_compressed, "f2"), ("logits", np.savez, ">f4")]
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


def arrays(**named):
    return partial(np.savez_compressed, **named)


def content(data):
    return partial(Path.write_bytes, data=data)


def member(dtype="<f4", shape="3, 2, 2, 2"):
    """An archive of an array whose header may make no sense."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({shape}), }}".encode()

    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("logits.npy", b"\x93NUMPY\2\0" + len(text).to_bytes(4, "little") + text + bytes(400))

    return write


def hollow(path):
    """The directory of the archive promises the array, too."""
    member(shape="3, 100, 1000, 1000")(path)
    with zipfile.ZipFile(path) as archive:
        size = archive.infolist()[0].file_size.to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(size, (2_000_000_000).to_bytes(4, "little")))


GRID = np.zeros((2, 3, 4, 5))
WRONG = {
    "objects": (arrays(logits=np.array([Bomb()], dtype=object)), "the array 'logits' is a pickle, which may run code and is never read"),
    "pickle": (content(pickle.dumps(Bomb())), "not an .npz file.*pickles are never read"),
    "version 1": (arrays(softmax=GRID), "the array `softmax` is that of nnU-Net version 1, on the network's cropped grid"),
    "none": (arrays(), "expected one array named probabilities or logits, found none"),
    "other names": (arrays(a=GRID, b=np.zeros(3)), "expected one array named probabilities or logits, found a, b"),
    "two": (arrays(logits=GRID, probabilities=GRID), "expected one array named probabilities or logits, found"),
    "plane": (arrays(logits=np.zeros((4, 5))), r"has shape \(4, 5\); expected \(channel, z, y, x\)"),
    "complex": (arrays(logits=GRID.astype(complex)), "holds complex128; expected real numbers"),
    "empty": (content(b""), "the file is empty"),
    "text": (content(b"patient,dice\n"), "not an .npz file, or cut off"),
    "zip magic": (content(b"PK\x03\x04" + bytes(100)), "not an .npz file, or cut off"),
    "digits": (member(shape="9" * 5000 + ", 2, 2"), ""),
    "width": (member(dtype="<f" + "9" * 5000), ""),
    "no comma": (member(shape="3 4, 2, 2"), ""),
    "no voxels": (member(shape="0, 3, 2, 2"), ""),
    "one deflated byte holds 1032": (hollow, r"damaged: .* shape \(3, 100, 1000, 1000\)"),
}


@pytest.mark.parametrize(("write", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_archive_of_logits_is_explained(write, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "case.npz")
    for read in (io.read_header, lambda path: io.read_logits([path])):
        with pytest.raises(UnsupportedFormatError, match=rf"case\.npz: (?s:.*){message}") as caught:
            read(tmp_path / "case.npz")
    assert len(str(caught.value).removeprefix(str(tmp_path))) < 400
    assert not io.is_whole(tmp_path / "case.npz")
    assert not Path("exploded").exists()
