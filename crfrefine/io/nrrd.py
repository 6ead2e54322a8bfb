"""NRRD, `.nrrd` and `.nhdr`: a header of `field: value`, which an empty line ends, then the voxels.

It is written with voxels as gzip data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from crfrefine.base.array_types import Float64
from crfrefine.base.text import printable, shorten
from crfrefine.errors import UnsupportedFormatError
from crfrefine.io import text_header
from crfrefine.io.formats import LABELS_SUFFIXES
from crfrefine.io.paths import files_written, suffix_of
from crfrefine.io.streams import VoxelSource, write_gzip
from crfrefine.io.text_header import LPS, ByteOrder, by_each_name, finite_numbers
from crfrefine.io.volume import Segments, VolumeHeader, described_segments
from crfrefine.io.writing import VoxelsToWrite, atomic_files

# The lines of a header, and the keys of pairs that are read, those of a segment.
_FIELD = re.compile(rb"([^:]*)(?::(?!=)(.*))?", re.DOTALL)
_PAIR = re.compile(rb"(.*?):=(.*)", re.DOTALL)
_OF_SEGMENT = re.compile(rb"Segment[0-9]{1,5}_(?:Name|LabelValue|Color|Layer)")

# All fields of the format: any other name is damage, and its value would be missed.
_FIELDS = (
    *("type", "dimension", "sizes", "encoding", "endian", "data file", "line skip", "byte skip"),
    *("content", "number", "block size", "min", "max", "old min", "old max", "sample units"),
    *("space", "space dimension", "space directions", "space origin", "space units"),
    *("measurement frame", "spacings", "thicknesses", "axis mins", "axis maxs"),
    *("centers", "centerings", "labels", "units", "kinds"),
)
_FIELD_OF_NAME = {name.replace(" ", ""): name for name in _FIELDS}
_FIELD_OF_NAME["centerings"] = "centers"
# NumPy's types by their names in a header.
_TYPES = by_each_name(
    {
        "signed char, int8, int8_t": "i1",
        "uchar, unsigned char, uint8, uint8_t": "u1",
        "short, short int, signed short, signed short int, int16, int16_t": "i2",
        "ushort, unsigned short, unsigned short int, uint16, uint16_t": "u2",
        "int, signed int, int32, int32_t": "i4",
        "uint, unsigned int, uint32, uint32_t": "u4",
        "longlong, long long, long long int, signed long long": "i8",
        "signed long long int, int64, int64_t": "i8",
        "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t": "u8",
        "float": "f4",
        "double": "f8",
    }
)
# Of types that have another name in NumPy.
_WRITTEN_TYPES = {"float32": "float", "float64": "double"}
_ENCODINGS = by_each_name({"raw": "raw", "gzip, gz": "gzip", "hex, ascii, text, txt": "text"})
_ORDERS: dict[str, ByteOrder] = {"little": "<", "big": ">"}
_MAX_DIMS = 16
_GRID_KINDS = ("domain", "space")
# An axis of these kinds is one of the grid, unless it is the only one without a direction.
_VAGUE_KINDS = ("time", "none", "???")
_TIME_UNITS = ("s", "sec", "second", "seconds", "ms", "msec", "millisecond", "milliseconds")
_CHANNEL_KINDS = (
    *("list", "point", "vector", "covariant-vector", "normal"),
    *("scalar", "rgb-color", "rgba-color"),
)
# Name of a world without hyphens and spaces -> the signs that lead to RAS+.
_SPACES = by_each_name(
    {
        "rightanteriorsuperior, ras": (1.0, 1.0, 1.0),
        "leftanteriorsuperior, las": (-1.0, 1.0, 1.0),
        "leftposteriorsuperior, lps": LPS,
        "": LPS,  # As in ITK, if the space has no name.
    }
)
_IN_SPACE = {"space", "space dimension", "space directions", "space origin"}
# "none" for an axis of channels, else a vector
_ENTRIES = re.compile(r"none|\([^()]*\)", re.IGNORECASE)


def recognizes(start: bytes) -> bool:
    """Return whether it begins with the format's magic, whatever the version."""
    return start.startswith(b"NRRD000")


def read_header(path: Path) -> VolumeHeader:
    """Read a header to its end, and check all fields that are used.

    Raise UnsupportedFormatError for segments in several layers.
    """
    header = NrrdHeader(path)
    _, num_layers = header.grid()
    if num_layers > 1 and suffix_of(path) in LABELS_SUFFIXES:
        raise UnsupportedFormatError(
            f"{path}: the segments are in {num_layers} layers, as where they overlap; expected one "
            f"layer\n  `crfrefine convert {path.name} FOLDER` writes a binary file per segment; or "
            "collapse the labelmap layers in 3D Slicer's module Segmentations."
        )
    return header.volume_header()


class NrrdHeader(text_header.TextHeader):
    """The fields of NRRD, and the pairs of key and value by which 3D Slicer describes segments."""

    # The method `read_axes` sets these.
    all_sizes: tuple[int, ...] = ()  # values along all axes
    axes: Sequence[int] = ()  # those of the grid
    format = "NRRD"
    separator = ": "
    end = "no empty line"
    units_in = "units of length"
    unit_fields = ("space units", "units")
    voxels_in = "data file"
    list_of_files = re.compile(r"LIST(\s.*)?", re.IGNORECASE)
    numbered_files = re.compile(
        r"(.*?)(%0?[0-9]{0,2}d)(.*) ([+-]?[0-9]{1,9}) ([+-]?[0-9]{1,9}) ([+-]?[1-9][0-9]{0,8})"
        r"( [0-9]+)?"
    )

    def take_line(self, number: int, line: bytes) -> bool:
        """Store the field of a line; an empty line, or a list of files, ends the header."""
        if number == 1 and not re.fullmatch(rb"NRRD000[1-6]\s*", line):
            raise UnsupportedFormatError(
                f"{self.path}: not an NRRD file, although its name says so: "
                f"it begins with {line[:12]!r}"
            )
        if not line.strip():
            return True
        if number == 1 or line[:1] == b"#":
            return False
        if match := _FIELD.fullmatch(line):
            name = match[1].strip().lower().replace(b" ", b"").decode("latin-1")
            if field := _FIELD_OF_NAME.get(name):
                self.add(field, match[2] or b"")
                return field == self.voxels_in and bool(self.list_of_files.fullmatch(self[field]))
        pair = _PAIR.fullmatch(line)
        if pair is None:
            shown = shorten(line.decode(errors="backslashreplace"), 60)
            raise UnsupportedFormatError(
                f"{self.path}: damaged NRRD header, or the file is cut off: "
                f"line {number} is not a `field: value` of the format: {shown!r}"
            )
        if _OF_SEGMENT.fullmatch(pair[1]):
            self.setdefault(pair[1].decode(), pair[2].strip().decode(errors="replace"))
        return False

    def read_axes(self) -> None:
        """Find the axes of the grid, and the one of channels, by its kind or missing direction."""
        num_dims = self.integer("dimension", limits=(1, _MAX_DIMS))
        self.all_sizes = self.sizes_in("sizes", num_dims)
        kinds = self.text("kinds", "none " * num_dims).lower().split()
        if len(kinds) != num_dims or "complex" in kinds:
            raise self.damaged(
                "kinds",
                f"{num_dims} kinds, such as domain for axes of the grid and vector for channels, "
                "of real numbers",
            )
        unusual = set(kinds).difference(_GRID_KINDS, _VAGUE_KINDS, _CHANNEL_KINDS)
        if unusual:
            raise self.rare(f"the kind {shorten(min(unusual), 60)!r}")
        directions = self._per_axis(_ENTRIES.findall(self.text("space directions", "").lower()))
        if set(directions) == {"none"}:  # None of them means channels.
            directions = [""] * num_dims

        channel_axes = []
        for axis, kind in enumerate(kinds):
            if kind in _CHANNEL_KINDS or (kind in _VAGUE_KINDS and directions[axis] == "none"):
                channel_axes.append(axis)
        if len(channel_axes) > 1:
            raise UnsupportedFormatError(
                f"{self.path}: {len(channel_axes)} axes of values cannot be split into "
                "grid and channels"
            )
        self.axes = [axis for axis in range(num_dims) if axis not in channel_axes]
        self.sizes = tuple(self.all_sizes[axis] for axis in self.axes)
        for axis in channel_axes:
            self.num_channels = self.all_sizes[axis]
            if self.num_channels > 1:
                self.inner = math.prod(self.all_sizes[:axis])

    def _per_axis(self, words: list[str]) -> list[str]:
        """Return words, one per axis; empty ones if there is another number of words."""
        if len(words) == len(self.all_sizes):
            return words
        return [""] * len(self.all_sizes)

    def units_of(self, key: str) -> list[str]:
        """Return the names of units in a field, of each axis or of each dimension of the space."""
        names = re.findall(r'"([^"]*)"|([^\s"]+)', self.text(key, ""))
        return [(quoted or plain).strip() for quoted, plain in names]

    @property
    def units(self) -> list[str]:
        """The units of length along the axes of the grid that have one."""
        if "space units" in self:
            return self.units_of("space units")
        units = self.units_of("units")
        if len(units) == len(self.all_sizes):
            return [units[axis] for axis in self.axes]
        return units

    @property
    def time(self) -> str:
        """Which axis of several values is one of time; "" if none is.

        Its kind or unit shows it, or the space, whose last dimension is then time.
        """
        space = self.text("space", "")
        if space.lower().endswith("time") and self.all_sizes[-1] > 1:
            return f"axis {len(self.all_sizes) - 1} of the space {shorten(space, 60)}"
        kinds = self._per_axis(self.text("kinds", "").lower().split())
        units = self._per_axis(self.units_of("units"))
        for axis, size in enumerate(self.all_sizes):
            if size > 1 and kinds[axis] == "time":
                return f"axis {axis} of the kind time"
            if size > 1 and units[axis].lower() in _TIME_UNITS:
                return f"axis {axis} in {units[axis]}"
        return ""

    def source(self) -> VoxelSource:
        """Return the place of the voxels."""
        expected = "the name of an integer or floating-point type such as uint8, short or float"
        kind = self.choice("type", _TYPES, expected)
        encoding = self.choice("encoding", _ENCODINGS, "raw, gzip, ascii or hex")
        path, start = self.voxel_file(is_compressed=encoding == "gzip")
        # ITK takes the lowest 32 bits of a larger number.
        if self.integer("line skip", "0", limits=(0, 1 << 30)) or encoding == "text":
            raise self.rare("lines to skip, or voxels as text")
        # -1 means that the voxels end the file.
        fewest = -1 if encoding == "raw" else 0
        offset = self.integer("byte skip", "0", limits=(fewest, 1 << 60))
        if offset < 0:
            start = offset
            offset = 0
        dtype = np.dtype(kind)
        default = "little" if dtype.itemsize == 1 else None  # Single bytes have no order.
        dtype = dtype.newbyteorder(self.choice("endian", _ORDERS, "little or big", default))
        return VoxelSource(path, encoding, dtype, self.inner, start=start, offset=offset)

    def place(self) -> tuple[Float64, Sequence[float], tuple[float, ...]]:
        """Return steps, place and signs in the world that the header names, or in LPS."""
        num_dims = len(self.all_sizes)
        num_axes = len(self.axes)
        if "axis mins" in self:
            raise self.rare("axis mins")
        if not _IN_SPACE & set(self):
            words = self._per_axis(self.text("spacings", "1 " * num_dims).split())
            spacings = finite_numbers([words[axis] for axis in self.axes])
            if spacings is None or 0.0 in spacings:
                raise self.damaged(
                    "spacings", f"{num_dims} finite numbers other than 0, NaN for channels"
                )
            return np.diag(spacings), (0.0,) * num_axes, LPS

        name = self.text("space", "")
        signs = _SPACES.get(re.sub("[- ]", "", name.lower()))
        has_one_of_both = bool(name) != ("space dimension" in self)
        if signs is None or "spacings" in self or not has_one_of_both:
            raise self.rare(f"the space {shorten(name, 60)!r}, or spacings in it")
        space_dims = self.integer("space dimension", "3", limits=(1, _MAX_DIMS))
        if space_dims != num_axes:
            raise UnsupportedFormatError(
                f"{self.path}: a grid of {num_axes} axes in a space of {space_dims} dimensions; "
                "expected as many axes as dimensions"
            )
        origin = [(0.0,) * num_axes]
        if "space origin" in self:
            if "nan" in self.text("space origin").lower():
                raise self.rare("a space origin that is no place")
            expected = f"one vector of {num_axes} finite numbers such as (0,0,0)"
            origin = self._vectors("space origin", [0], 1, expected)
        if "space directions" not in self:
            raise self.rare("no space directions")
        expected = f"{num_dims} vectors of {num_axes} finite numbers, none for channels"
        vectors = self._vectors("space directions", self.axes, num_dims, expected)

        # ITK computes length and direction: their rounding is repeated.
        columns = np.array(vectors).T
        lengths = np.sqrt((columns * columns).sum(axis=0))
        if not np.isfinite(lengths).all() or not np.isfinite(1 / lengths).all():
            raise self.damaged("space directions", "vectors that are as long as a voxel")
        return columns * (1 / lengths) * lengths, origin[0], signs

    def _vectors(
        self, name: str, axes: Sequence[int], num_entries: int, expected: str
    ) -> list[tuple[float, ...]]:
        """Return the vectors of some axes in a field, one of whose entries is about each axis."""
        text = self.text(name)
        entries = _ENTRIES.findall(text)
        if len(entries) != num_entries or _ENTRIES.sub("", text).strip():
            raise self.damaged(name, expected)
        vectors = []
        for axis in axes:
            words = entries[axis][1:-1].split(",")
            vector = finite_numbers([word.strip() for word in words])
            if vector is None or len(vector) != len(self.axes):
                raise self.damaged(name, expected)
            vectors.append(vector)
        return vectors

    def lines_of_place(self, header: VolumeHeader) -> tuple[str, ...]:
        """Return the lines without an entry of a channel axis.

        In a space without a name, only lengths that all have one unit, other than mm, have to be
        kept.
        """
        units = self.units
        line_of_units = "space units: " + " ".join(f'"{unit}"' for unit in units)
        if "space" in self:
            entries = _ENTRIES.findall(self.text("space directions", ""))
            directions = [entry for entry in entries if entry.startswith("(")]
            lines = [f"space: {self.text('space')}", "space directions: " + " ".join(directions)]
            origin = self.text("space origin", "")
            if origin:
                lines.append(f"space origin: {origin}")
            if len(units) == 3 and all(re.fullmatch(r"[\w ?\udcb5]{0,30}", unit) for unit in units):
                lines.append(line_of_units)
            return tuple(lines)

        is_one_unit = len(set(units)) == 1 and len(units) == header.num_axes
        if not is_one_unit or text_header.MM_PER_UNIT.get(units[0].lower(), 1.0) == 1.0:
            return ()
        return (*_geometry_lines(header), line_of_units)

    def segments(self) -> Segments:
        """Return the segments that 3D Slicer describes by pairs of key and value."""
        if self.num_channels > 1:
            return ()
        return described_segments(entry for entry, _ in self.described())

    def described(self) -> Iterator[tuple[tuple[str, str, Sequence[float]], str]]:
        """Yield label, name and color of each segment, as they are written, and its layer."""
        for key in self:
            start, _, part = key.partition("_")
            if part == "Name":
                label = self.get(f"{start}_LabelValue", "")
                color = finite_numbers(self.get(f"{start}_Color", "").split()) or ()
                yield (label, self[key], color), self.get(f"{start}_Layer", "0")


def write(voxels: VoxelsToWrite, threads: int) -> None:
    """Write an .nrrd, or an .nhdr with a .raw.gz, as gzip data; a voxel's channels are together."""
    kept = text_header.kept_lines(voxels, NrrdHeader.format)
    space, *geometry = kept or _geometry_lines(voxels.like)
    sizes = voxels.shape[::-1]
    kinds = ["domain"] * voxels.like.num_axes
    if voxels.num_channels is not None:
        sizes = (sizes[-1], *sizes[:-1])
        kinds.insert(0, "vector")
        prefix = "space directions:"
        geometry = [line.replace(prefix, f"{prefix} none", 1) for line in geometry]

    lines = [
        "NRRD0004",
        f"type: {_WRITTEN_TYPES.get(voxels.dtype.name, voxels.dtype.name)}",
        f"dimension: {len(sizes)}",
        space,
        "sizes: " + " ".join(map(str, sizes)),
        *geometry,
        "kinds: " + " ".join(kinds),
    ]
    if voxels.dtype.itemsize > 1:
        lines.append("endian: little")
    lines.append("encoding: gzip")
    _, *voxel_files = files_written(voxels.path)
    for file in voxel_files:
        lines.append(f"data file: {text_header.text_of_name(file.name)}")
    if suffix_of(voxels.path) in LABELS_SUFFIXES:
        extent = " ".join(f"0 {size - 1}" for size in voxels.shape[::-1])
        for number, segment in enumerate(voxels.segments):
            values = {
                "ID": f"Segment_{segment.label}",
                "Name": printable(segment.name),
                "LabelValue": segment.label,
                "Layer": 0,
                "Color": " ".join(f"{part:.6g}" for part in segment.shown_color),
                "Extent": extent,
            }
            lines += [f"Segment{number}_{key}:={value}" for key, value in values.items()]
    lines.append("" if voxel_files else "\n")  # An empty line comes before voxels.

    with atomic_files(voxels.path) as files:
        files[-1].write("\n".join(lines).encode("utf-8", "surrogateescape"))
        write_gzip(files[0], voxels.blocks(interleaved=True), threads)


def _geometry_lines(header: VolumeHeader) -> tuple[str, ...]:
    """Return the lines that place a grid in LPS."""
    direction, origin, spacing = text_header.place_in_lps(header)
    num_axes = len(spacing)
    vectors = []
    for vector in (*(direction * spacing).T, origin):
        vectors.append("(" + ",".join(map(repr, vector.tolist())) + ")")
    space = "space: left-posterior-superior" if num_axes == 3 else f"space dimension: {num_axes}"
    directions = " ".join(vectors[:-1])
    return (space, f"space directions: {directions}", f"space origin: {vectors[-1]}")
