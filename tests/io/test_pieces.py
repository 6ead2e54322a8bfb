"""Reading and writing piece by piece, against the dense reader and writer: every format, layout and
type.
"""

import gzip
import threading
import zlib

import numpy as np
import pytest
from io_helpers import affine_of, meta_text, nrrd_text, peak_memory, save_nifti

from crfrefine import io
from crfrefine.errors import InputError, UnsupportedFormatError
from crfrefine.io.volume import header_of_grid

SHAPE = (3, 7, 5, 4)  # channels, z, y, x
# Type, and its names in NRRD and MetaImage.
TYPE_NAMES = {
    **{
        "u1": ("uint8", "MET_UCHAR"),
        "i1": ("int8", "MET_CHAR"),
        "i2": ("int16", "MET_SHORT"),
        "u2": ("uint16", "MET_USHORT"),
    },
    **{"i4": ("int32", "MET_INT"), "f4": ("float", "MET_FLOAT"), "f8": ("double", "MET_DOUBLE")},
}


def values_of(dtype, shape=SHAPE):
    """Different numbers where the type has room for them, negative ones where it has a sign."""
    count = np.arange(np.prod(shape)) % 251
    if np.dtype(dtype).kind != "u":
        count -= 120
    return count.reshape(shape).astype(dtype)


def nrrd(path, values, *, channel_axis, encoding="raw", encode=bytes):
    """Write a file whose axes, slowest first, have the channels at `channel_axis` of (z, y, x) with
    the channels put in.
    """
    stored = np.ascontiguousarray(np.moveaxis(values, 0, channel_axis))
    directions = [f"({','.join(map(str, row))})" for row in np.diag(range(1, values.ndim))]
    kinds = ["domain"] * len(directions)
    directions.insert(stored.ndim - 1 - channel_axis, "none")
    kinds.insert(stored.ndim - 1 - channel_axis, "vector")
    lines = (
        f"space dimension: {values.ndim - 1}",
        f"space directions: {' '.join(directions)}",
        f"kinds: {' '.join(kinds)}",
    )
    fields = {
        "type": TYPE_NAMES[stored.dtype.str[1:]][0],
        "sizes": " ".join(map(str, stored.shape[::-1])),
        "encoding": encoding,
    }
    path.write_bytes(
        nrrd_text(*lines, dimension=str(stored.ndim), **fields) + encode(stored.tobytes())
    )
    return path


def metaimage(path, values, *, vectors):
    stored = values
    sizes = values.shape
    num_channels = "-"
    if vectors:
        stored = np.ascontiguousarray(np.moveaxis(values, 0, -1))
        sizes = stored.shape[:3]
        num_channels = str(len(values))
    fields = {
        "NDims": str(len(sizes)),
        "DimSize": " ".join(map(str, sizes[::-1])),
        "ElementType": TYPE_NAMES[stored.dtype.str[1:]][1],
    }
    fields |= {
        "CompressedData": "True",
        "ElementNumberOfChannels": num_channels,
    }
    path.write_bytes(meta_text(**fields) + zlib.compress(stored.tobytes()))
    return path


def npz(path, values, *, save=np.savez_compressed):
    save(path, logits=values)
    return path


GZIP = {"encoding": "gzip", "encode": gzip.compress}
WRITERS = {
    "npz": lambda folder, values: npz(folder / "a.npz", values),
    "npz, not compressed": lambda folder, values: npz(folder / "a.npz", values, save=np.savez),
    "npz, Fortran order": lambda folder, values: npz(folder / "a.npz", np.asfortranarray(values)),
    "npz, big-endian": lambda folder, values: npz(
        folder / "a.npz", values.astype(values.dtype.newbyteorder(">"))
    ),
    "nii": lambda folder, values: save_nifti(folder / "a.nii", values.T),
    "nii.gz": lambda folder, values: save_nifti(folder / "a.nii.gz", values.T),
    "nii.gz, as ITK": lambda folder, values: save_nifti(
        folder / "a.nii.gz", values.T[:, :, :, None]
    ),
    "mha of vectors": lambda folder, values: metaimage(folder / "a.mha", values, vectors=True),
    "mha, channels last": lambda folder, values: metaimage(folder / "a.mha", values, vectors=False),
    "nrrd of vectors": lambda folder, values: nrrd(
        folder / "a.nrrd", values, channel_axis=values.ndim - 1
    ),
    "nrrd, channels second": lambda folder, values: nrrd(folder / "a.nrrd", values, channel_axis=1),
    "nrrd, channels slowest": lambda folder, values: nrrd(
        folder / "a.nrrd", values, channel_axis=0, **GZIP
    ),
}
TYPES = ["float32", "uint8", "int8", "int16", "uint16", "int32", "float64"]
SIZES = [1, 150, 1 << 26]  # Pieces of one plane, of some, of all channels.
# Every writer with three types, of which .npz alone has float16, grids of several channels and of
# one, and three sizes of pieces.
CASES = [
    (
        writer,
        "float16" if size == 1 and writer.startswith("npz") else TYPES[(3 * number + 2 * turn) % 7],
        (3 if turn else 1, 7, 5, 4),
        size,
    )
    for number, writer in enumerate(WRITERS)
    for turn, size in enumerate(SIZES)
]
# The units of a stream of (z, channel, y, x) are larger than what is decoded at once.
CASES.append(("nrrd, channels second", "float32", (5, 3, 300, 200), 1 << 21))


def put_together(header, **options):
    """The whole from its pieces: every voxel must come once, in the stored type, in contiguous
    memory.
    """
    shape = (header.num_channels, *header.grid_shape[::-1])
    seen = np.zeros(shape, int)
    whole = None
    for piece in io.read_pieces(header, **options):
        if whole is None:
            whole = np.zeros(shape, piece.values.dtype)
        assert piece.values.flags.c_contiguous
        assert piece.values.dtype == whole.dtype
        assert piece.values.dtype.isnative
        whole[piece.channels, piece.planes] = piece.values
        seen[piece.channels, piece.planes] += 1
    np.testing.assert_array_equal(seen, 1)
    return whole


@pytest.mark.parametrize(("writer", "dtype", "shape", "most_bytes"), CASES)
def test_pieces_are_the_dense_array_in_the_stored_type(writer, dtype, shape, most_bytes, tmp_path):
    values = values_of(dtype, shape)
    header = io.read_header(WRITERS[writer](tmp_path, values))
    found = put_together(header, most_bytes=most_bytes)
    assert found.dtype == (np.float32 if dtype in ("int32", "float64") else dtype)
    np.testing.assert_array_equal(found, values)
    np.testing.assert_array_equal(found, io.read_channels(header))


@pytest.mark.parametrize("writer", [writer for writer in WRITERS if "Fortran" not in writer])
def test_values_that_are_not_finite_are_named_as_by_the_dense_reader(writer, tmp_path):
    values = values_of("float16" if writer == "npz" else "float32")
    values[2, 3, 1, 2] = np.nan
    values[1, 4, 3, 2] = -np.inf
    header = io.read_header(WRITERS[writer](tmp_path, values))
    with pytest.raises(
        InputError,
        match=r"a\.\w+.*: 2 of 420 values are NaN or infinite.*voxel \(2, 3, 4\) of channel 1",
    ) as one:
        io.read_channels(header)
    returned = []
    with pytest.raises(InputError) as other:
        returned.extend(io.read_pieces(header, most_bytes=1))
    assert str(one.value) == str(other.value)
    assert all(np.isfinite(piece.values).all() for piece in returned)


@pytest.mark.parametrize("writer", ["nii.gz", "npz", "mha of vectors", "nrrd, channels slowest"])
def test_a_wrong_checksum_is_an_error_after_the_last_piece(writer, tmp_path):
    values = values_of("uint8")
    path = WRITERS[writer](tmp_path, values)
    content = bytearray(path.read_bytes())
    in_directory = content.find(b"PK\1\2") + 16
    if writer == "npz":
        place = in_directory
    else:
        place = len(content) - (2 if writer.startswith("mha") else 6)
    content[place] ^= 0xFF
    path.write_bytes(content)
    for read in (put_together, io.read_channels):
        with pytest.raises(UnsupportedFormatError, match="damaged"):
            read(io.read_header(path))


@pytest.mark.parametrize(("writer", "lets_go", "num_pieces"), [("nii", True, 2), ("npz", False, 3)])
def test_many_channels_take_the_memory_of_two_or_three(writer, lets_go, num_pieces, tmp_path):
    """With a piece of the memory of a channel; a loop `for piece in pieces` holds a piece until it
    has the next.
    """
    # The decoder has a few blocks of the file at a time.
    channel = 64 * 256 * 256
    blocks = 3 << 20
    values = np.broadcast_to(np.arange(10, dtype="u1")[:, None, None, None], (10, 64, 256, 256))
    header = io.read_header(WRITERS[writer](tmp_path, values))

    def read():
        for piece in io.read_pieces(header, most_bytes=channel):
            assert piece.values.size == channel
            if lets_go:
                del piece

    assert peak_memory(read) < num_pieces * channel + blocks


def test_no_thread_stays_behind(tmp_path):
    def threads():
        return [
            thread.name for thread in threading.enumerate() if thread.name.startswith("one ahead")
        ]

    header = io.read_header(WRITERS["npz"](tmp_path, values_of("uint8")))
    reader = io.read_pieces(header, most_bytes=1)
    assert not threads(), "nothing is read before it is asked for"
    next(reader)
    assert len(threads()) == 1
    reader.close()
    assert not threads()
    (tmp_path / "a.npz").write_bytes(b"")
    with pytest.raises(InputError, match="was changed"):
        next(io.read_pieces(header))
    assert not threads()


NAMES = ["a.nii", "a.nii.gz", "a.mha", "a.mhd", "a.nrrd", "a.nhdr", "a.npz", "a.npy"]


def like_of(shape):
    return header_of_grid(shape, affine_of((1.0, 1.5, 2.25)))


def files_in(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("shape", "most_bytes", "threads"),
    [((5, 4, 7), 1, 1), ((5, 4), 1 << 26, 3), ((60, 50, 40), 300_001, 3)],
    ids=["planes", "2-D", "larger than a block"],
)
def test_the_bytes_do_not_depend_on_the_pieces(
    name, shape, most_bytes, threads, tmp_path, monkeypatch
):
    """Every plane of every channel is asked for once."""
    values = np.round(np.random.default_rng(0).standard_normal((3, *shape[::-1])), 1).astype(
        np.float32
    )
    channels = values.transpose(0, *range(values.ndim - 1, 0, -1))
    asked = []
    for folder in ("dense", "pieces"):
        (tmp_path / folder).mkdir()
    io.write_channels(tmp_path / "dense" / name, channels, like_of(shape))

    def piece(channel, planes):
        asked.extend((channel, plane) for plane in range(planes.start, planes.stop))
        return values[channel, planes].astype(np.float64)  # Whatever the type, it becomes float32.

    monkeypatch.setattr(io.writing, "PIECE_BYTES", most_bytes)
    io.write_pieces(tmp_path / "pieces" / name, like_of(shape), 3, piece, threads=threads)
    assert files_in(tmp_path / "pieces") == files_in(tmp_path / "dense")
    # NIfTI gives a 2-D grid a third axis.
    read = io.read_logits([tmp_path / "pieces" / name]).reshape(3, *shape)
    np.testing.assert_array_equal(read, channels)
    assert sorted(asked) == [(channel, plane) for channel in range(3) for plane in range(shape[-1])]


@pytest.mark.parametrize(
    ("name", "error"), [("a.nii.gz", ValueError), ("a.mhd", KeyboardInterrupt), ("a.npz", KeyError)]
)
def test_an_error_leaves_the_old_file_and_nothing_else(name, error, tmp_path, monkeypatch):
    def ones(_, planes):
        if planes.start > 3:
            raise error("of the caller")
        return np.ones((planes.stop - planes.start, 40, 30))

    io.write_pieces(tmp_path / name, like_of((30, 40, 4)), 2, ones)
    before = files_in(tmp_path)
    running = threading.active_count()
    monkeypatch.setattr(io.writing, "PIECE_BYTES", 1)
    with pytest.raises(error, match="of the caller"):
        io.write_pieces(tmp_path / name, like_of((30, 40, 6)), 2, ones, threads=2)
    assert (files_in(tmp_path), threading.active_count()) == (before, running)
