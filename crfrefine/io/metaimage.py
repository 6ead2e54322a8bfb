"""MetaImage, `.mhd` and `.mha`: a text header of `Key = Value`, then the voxels.

ElementDataFile is the last key. It is written with voxels as zlib data.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from crfrefine.base.array_types import Float64
from crfrefine.base.text import shorten
from crfrefine.errors import UnsupportedFormatError
from crfrefine.io import text_header
from crfrefine.io.paths import files_written
from crfrefine.io.streams import BLOCK_BYTES, VoxelSource, write_zlib
from crfrefine.io.text_header import LPS, ByteOrder
from crfrefine.io.volume import VolumeHeader
from crfrefine.io.writing import VoxelsToWrite, atomic_files

_GEOMETRY_KEYS = ("TransformMatrix", "Offset", "ElementSpacing", "ElementSize")
_UNITS = "DistanceUnits"
_KEYS = (
    *("ObjectType", "NDims", "DimSize", "ElementType", "ElementNumberOfChannels", "HeaderSize"),
    *("ElementDataFile", "BinaryData", "CompressedData", "BinaryDataByteOrderMSB"),
    *_GEOMETRY_KEYS,
    _UNITS,
)
_KNOWN = {key.lower(): key for key in _KEYS}
_KNOWN |= text_header.by_each_name(
    {
        "rotation, orientation": "TransformMatrix",
        "origin, position, imageposition": "Offset",
        "elementbyteordermsb": "BinaryDataByteOrderMSB",
    }
)
_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
_READ_TYPES = text_header.by_each_name(
    {f"{name}, {name}_array".lower(): kind for name, kind in _TYPES.items()}
)
# Of several names of a type, the first one is written.
_WRITTEN_TYPES = {np.dtype(kind).name: name for name, kind in reversed(_TYPES.items())}


def recognizes(start: bytes) -> bool:
    """Return whether it begins with a key that writers put first, and has that of dimensions."""
    begins = re.match(rb"\s*(ObjectType|NDims|Comment)\s*[=:]", start)
    return begins is not None and re.search(rb"\bNDims\s*[=:]", start) is not None


def read_header(path: Path) -> VolumeHeader:
    """Read a header to its end and check every field that is used."""
    return MetaImageHeader(path).volume_header()


class MetaImageHeader(text_header.TextHeader):
    """The fields of MetaImage."""

    format = "MetaImage"
    separator = " = "
    end = "no line `ElementDataFile = ...`"
    units_in = _UNITS
    unit_fields = (_UNITS,)
    voxels_in = "ElementDataFile"
    list_of_files = re.compile("LIST( 2D?)?", re.IGNORECASE)
    numbered_files = re.compile(
        r"([^%\s]*)(%0?\d{0,2}d)([^%\s]*) (\d{1,9}) (\d{1,9}) ([1-9]\d{0,3})"
    )

    def take_line(self, number: int, line: bytes) -> bool:
        """Store the field of a line, ElementDataFile only if it is not the header's own file."""
        if not line.strip():
            return False
        name, *values = re.split(rb"[=:]", line, maxsplit=1)  # MetaIO accepts a colon as well.
        if not values:
            shown = shorten(line.decode(errors="backslashreplace"), 60)
            raise UnsupportedFormatError(
                f"{self.path}: not a MetaImage file, although its name says so: "
                f"line {number} is not `Key = Value`: {shown!r}"
            )
        key = _KNOWN.get(name.strip().lower().decode("latin-1"))
        is_last = key == self.voxels_in
        if key is not None and not (is_last and values[0].strip().upper() == b"LOCAL"):
            self.add(key, values[0])
        return is_last

    def read_axes(self) -> None:
        """Find the axes and the channels, which are together at each voxel."""
        if not self.text("ObjectType", "Image").lower().startswith("image"):
            raise self.damaged("ObjectType", "Image")
        num_dims = self.integer("NDims", limits=(2, 4))
        self.sizes = self.sizes_in("DimSize", num_dims)
        self.num_channels = self.integer("ElementNumberOfChannels", "1", limits=(1, 1 << 30))
        if self.num_channels > 1:
            self.inner = 1

    @property
    def units(self) -> list[str]:
        """The one unit that the header has, for each axis."""
        return [self.text(_UNITS, "")] * len(self.sizes)

    def source(self) -> VoxelSource:
        """Return the place of the voxels; of several files, each must hold one plane."""
        num_files = len(self.names_of_files())
        if self.is_of_several_files and num_files != self.sizes[-1]:  # ITK would invent some.
            raise self.damaged(
                self.voxels_in,
                f"names of {self.sizes[-1]} files, as a list, or a name with a running number such "
                f"as %03d, its first value, last value and step; found {num_files}",
            )
        is_compressed = self.flag("CompressedData")
        is_binary = self.flag("BinaryData", "True")
        path, start = self.voxel_file(is_compressed=is_compressed)
        # -1 means that the voxels end the file.
        skipped = self.integer("HeaderSize", "0", limits=(-1, 1 << 60))
        if skipped and (is_compressed or not is_binary):
            raise self.damaged("HeaderSize", "0 before compressed voxels or text")
        if not is_binary:
            raise self.rare("voxels as text")
        kind = self.choice("ElementType", _READ_TYPES, f"one of {', '.join(_TYPES)}")
        order: ByteOrder = ">" if self.flag("BinaryDataByteOrderMSB") else "<"
        encoding = "zlib" if is_compressed else "raw"
        dtype = np.dtype(kind).newbyteorder(order)
        return VoxelSource(path, encoding, dtype, self.inner, start=skipped or start)

    def place(self) -> tuple[Float64, Sequence[float], tuple[float, ...]]:
        """Return steps and place in LPS."""
        num_dims = len(self.sizes)
        direction = np.eye(num_dims)
        if "TransformMatrix" in self:  # It lists one axis after the other.
            matrix = self.numbers("TransformMatrix", num_dims**2)
            direction = np.array(matrix).reshape(num_dims, num_dims).T
        origin = (0.0,) * num_dims
        if "Offset" in self:
            origin = self.numbers("Offset", num_dims, exact=False)
        spacing = (1.0,) * num_dims
        sizes = [key for key in ("ElementSpacing", "ElementSize") if key in self]
        if sizes:
            spacing = self.numbers(sizes[0], num_dims, exact=False)
        if 0.0 in spacing:
            raise self.damaged(sizes[0], "voxels that are larger than 0")
        return direction * spacing, origin, LPS

    def lines_of_place(self, header: VolumeHeader) -> tuple[str, ...]:
        """Return the lines that place the grid, without words after their numbers."""
        num_dims = len(self.sizes)
        lines = []
        for key in _GEOMETRY_KEYS:
            if key in self:
                count = num_dims**2 if key == "TransformMatrix" else num_dims
                words = self.text(key).split()[:count]
                lines.append(f"{key} = {' '.join(words)}")
        unit = self.units[0]
        if unit.lower() in text_header.MM_PER_UNIT:
            lines.append(f"{_UNITS} = {unit}")
        return tuple(lines)


def write(voxels: VoxelsToWrite, threads: int) -> None:
    """Write an .mha, or an .mhd with a .zraw, as zlib data; a voxel's channels are together."""
    path = voxels.path
    geometry = list(text_header.kept_lines(voxels, MetaImageHeader.format))
    if not geometry:
        direction, origin, spacing = text_header.place_in_lps(voxels.like)
        arrays = {
            "TransformMatrix": direction.T,  # It lists one axis after the other.
            "Offset": origin,
            "CenterOfRotation": np.zeros_like(origin),
            "ElementSpacing": np.array(spacing),
        }
        for key, array in arrays.items():
            words = map(repr, array.reshape(-1).tolist())
            geometry.append(f"{key} = {' '.join(words)}")
    blocks = voxels.blocks(interleaved=True)
    _, *voxel_files = files_written(path)
    if voxel_files:
        with atomic_files(path) as (voxel_file, file):
            num_bytes = write_zlib(voxel_file, blocks)
            data_file = text_header.text_of_name(voxel_files[0].name)
            file.write(_header_to_write(voxels, geometry, num_bytes, data_file))
        return
    # The header comes first and has the size of the voxels: they wait in a file without a name, on
    # the same disk.
    folder = Path(os.path.realpath(path)).parent
    with atomic_files(path) as (file,), TemporaryFile(dir=folder) as waiting:
        num_bytes = write_zlib(waiting, blocks)
        file.write(_header_to_write(voxels, geometry, num_bytes, "LOCAL"))
        waiting.seek(0)
        shutil.copyfileobj(waiting, file, BLOCK_BYTES)


def _header_to_write(
    voxels: VoxelsToWrite, geometry: list[str], num_bytes: int, data_file: str
) -> bytes:
    """Return the header of compressed voxels that take this many bytes."""
    lines = [
        "ObjectType = Image",
        f"NDims = {voxels.like.num_axes}",
        "BinaryData = True",
        "BinaryDataByteOrderMSB = False",
        "CompressedData = True",
        f"CompressedDataSize = {num_bytes}",
        *geometry,
        "DimSize = " + " ".join(map(str, voxels.like.grid_shape)),
    ]
    if voxels.num_channels is not None:
        lines.append(f"ElementNumberOfChannels = {voxels.num_channels}")
    lines.append(f"ElementType = {_WRITTEN_TYPES[voxels.dtype.name]}")
    lines.append(f"ElementDataFile = {data_file}\n")
    return "\n".join(lines).encode("utf-8", "surrogateescape")
