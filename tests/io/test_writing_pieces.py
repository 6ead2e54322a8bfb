"""Writing piece by piece: the bytes of the dense writer, in the order of the format, and nothing half-written."""

import threading

import numpy as np
import pytest
from io_helpers import affine_of, peak_memory

from crfrefine import io
from crfrefine.errors import CrfRefineError, GridMismatchError
from crfrefine.io.volume import Volume

NAMES = ["a.nii", "a.nii.gz", "a.mha", "a.mhd", "a.nrrd", "a.nhdr", "a.npz"]
BY_CHANNEL = [name for name in NAMES if name.startswith("a.ni") or name == "a.npz"]


def like_of(shape):
    """A volume on a grid (*shape) that takes no memory."""
    spacing = (1.0, 1.5, 2.25)[: len(shape)]
    return Volume(np.broadcast_to(np.float32(0), shape), affine_of((1.0, 1.5, 2.25)), spacing)


def files_in(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("shape", "most_bytes", "threads"),
    [((5, 4, 7), 1, 1), ((5, 4), 1 << 26, 3), ((60, 50, 40), 300_001, 3)],
    ids=["planes", "2-D", "larger than a block"],
)
def test_the_bytes_do_not_depend_on_the_pieces(name, shape, most_bytes, threads, tmp_path):
    values = np.round(np.random.default_rng(0).standard_normal((3, *shape[::-1])), 1).astype(np.float32)
    dense, pieces = tmp_path / "dense", tmp_path / "pieces"
    dense.mkdir()
    pieces.mkdir()
    io.write_channels(dense / name, values.transpose(0, *range(values.ndim - 1, 0, -1)), like_of(shape))
    asked = []

    def piece(channel, planes):
        asked.append((channel, planes.start, planes.stop))
        return values[channel, planes].astype(np.float64)  # Whatever the type, it becomes float32.

    io.write_pieces(pieces / name, like_of(shape), 3, piece, threads=threads, most_bytes=most_bytes)
    assert files_in(pieces) == files_in(dense)
    read = io.read_logits([pieces / name]).values.reshape(3, *shape)  # NIfTI gives a 2-D grid a third axis.
    np.testing.assert_array_equal(read, values.transpose(0, *range(values.ndim - 1, 0, -1)))
    # Every plane of every channel once, in the order of the format.
    voxels = [(channel, plane) for channel, start, stop in asked for plane in range(start, stop)]
    assert sorted(voxels) == [(channel, plane) for channel in range(3) for plane in range(shape[-1])]
    if name in BY_CHANNEL:
        assert voxels == sorted(voxels)
    elif most_bytes == 1:
        assert voxels == sorted(voxels, key=lambda voxel: (voxel[1], voxel[0]))


@pytest.mark.parametrize(
    ("name", "error"), [("a.nii.gz", ValueError), ("a.mhd", KeyboardInterrupt), ("a.nrrd", CrfRefineError), ("a.npz", KeyError)]
)
def test_an_error_leaves_the_old_file_and_nothing_else(name, error, tmp_path):
    def half(channel, planes):
        if planes.start > 3:
            raise error("of the caller")
        return np.zeros((planes.stop - planes.start, 400, 300))

    io.write_pieces(tmp_path / name, like_of((2, 3, 4)), 2, lambda _, planes: np.ones((planes.stop - planes.start, 3, 2)))
    before = files_in(tmp_path)
    running = threading.active_count()
    with pytest.raises(error, match="of the caller"):
        io.write_pieces(tmp_path / name, like_of((300, 400, 6)), 2, half, threads=2, most_bytes=1)
    assert files_in(tmp_path) == before
    assert threading.active_count() == running


def test_a_piece_of_another_shape_is_refused(tmp_path):
    message = r"a\.mhd: cannot write planes 0 to 6 of channel 1: expected an array of shape \(7, 4, 5\), found \(7, 5, 4\)"
    with pytest.raises(GridMismatchError, match=message):
        io.write_pieces(tmp_path / "a.mhd", like_of((5, 4, 7)), 2, lambda channel, _: np.zeros((7, 4 + channel, 5 - channel)))
    assert files_in(tmp_path) == {}


@pytest.mark.parametrize("name", ["a.nii", pytest.param("a.npz", marks=pytest.mark.long)])
def test_many_channels_take_the_memory_of_three(name, tmp_path):
    shape = (64, 256, 128)
    channel = 4 * 64 * 256 * 128

    def piece(number, planes):
        return np.full((planes.stop - planes.start, 256, 64), number, np.float32)

    assert peak_memory(lambda: io.write_pieces(tmp_path / name, like_of(shape), 10, piece, most_bytes=channel)) < 3 * channel
    assert io.is_whole(tmp_path / name)
