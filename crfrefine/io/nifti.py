"""NIfTI-1 and NIfTI-2, `.nii` and `.nii.gz`: voxels decoded here (nibabel would go through float64)."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from crfrefine.base.labels import LARGEST_LABEL
from crfrefine.base.text import shorten
from crfrefine.io.atomic import write_bytes
from crfrefine.io.nifti_header import LONGEST, header_to_write, interpret, parse
from crfrefine.io.segments import MOST_OF_A_NAME, Segment
from crfrefine.io.streams import GZIP_MAGIC, inflated, is_named_gzip, misnamed, open_bytes, read_start
from crfrefine.io.volume import open_voxels

if TYPE_CHECKING:
    from crfrefine.io.content import Content
    from crfrefine.io.volume import Volume, VolumeHeader

__all__ = ["open_voxels", "read_header", "recognizes", "write"]


def recognizes(start: bytes) -> bool:
    """Return whether it is a NIfTI-1 or NIfTI-2 header of a single file, in either byte order, compressed or not."""
    block = inflated(start) or start
    return block[344:348] == b"n+1\0" or block[4:8] == b"n+2\0"


def read_header(path: Path) -> VolumeHeader:
    """Read only the header; only the beginning of a compressed file is inflated."""
    start, named_so = read_start(path), is_named_gzip(path)
    is_gzip = start.startswith(GZIP_MAGIC) or (named_so and not recognizes(start))
    with open_bytes(path, "gzip" if is_gzip else "raw") as reader:
        block = reader.read(LONGEST)
        template = parse(block, path)
        header = interpret(template, path, path, "gzip" if is_gzip else "raw")
        segments: tuple[Segment, ...] = ()
        if header.num_channels == 1:
            assert header.source is not None
            size, end = int(template["sizeof_hdr"]), header.source.num_bytes_after
            block += reader.read(max(0, min(end, size + MOST_BYTES) - len(block)))
            segments = labels_in(block[size:end], getattr(template, "endianness", "<"))
    return replace(
        header,
        segments=segments,
        details=(("sform, qform", f"codes {int(template['sform_code'])}, {int(template['qform_code'])}"),),
        misnamed=misnamed(compressed=is_gzip, named_so=named_so),
    )


def write(content: Content, like: Volume, threads: int) -> None:
    """Write voxels with the geometry of another volume; channels get the fourth dimension of the file.

    Of a NIfTI file, both transforms with their codes and the units are kept bit for bit.
    """
    header = header_to_write(content, like, is_pair=False)
    write_bytes(content.path, chain([header], content.one_after_the_other()), threads)


# Names and colors of labels in the extension of a NIfTI header: the table of Caret, which TotalSegmentator writes, too.

MOST_BYTES = 1 << 22
"""Most bytes of a file's extensions that are looked at."""


def labels_in(extensions: bytes, byte_order: str) -> tuple[Segment, ...]:
    """Return the labels of the first table behind a header, none if it cannot be used: names change no result. The text may be cut off."""
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
    from xml.etree import ElementTree

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
