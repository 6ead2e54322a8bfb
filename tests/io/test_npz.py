"""nnU-Net's .npz and NumPy's .npy, against numpy."""

import pickle
import zipfile
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from io_helpers import affine_of, numbers

from crfrefine import io
from crfrefine.errors import UnsupportedFormatError
from crfrefine.io.volume import header_of_grid

SAVED = {
    "compressed half": ("a.npz", "logits", np.savez_compressed, "f2"),
    "Fortran double": ("a.npz", "probabilities", np.savez, "f8"),
    "big-endian": ("a.npz", "logits", np.savez, ">f4"),
    "npy of half": ("a.npy", None, np.save, "f2"),
    "npy of integers": ("a.npy", None, np.save, ">i2"),
    "npy of Fortran double": ("a.npy", None, np.save, "f8"),
}


@pytest.mark.parametrize(("name", "key", "save", "dtype"), SAVED.values(), ids=SAVED)
def test_label_z_y_x_becomes_label_x_y_z(name, key, save, dtype, tmp_path):
    """float16 keeps whole numbers up to 2048: all that are here."""
    stored = numbers((3, 6, 5, 4)).astype(dtype)
    if dtype == "f8":
        stored = np.asfortranarray(stored)
    if key is None:
        save(tmp_path / name, stored)
    else:
        save(tmp_path / name, **{"spacing": np.ones(3), key: stored})
    logits = io.read_logits([tmp_path / name])
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, stored.transpose(0, 3, 2, 1))
    header = io.read_header(tmp_path / name)
    assert (header.kind, header.affine, header.orientation) == (key, None, None)
    assert (header.num_channels, header.grid_shape) == (3, (4, 5, 6))
    assert header.dtype == np.dtype(dtype).name
    assert header.notes == ()


@pytest.mark.parametrize(
    ("suffix", "kind"), [(".npz", "logits"), (".npz", "probabilities"), (".npy", None)]
)
def test_numpy_reads_what_is_written(suffix, kind, tmp_path):
    values = numbers((3, 4, 5, 6)) / 7
    path = tmp_path / f"a{suffix}"
    io.write_channels(
        path, values, header_of_grid(values.shape[1:], affine_of((1, 2, 3))), kind=kind or "logits"
    )
    loaded = np.load(path, allow_pickle=False)
    assert kind is None or loaded.files == [kind]
    if kind is not None:
        loaded = loaded[kind]
    np.testing.assert_array_equal(loaded, values.transpose(0, 3, 2, 1))
    assert io.read_header(path).kind == kind
    assert io.is_intact(path)


class Bomb:
    def __reduce__(self):
        return (Path.write_text, (Path("exploded"), "a pickle was read"))


def arrays(**named):
    return partial(np.savez_compressed, **named)


def npy(array):
    """An array under the name of an archive: the content tells."""
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return content(buffer.getvalue())


def content(data):
    return partial(Path.write_bytes, data=data)


def member(dtype="<f4", shape="3, 2, 2, 2"):
    """An archive of an array whose header may make no sense."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({shape}), }}".encode()

    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(
                "logits.npy", b"\x93NUMPY\2\0" + len(text).to_bytes(4, "little") + text + bytes(400)
            )

    return write


def hollow(path):
    """The directory of the archive promises the array, too."""
    member(shape="3, 100, 1000, 1000")(path)
    with zipfile.ZipFile(path) as archive:
        size = archive.infolist()[0].file_size.to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(size, (2_000_000_000).to_bytes(4, "little")))


def misplaced(path):
    """The archive says that its directory begins behind its end."""
    np.savez(path, logits=GRID)
    data = path.read_bytes()
    place = data.rfind(b"PK\5\6") + 16
    path.write_bytes(data[:place] + (1 << 30).to_bytes(4, "little") + data[place + 4 :])


GRID = np.zeros((2, 3, 4, 5))
WRONG = {
    "objects": (
        arrays(logits=np.array([Bomb()], dtype=object)),
        "the array 'logits' is a pickle, which may run code and is never read",
    ),
    "pickle": (content(pickle.dumps(Bomb())), "not an .npz file.*pickles are never read"),
    "version 1": (
        arrays(softmax=GRID),
        "the array `softmax` is that of nnU-Net version 1, on the network's cropped grid",
    ),
    "none": (arrays(), "expected one array named probabilities or logits, found none"),
    "other names": (
        arrays(a=GRID, b=np.zeros(3)),
        "expected one array named probabilities or logits, found a, b",
    ),
    "two": (
        arrays(logits=GRID, probabilities=GRID),
        "expected one array named probabilities or logits, found",
    ),
    "plane": (
        arrays(logits=np.zeros((4, 5))),
        r"has shape \(4, 5\); expected \(channel, z, y, x\)",
    ),
    "complex": (arrays(logits=GRID.astype(complex)), "holds complex128; expected real numbers"),
    "empty": (content(b""), "the file is empty"),
    "text": (content(b"patient,dice\n"), "not an .npz file, or cut off"),
    "misplaced directory": (misplaced, "damaged zip directory"),
    "zip magic": (content(b"PK\x03\x04" + bytes(100)), "not an .npz file, or cut off"),
    "digits": (member(shape="9" * 5000 + ", 2, 2"), ""),
    "width": (member(dtype="<f" + "9" * 5000), ""),
    "no comma": (member(shape="3 4, 2, 2"), ""),
    "no voxels": (member(shape="0, 3, 2, 2"), ""),
    "npy of objects": (npy(np.array([Bomb()], dtype=object)), "the array is a pickle"),
    "npy of a plane": (npy(np.zeros((4, 5), "f4")), "the array has shape"),
    "npy of complex numbers": (
        npy(np.zeros((2, 3, 4, 5), "c8")),
        "the array holds complex64; expected real numbers",
    ),
    "one deflated byte holds 1032": (hollow, r"damaged: .* shape \(3, 100, 1000, 1000\)"),
}


@pytest.mark.parametrize(("write", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_array_of_logits_is_explained(write, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "case.npz")
    for read in (io.read_header, lambda path: io.read_logits([path])):
        with pytest.raises(UnsupportedFormatError, match=rf"case\.npz: (?s:.*){message}") as caught:
            read(tmp_path / "case.npz")
    assert len(str(caught.value).removeprefix(str(tmp_path))) < 400
    assert not io.is_intact(tmp_path / "case.npz")
    assert not Path("exploded").exists()
