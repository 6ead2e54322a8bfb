"""NIfTI-1 and NIfTI-2, `.nii` and `.nii.gz`: headers through nibabel, voxels decoded here (nibabel would go through float64)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from crfrefine.base.text import shorten
from crfrefine.io.atomic import atomic_file
from crfrefine.io.geometry import require_usable
from crfrefine.io.nifti_header import check_size, data_offset, geometry, header_to_write, layout, parse, scaling, voxel_type
from crfrefine.io.segments import MOST_OF_A_NAME, Segment
from crfrefine.io.streams import GZIP_MAGIC, START_BYTES, finish, inflated, misnamed, open_bytes, read_start, skip, write_gzip
from crfrefine.io.volume import LARGEST_LABEL, VolumeHeader, spacing_of
from crfrefine.io.voxel_stream import VoxelStream

if TYPE_CHECKING:
    from crfrefine.io.content import Content
    from crfrefine.io.volume import Volume


def recognizes(start: bytes) -> bool:
    """Return whether it is a NIfTI-1 or NIfTI-2 header of a single file, in either byte order, compressed or not."""
    block = inflated(start) or start
    return block[344:348] == b"n+1\0" or block[4:8] == b"n+2\0"


def read_header(path: Path) -> VolumeHeader:
    """Read only the header; only the beginning of a compressed file is inflated.

    Raises:
        UnsupportedFormatError: not a NIfTI file, damaged, or an unsupported kind of voxel or layout.
    """
    container = _container(path)
    with open_bytes(path, container) as reader:
        block = reader.read(540)
        header = _interpret(block, path, compressed=container == "gzip")
        if header.num_channels > 1:
            return header
        template: Any = header.template
        size = len(template.binaryblock)
        block += reader.read(max(0, min(data_offset(template), size + MOST_BYTES) - len(block)))
    return replace(header, segments=labels_in(block[size : data_offset(template)], template.endianness))


def _container(path: Path) -> str:
    """Return "gzip" or "raw": what the name says, unless the content says otherwise."""
    start = read_start(path, START_BYTES)
    if _is_named_gzip(path):
        return "raw" if not start.startswith(GZIP_MAGIC) and recognizes(start) else "gzip"
    return "gzip" if start.startswith(GZIP_MAGIC) else "raw"


def _is_named_gzip(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _interpret(block: bytes, path: Path, *, compressed: bool) -> VolumeHeader:
    header = parse(block, path)
    grid_shape, num_channels = layout(tuple(int(size) for size in header.get_data_shape()), path)
    dtype = voxel_type(header, path)
    affine, notes = geometry(header, path)
    require_usable(affine, len(grid_shape), path)
    check_size(path, header, dtype, compressed=compressed)
    version = 2 if header["sizeof_hdr"] == 540 else 1
    return VolumeHeader(
        path=path,
        format=f"NIfTI-{version}" + (", gzip" if compressed else ""),
        grid_shape=grid_shape,
        num_channels=num_channels,
        dtype=dtype.name,
        spacing=spacing_of(affine, len(grid_shape)),
        affine=affine,
        template=header,
        notes=notes,
        details=(("sform, qform", f"codes {int(header['sform_code'])}, {int(header['qform_code'])}"),),
        misnamed=misnamed(compressed=compressed, named_so=_is_named_gzip(path)),
    )


@contextmanager
def open_voxels(header: VolumeHeader) -> Iterator[VoxelStream]:
    """Open the file at its first voxel; one channel follows the other."""
    template: Any = header.template
    slope, intercept = scaling(template)
    with open_bytes(header.path, _container(header.path)) as reader:
        skip(reader, data_offset(template))
        finish_reading = partial(finish, reader)
        yield VoxelStream(reader, template.get_data_dtype(), header.path, finish_reading, slope=slope, intercept=intercept)


def voxel_files(path: Path) -> tuple[Path, ...]:
    """Return no files: the voxels follow the header."""
    return ()


def write(path: Path, content: Content, like: Volume, *, kind: str, voxels: Path | None, threads: int) -> None:
    """Write voxels with the geometry of another volume.

    Args:
        path: ends in .nii or .nii.gz.
        content: voxels; channels get the fourth dimension of the file.
        like: its geometry is kept bit for bit if it came from a NIfTI file: both transforms with their codes, and the units.
        kind: what the voxels are; not stored in the file.
        voxels: none, they follow the header.
        threads: for compression.
    """
    header = header_to_write(content, like)
    header["magic"] = header.single_magic
    header["vox_offset"] = header.single_vox_offset
    with atomic_file(path) as file:
        parts = _parts(header, content)
        if _is_named_gzip(path):
            write_gzip(file, parts, threads)
        else:
            file.writelines(parts)


def _parts(header: Any, content: Content) -> Iterator[bytes | memoryview]:
    yield header.binaryblock + bytes(int(header["vox_offset"]) - len(header.binaryblock))
    yield from content.one_after_the_other()


# Names and colors of labels in the extension of a NIfTI header: the table of Caret, which TotalSegmentator writes, too.

MOST_BYTES = 1 << 22
"""Most bytes of a file's extensions that are looked at."""


def labels_in(extensions: bytes, byte_order: str) -> tuple[Segment, ...]:
    """Return the labels of the first table, in their order; none if there is no table that can be used: names change no result.

    Args:
        extensions: what follows the header, from its flag on; it may be cut off.
        byte_order: "<" or ">".
    """
    place = 4
    while extensions[:1] > b"\0" and place + 8 <= len(extensions):
        size = int.from_bytes(extensions[place : place + 4], "little" if byte_order == "<" else "big")
        content = extensions[place + 8 : place + size]
        if size < 8:
            break
        if b"<CaretExtension" in content and b"<!" not in content.replace(b"<![CDATA[", b""):
            return _table(content.strip(b"\0 \r\n\t"))
        place += size
    return ()


def _table(content: bytes) -> tuple[Segment, ...]:
    found: dict[int, Segment] = {}
    try:
        for entry in ElementTree.fromstring(content).iter("Label"):
            label = int(entry.get("Key", ""))
            name = shorten((entry.text or "").strip(), MOST_OF_A_NAME)
            if 1 <= label <= LARGEST_LABEL and name:
                found.setdefault(label, Segment(label, name, _color([entry.get(part) for part in ("Red", "Green", "Blue")])))
    except (ElementTree.ParseError, ValueError):
        return ()
    return tuple(found[label] for label in sorted(found))


def _color(parts: list[str | None]) -> tuple[float, float, float] | None:
    red, green, blue = (float(part) if part is not None else -1.0 for part in parts)
    return (red, green, blue) if all(0 <= part <= 1 for part in (red, green, blue)) else None
