"""NIfTI-1 and NIfTI-2, `.nii` and `.nii.gz`: voxels decoded here (nibabel would go through float64)."""

from __future__ import annotations

import html
import re
import struct
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from crfrefine.base.labels import MAX_LABEL
from crfrefine.base.text import shorten
from crfrefine.io.atomic import write_bytes
from crfrefine.io.nifti_header import LONGEST, header_to_write, interpret, parse
from crfrefine.io.segments import MAX_OF_A_NAME, Segment
from crfrefine.io.streams import GZIP_MAGIC, inflated, is_named_gzip, misnamed, open_bytes, read_start
from crfrefine.io.volume import open_voxels

if TYPE_CHECKING:
    from collections.abc import Sequence

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
        notes = header.notes
        if header.num_channels == 1:
            assert header.source is not None
            size, end = int(template["sizeof_hdr"]), header.source.offset
            block += reader.read(max(0, min(end, size + MAX_EXTENSION_BYTES) - len(block)))
            try:
                segments = labels_in(block[size:end], template.endianness)
            except ValueError as error:
                notes += (f"the table of label names in its header cannot be read: {shorten(error, 80)}",)
    return replace(
        header,
        segments=segments,
        notes=notes,
        details=(("sform, qform", f"codes {int(template['sform_code'])}, {int(template['qform_code'])}"),),
        misnamed=misnamed(compressed=is_gzip, named_so=named_so),
    )


def write(content: Content, like: Volume, threads: int) -> None:
    """Write voxels with the geometry of another volume; channels get the fourth dimension of the file.

    Both transforms of a NIfTI file with their codes and the units are kept bit for bit. A label map
    gets the table of its segments.
    """
    header = header_to_write(content, like, is_pair=False, extension=_extension_of(content.segments))
    write_bytes(content.path, chain([header], content.one_after_the_other()), threads)


# Names and colors of labels in the extension of a NIfTI header: the XML table of Caret, which TotalSegmentator writes, too.

MAX_EXTENSION_BYTES = 1 << 22
"""Bytes of a file's extensions that are looked at."""

_MAX_TABLE_BYTES = 1 << 20  # A label takes about 100.
_MAX_DEPTH = 16  # Levels of elements in a table, which has five.
_MAX_TEXT = 1024  # Characters of a label's text that are kept.

# Code of the extension, as TotalSegmentator writes it; nibabel's `get_content` refuses Caret's, 30.
_ANY_CODE = 0
_TABLE_HEAD = '<?xml version="1.0" encoding="UTF-8"?> <CaretExtension><VolumeInformation Index="0"><LabelTable>'
_TABLE_TAIL = "</LabelTable><VolumeType>Label</VolumeType></VolumeInformation></CaretExtension>"


def labels_in(extensions: bytes, byte_order: str) -> tuple[Segment, ...]:
    """Return the labels of the first table behind a header; none if there is no table.

    Raises:
        ValueError: the table cannot be read, or is larger than a table of labels.
    """
    place = 4
    while extensions[:1] > b"\0" and place + 8 <= len(extensions):
        size = int.from_bytes(extensions[place : place + 4], "little" if byte_order == "<" else "big")
        content = extensions[place + 8 : place + size]
        if size < 8:
            break
        # In UTF-16 and UTF-32, zeros are between the letters.
        if b"<CaretExtension" in content.replace(b"\0", b""):
            return _table(content.strip(b"\0 \r\n\t"))
        place += size
    return ()


def _table(content: bytes) -> tuple[Segment, ...]:
    """Parse a table without building a tree. Document types and entities are refused: old versions of expat crash on some."""
    from xml.parsers import expat

    if len(content) > _MAX_TABLE_BYTES:
        raise ValueError(f"it is longer than {_MAX_TABLE_BYTES} bytes")
    try:
        table = content.decode()
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    # A zero among the letters would let expat read the same bytes as UTF-16.
    if "\0" in table or re.search(r"<!(?!\[CDATA\[|--)", table):
        raise ValueError("it is not plain XML in UTF-8, or has a document type")
    segments: dict[int, Segment] = {}
    open_elements: list[tuple[str, dict[str, str]]] = []
    text = ""

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal text
        if len(open_elements) == _MAX_DEPTH:
            raise ValueError(f"more than {_MAX_DEPTH} elements are nested")
        open_elements.append((name, attributes))
        text = ""

    def add_text(part: str) -> None:
        nonlocal text
        text += part[: _MAX_TEXT - len(text)]

    def end(name: str) -> None:
        _, attributes = open_elements.pop()
        if name != "Label":
            return
        key = attributes.get("Key", "").strip()
        if not key.isdecimal():  # Names change no result: the others are used.
            return
        label, shown = int(key[:9]), shorten(text.strip(), MAX_OF_A_NAME)
        if 1 <= label <= MAX_LABEL and shown:
            color = _color([attributes.get(part) for part in ("Red", "Green", "Blue")])
            segments.setdefault(label, Segment(label, shown, color))

    # For text, expat uses this encoding, whatever the table declares.
    parser = expat.ParserCreate("utf-8")
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, add_text
    try:
        parser.Parse(table, True)
    except expat.ExpatError as error:
        raise ValueError(f"damaged XML: {error}") from None
    return tuple(segments[label] for label in sorted(segments))


def _extension_of(segments: Sequence[Segment]) -> bytes:
    """Return a table that `labels_in` reads, with its size and code; empty without segments."""
    if not segments:
        return b""
    entries = [
        f'<Label Key="{segment.label}" Red="{red}" Green="{green}" Blue="{blue}" Alpha="1">{html.escape(segment.name, quote=False)}</Label>'
        for segment in segments
        for red, green, blue in [map(float, segment.shown_color)]
    ]
    lines = [_TABLE_HEAD, *entries, _TABLE_TAIL]
    text = "\n".join(lines).encode()
    size = -(-(8 + len(text)) // 16) * 16
    return struct.pack("<ii", size, _ANY_CODE) + text.ljust(size - 8)


def _color(parts: list[str | None]) -> tuple[float, float, float] | None:
    red, green, blue = (float(part) if part is not None else -1.0 for part in parts)
    return (red, green, blue) if all(0 <= part <= 1 for part in (red, green, blue)) else None
