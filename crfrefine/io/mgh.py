"""FreeSurfer's MGH, `.mgh` and `.mgz`: a header of 284 bytes, then one frame after the other.

Voxels are big-endian. nibabel interprets the geometry.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np

from crfrefine.base.array_types import Float64, Shape
from crfrefine.base.geometry import spacing_of
from crfrefine.base.notes import NoteKind
from crfrefine.errors import UnsupportedFormatError
from crfrefine.io import streams
from crfrefine.io.volume import FileHeader, VolumeHeader, require_right_angles
from crfrefine.io.writing import VoxelsToWrite, atomic_files

_DATA_OFFSET = 284
_USED_BYTES = 90  # of them; nibabel's block goes on with the part behind the voxels.
_TYPES = {0: ">u1", 1: ">i4", 3: ">f4", 4: ">i2", 10: ">u2"}
# Type 10 is younger than most programs: labels above 255 are written with 32 bits.
_WRITTEN_TYPES = {"uint8": 0, "uint16": 1, "int32": 1, "float32": 3, "int16": 4}


def recognizes(start: bytes) -> bool:
    """Return whether it is a header of version 1 with four sizes and a type, compressed or not."""
    block = streams.inflated(start)
    if len(block) < 24:
        return False
    numbers = [int.from_bytes(block[at : at + 4], "big", signed=True) for at in range(0, 24, 4)]
    version, *sizes, kind = numbers
    return version == 1 and min(sizes) >= 1 and max(sizes) <= 1 << 20 and kind in _TYPES


def read_header(path: Path) -> VolumeHeader:
    """Read only the header; frames are channels."""
    return MghHeader(path).volume_header()


class MghHeader(FileHeader):
    """A header as nibabel reads it."""

    format = "MGH"
    has_tail = True

    def __init__(self, path: Path) -> None:
        """Read the header."""
        self.path = path
        self.encoding = "raw"
        with streams.open_bytes(path, "any") as reader:
            if isinstance(reader, streams.BlockReader):
                self.encoding = "gzip"
                self.format = "MGH, gzip"
            block = reader.read(_DATA_OFFSET)
        is_packed = block.startswith(streams.GZIP_MAGIC)  # compressed twice
        if len(block) < _DATA_OFFSET or is_packed or not recognizes(block):
            raise UnsupportedFormatError(
                f"{path}: not a FreeSurfer volume, or damaged: its header begins with "
                f"{block[:24]!r}"
            )
        from nibabel.freesurfer.mghformat import MGHHeader

        self.template = MGHHeader(block[:_USED_BYTES])
        if int.from_bytes(block[28:30], "big") <= 0:  # Its goodRASFlag; nibabel fills in a place.
            self.notes = (NoteKind.NO_MGH_ORIENTATION(),)

    def grid(self) -> tuple[Shape, int]:
        """Return the voxels along each axis, and the number of frames."""
        *grid_shape, num_frames = (int(size) for size in self.template["dims"])
        return tuple(grid_shape), num_frames

    def source(self) -> streams.VoxelSource:
        """Return the place of the voxels behind the header."""
        dtype = np.dtype(_TYPES[int(self.template["type"])])
        return streams.VoxelSource(self.path, self.encoding, dtype, offset=_DATA_OFFSET)

    def affine(self, grid_shape: Shape) -> Float64:
        """Return the affine."""
        return np.asarray(self.template.get_affine(), np.float64) + 0.0


def write(voxels: VoxelsToWrite, threads: int) -> None:
    """Write voxels, labels above 255 in 32 bits; the geometry of an MGH file is kept exactly."""
    from nibabel.freesurfer.mghformat import MGHHeader

    like = voxels.like
    shape = (*like.grid_shape, 1)[:3]
    template = like.template
    if isinstance(template, MGHHeader):
        header = template.copy()
    else:
        require_right_angles(voxels.path, like)
        # Directions, voxel sizes, and the world position of the grid's center.
        affine = like.required_affine
        axes = affine[:3, :3]
        spacing = np.array(spacing_of(affine))
        header = MGHHeader()
        header["goodRASFlag"] = 1
        header["delta"] = spacing
        header["Mdc"] = (axes / spacing).T
        header["Pxyz_c"] = affine[:3, 3] + axes @ np.array(shape) / 2
    header["dims"] = (*shape, voxels.num_channels or 1)
    header["type"] = _WRITTEN_TYPES[voxels.dtype.name]
    given = voxels.dtype.newbyteorder("<")
    stored = np.dtype(_TYPES[int(header["type"])])
    content = chain(
        [header.binaryblock[:_USED_BYTES].ljust(_DATA_OFFSET, b"\0")],
        (np.frombuffer(block, given).astype(stored).tobytes() for block in voxels.blocks()),
    )
    with atomic_files(voxels.path) as (file,):
        if streams.is_named_gzip(voxels.path):
            streams.write_gzip(file, content, threads)
        else:
            file.writelines(content)
