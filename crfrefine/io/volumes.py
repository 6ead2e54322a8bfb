"""Read a file of any supported format: first the header, then the voxels into an array of the caller."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.failures import reading
from crfrefine.base.geometry import reorientation
from crfrefine.errors import CrfRefineError, InputError, UnsupportedFormatError
from crfrefine.io.decode import Decoder, VoxelStream, allocate_array, as_bytes
from crfrefine.io.paths import FORMATS, LOGITS_SUFFIXES, Format, format_of, require_file
from crfrefine.io.recognition import conversion_hint, format_to_read, named_header, recognize
from crfrefine.io.streams import BlockReader
from crfrefine.io.volume import RareHeaderError, VolumeHeader

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.io import metaimage, mgh, nifti, nifti_pair, npz, nrrd
    from crfrefine.io.paths import FormatCode
    from crfrefine.io.volume import FileState

    # So mypy checks that each has the functions.
    _CODE: tuple[FormatCode, ...] = (metaimage, mgh, nifti, nifti_pair, npz, nrrd)


def read_header(path: str | Path, suffixes: tuple[str, ...] = LOGITS_SUFFIXES) -> VolumeHeader:
    """Read the header of a file, without its voxels.

    Args:
        path: its suffix names the format; if the content has another format, that one is used, and `misnamed` names it.
        suffixes: of the accepted formats.

    Raises:
        UnsupportedFormatError: unknown suffix, damaged or cut off, or an ambiguous layout.
        InputError: the file does not exist or cannot be opened.
        UnexpectedError: the reader raised an unexpected exception.
    """
    path = Path(path)
    path = named_header(path)
    known = format_to_read(path, suffixes)
    require_file(path)
    with reading(path):
        if not path.stat().st_size:
            raise UnsupportedFormatError(f"{path}: the file is empty")
        try:
            return _read_as(path, known)
        except UnsupportedFormatError as error:
            actual = recognize(path)
            if actual is None or actual is known:
                raise
            if isinstance(actual, Format) and set(actual.suffixes) <= set(suffixes):
                header = _read_as(path, actual)
                # The name of the header decides which other files hold voxels, and which files must not be replaced.
                if header.source is None or header.source.path == path:
                    return header
            raise UnsupportedFormatError(f"{error}\n  {conversion_hint(actual)}") from None


def allocate(header: VolumeHeader) -> NDArray[np.float32]:
    """Return an uninitialized array for the voxels of a file, (channels, [z,] y, x).

    Raises:
        CapacityError: the array does not fit into memory.
    """
    return allocate_array((header.num_channels, *header.grid_shape[::-1]), header.path)


def read_into(header: VolumeHeader, values: NDArray[np.float32]) -> None:
    """Read the voxels of a file, scaled.

    Args:
        header: result of `read_header`.
        values: (channels, [z,] y, x) C-contiguous; written to.

    Raises:
        UnsupportedFormatError: damaged or cut off.
        InputError: values that are NaN or infinite.
        UnexpectedError: the reader raised an unexpected exception.
    """
    with reading(header.path), open_voxels(header) as stream:
        decoder = Decoder(stream, values.shape)
        decoder.fill(values)
        decoder.finish()


@contextmanager
def open_voxels(header: VolumeHeader) -> Iterator[VoxelStream]:
    """Open a file at its first voxel; raise InputError if it changed since its header was read, or while the block lasted."""
    _require_unchanged(header.states)
    try:
        opened: AbstractContextManager[VoxelStream]
        if header.turned is not None:
            opened = _open_turned(header, open_voxels(header.turned[0]))
        elif header.source is not None:
            opened = header.source.stream()
        else:
            code: Any = next(known for known in FORMATS if known.name == header.family).load()
            opened = code.open_voxels(header)
        with opened as stream:
            yield stream
    except CrfRefineError:
        _require_unchanged(header.states)  # That is the reason then.
        raise
    _require_unchanged(header.states)


def _read_as(path: Path, known: Format) -> VolumeHeader:
    # The checks find numbers of a damaged header that are out of range; warnings about them are not needed.
    before = _states([path])
    with np.errstate(all="ignore"):
        try:
            header = replace(known.load().read_header(path), family=known.name)
        except RareHeaderError as rare:
            from crfrefine.io import itk

            note = f"read through SimpleITK: its header has {rare}"
            header = replace(itk.read_header(path, known.name), family=itk.FAMILY, notes=(note,))
        source = header.source
        header = replace(header, states=(*before, *_states([] if source is None or source.path == path else [source.path])))
    if format_of(path) is known:
        return header
    return replace(header, misnamed=f"the file is {known.name}, although its name does not say so; it is read as such")


def _states(paths: Sequence[Path]) -> tuple[FileState, ...]:
    """Return the states of files; missing files are left out, and reading reports them."""
    states = []
    for path in paths:
        with suppress(OSError, ValueError):
            status = path.stat()
            states.append((path, status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(states)


def _require_unchanged(states: Sequence[FileState]) -> None:
    """Raise an error if a file is not as it was: voxels of two files, or the header of one and voxels of another, would make one case."""
    for path, *state in states:
        status = path.stat()
        if [status.st_ino, status.st_size, status.st_mtime_ns] != state:
            raise InputError(f"{path}: was changed while it was read; run again when nothing writes to it any more")


# Files on another grid of the same voxels: with exchanged or mirrored axes.


def placed_on(header: VolumeHeader, grid: VolumeHeader) -> VolumeHeader:
    """Return the header of a file as if it were on a grid, if its voxels are; any other header unchanged.

    Axes that are exchanged or mirrored are turned.

    Args:
        header: header of the file.
        grid: header of the image the file belongs to.
    """
    if header.affine is None or grid.affine is None or header.on_same_grid(grid):
        return header
    turn = reorientation(grid.grid_shape, grid.affine, header.grid_shape, header.affine)
    if turn is None:
        return header
    return replace(header, grid_shape=grid.grid_shape, affine=grid.affine, spacing=grid.spacing, turned=(header, turn))


@contextmanager
def _open_turned(header: VolumeHeader, stored: AbstractContextManager[VoxelStream]) -> Iterator[VoxelStream]:
    """Open a file whose axes are turned; one channel is in memory, or all if the file interleaves them."""
    assert header.turned is not None
    own, turn = header.turned
    shape = (own.num_channels, *(*own.grid_shape, 1)[2::-1])
    with stored as stream:
        decoder = Decoder(stream, shape)

        def blocks() -> Generator[bytes | memoryview, None, None]:
            at_once = 1 if decoder.one_channel_after_the_other else own.num_channels
            for first in range(0, own.num_channels, at_once):
                values = allocate_array((at_once, *shape[1:]), own.path, stream.kept_type)
                decoder.fill(values, first)
                for channel in values:
                    yield as_bytes(np.ascontiguousarray(turn.apply(channel)))

        yield VoxelStream(BlockReader(blocks()), stream.kept_type.newbyteorder("<"), own.path, decoder.finish)
