"""Files that store a part of a grid: 3D Slicer and DICOM leave out what no segment reaches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import numpy as np

from crfrefine.io.decode import Decoder, VoxelStream, allocate_array, array_stream
from crfrefine.io.volume import VolumeHeader, same_grid


def placed_on(header: VolumeHeader, grid: VolumeHeader) -> VolumeHeader:
    """Return the header of a file that stores a part of a grid, extended to that grid; any other header unchanged.

    Voxels that the file does not store read as 0.

    Args:
        header: of a label map or mask.
        grid: header of the image it belongs to.
    """
    if not header.covers_part or header.inset is not None or header.affine is None or grid.affine is None or grid.spacing is None:
        return header
    if len(header.grid_shape) != len(grid.grid_shape) or header.num_channels > 1 or header.on_same_grid(grid):
        return header
    num_axes = len(grid.grid_shape)
    exact = np.linalg.solve(grid.affine, header.affine[:, 3])[:num_axes]
    if np.abs(exact).max() > 1 << 30:
        return header
    offset = np.rint(exact).astype(int)
    is_inside = bool((offset >= 0).all()) and bool((offset + header.grid_shape <= np.array(grid.grid_shape)).all())
    expected = grid.affine.copy()
    expected[:3, 3] += grid.affine[:3, :num_axes] @ offset
    if not is_inside or not same_grid(header.grid_shape, header.affine, header.grid_shape, expected):
        return header
    return replace(
        header,
        grid_shape=grid.grid_shape,
        affine=grid.affine,
        spacing=grid.spacing,
        inset=(header, tuple(int(start) for start in offset)),
    )


@contextmanager
def open_inset(header: VolumeHeader, part: AbstractContextManager[VoxelStream]) -> Iterator[VoxelStream]:
    """Open a file that stores a part of its grid, `part`; voxels outside of the part are 0."""
    assert header.inset is not None
    own, offset = header.inset
    with part as stream:
        whole = allocate_array(header.grid_shape[::-1], header.path, stream.kept_type)
        whole.fill(0)
        shape = own.grid_shape[::-1]
        inside = allocate_array((1, *shape), header.path, stream.kept_type)
        decoder = Decoder(stream, inside.shape)
        decoder.fill(inside)
        decoder.finish()
        place = tuple(slice(start, start + size) for start, size in zip(offset[::-1], shape, strict=True))
        assert math.prod(whole[place].shape) == inside.size
        whole[place] = inside[0]
    yield array_stream(whole, header.path)
