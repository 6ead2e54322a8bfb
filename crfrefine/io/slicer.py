"""Segmentations of 3D Slicer, `.seg.nrrd`: an NRRD label map, or several as layers, with lines about each segment in its header."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.errors import UnsupportedFormatError
from crfrefine.io import nrrd, nrrd_header
from crfrefine.io.allocation import allocate_as
from crfrefine.io.decode import Decoder
from crfrefine.io.layers import LabelMapBuilder, with_unique_labels
from crfrefine.io.memory_stream import array_stream
from crfrefine.io.segments import MOST_OF_A_NAME, TISSUE, Code, Segment
from crfrefine.io.text_formats import detached_voxels, volume_header
from crfrefine.io.text_header import finite_number, whole_number
from crfrefine.io.volume import LARGEST_LABEL
from crfrefine.text import counted, printable, shorten

if TYPE_CHECKING:
    from crfrefine.io.content import Content
    from crfrefine.io.volume import Volume, VolumeHeader
    from crfrefine.io.voxel_stream import VoxelStream

_KEY = re.compile(r"Segment([0-9]{1,5})_(ID|Name|Color|LabelValue|Layer|Tags)", re.ASCII)
_TERMINOLOGY = "TerminologyEntry:"
_CONTEXT = "Segmentation category and type - DICOM master list"
_ANATOMY = "Anatomic codes - DICOM master list"


@dataclass(frozen=True)
class _Stored:
    """A segment as it is stored: where a layer has a value."""

    segment: Segment
    layer: int
    value: int


@dataclass(frozen=True)
class _Template:
    """The header as that of an NRRD file, and the segments of its layers; none if there is one layer, which is the label map."""

    header: VolumeHeader
    stored: tuple[_Stored, ...]


def recognizes(start: bytes) -> bool:
    """Return whether it is an NRRD header with lines about segments."""
    return start.startswith(b"NRRD000") and nrrd.has_segments(start)


def read_header(path: Path) -> VolumeHeader:
    """Read only the header.

    Raises:
        UnsupportedFormatError: not such a file, damaged, cut off, or layers without segments.
        InputError: the geometry is not usable.
    """
    text = nrrd_header.read(path)
    header = volume_header(path, text, nrrd.NAME)
    stored = _segments(path, text.segments)
    num_layers = header.num_channels
    if num_layers > 1 and not stored:
        raise UnsupportedFormatError(f"{path}: {num_layers} layers without a line about a segment; save it again with 3D Slicer")
    outside = next((one for one in stored if one.layer >= num_layers), None)
    if outside is not None:
        raise UnsupportedFormatError(
            f"{path}: damaged header: the segment {shorten(outside.segment.name)!r} is in layer {outside.layer}, of {num_layers} from 0"
        )
    segments, note = with_unique_labels([one.segment for one in stored])
    if note is not None and num_layers == 1:
        raise UnsupportedFormatError(f"{path}: damaged header: two segments of one layer have one LabelValue")
    stored = tuple(replace(one, segment=segment) for one, segment in zip(stored, segments, strict=True))
    layers = f", {num_layers} layers" if num_layers > 1 else ""
    return replace(
        header,
        format=f"NRRD, segmentation of 3D Slicer{layers}",
        num_channels=1,
        template=_Template(header, stored if num_layers > 1 else ()),
        notes=() if note is None else (note,),
        details=(("segments", counted(len(segments), "segment")),) if segments else (),
        segments=segments,
        covers_part=len(header.grid_shape) == 3,
    )


@contextmanager
def open_voxels(header: VolumeHeader) -> Iterator[VoxelStream]:
    """Open the label map; several layers are put together first, in memory."""
    template: _Template = header.template
    with nrrd.open_voxels(template.header) as stream:
        if template.stored:
            stream = array_stream(_merged(header, template, stream), header.path)
        yield stream


def voxel_files(path: Path) -> tuple[Path, ...]:
    """Return the separate files with the voxels of a header."""
    return detached_voxels(nrrd_header.read, path)


def write(path: Path, content: Content, like: Volume, *, kind: str, voxels: Path | None, threads: int) -> None:
    """Write a label map as one layer, with its segments.

    Args:
        path: ends in the format's suffix.
        content: labels, with segments.
        like: as for NRRD.
        kind: "labels".
        voxels: none, they follow the header.
        threads: for compression.

    Raises:
        UnsupportedFormatError: sheared axes, or a grid that is not of three axes.
    """
    sizes = content.grid_shape[::-1]
    if len(sizes) != 3:
        raise UnsupportedFormatError(f"{path}: 3D Slicer knows segmentations of three axes only; this one has {len(sizes)}")
    extent = " ".join(f"0 {size - 1}" for size in sizes)
    lines = [line for number, segment in enumerate(content.segments) for line in _lines_of(number, segment, extent)]
    lines += [
        "Segmentation_ContainedRepresentationNames:=Binary labelmap|",
        "Segmentation_MasterRepresentation:=Binary labelmap",
        "Segmentation_ReferenceImageExtentOffset:=0 0 0",
    ]
    like = replace(like, header=_as_nrrd(like.header))
    nrrd.write_nrrd(path, content, like, voxels=voxels, threads=threads, more_lines=lines)


def _as_nrrd(header: VolumeHeader | None) -> VolumeHeader | None:
    return header.template.header if header is not None and isinstance(header.template, _Template) else header


def _merged(header: VolumeHeader, template: _Template, stream: VoxelStream) -> np.ndarray[tuple[int, ...], np.dtype[np.unsignedinteger]]:
    """Read all layers, and put their segments together."""
    shape = (template.header.num_channels, *header.grid_shape[::-1])
    layers = allocate_as(shape, stream.kept_type, header.path)
    decoder = Decoder(stream, shape)
    decoder.fill(layers)
    decoder.finish()
    segments = [one.segment for one in template.stored]
    builder = LabelMapBuilder.of(header.path, shape[1:], segments)
    names = {segment.label: segment.name for segment in segments}
    for one in template.stored:
        builder.add(one.segment, layers[one.layer] == one.value, slice(None), names.__getitem__)
    return builder.labels


def _segments(path: Path, lines: Mapping[str, str]) -> tuple[_Stored, ...]:
    """Return the segments in the order of their numbers."""
    by_number: dict[int, dict[str, str]] = {}
    for key, text in lines.items():
        if match := _KEY.fullmatch(key):
            by_number.setdefault(int(match[1]), {})[match[2]] = text
    found = []
    for place, number in enumerate(sorted(by_number)):
        entries = by_number[number]
        # Before version 4.11, every segment was a binary layer of its own.
        value, layer = whole_number(entries.get("LabelValue", "1")), whole_number(entries.get("Layer", str(place)))
        if value is None or not 1 <= value <= LARGEST_LABEL or layer is None or layer < 0:
            raise UnsupportedFormatError(
                f"{path}: damaged header: Segment{number} has the LabelValue {shorten(entries.get('LabelValue', ''))!r} in layer "
                f"{shorten(entries.get('Layer', ''))!r}; expected a label from 1 to {LARGEST_LABEL} and a layer from 0"
            )
        category, kind = _codes(entries.get("Tags", ""))
        name = entries.get("Name") or entries.get("ID") or f"Label {value}"
        segment = Segment(value, shorten(printable(_unescaped(name)), MOST_OF_A_NAME), _color(entries.get("Color", "")), category, kind)
        found.append(_Stored(segment, layer, value))
    return tuple(found)


def _color(text: str) -> tuple[float, float, float] | None:
    """Return red, green, blue from 0 to 1; None if the text is something else: a color changes no result."""
    numbers = [number for word in text.split()[:4] if (number := finite_number(word)) is not None]
    if len(numbers) != 3 or not all(0 <= number <= 1 for number in numbers):
        return None
    return numbers[0], numbers[1], numbers[2]


def _codes(tags: str) -> tuple[Code, Code]:
    """Return category and type of a terminology entry `context~scheme^value^meaning~scheme^value^meaning~...`."""
    entry = next((tag for tag in tags.split("|") if tag.startswith(_TERMINOLOGY)), "")
    codes = [_code(part) for part in entry.split("~")[1:3]]
    return tuple(code or TISSUE for code in (*codes, None, None))[:2]  # type: ignore[return-value]


def _code(text: str) -> Code | None:
    scheme, value, meaning = (*map(printable, text.split("^")), "", "", "")[:3]
    return Code(shorten(value, 16), shorten(scheme, 16), shorten(meaning, MOST_OF_A_NAME)) if scheme and value and meaning else None


def _lines_of(number: int, segment: Segment, extent: str) -> Iterator[str]:
    category, kind = (
        "^".join(re.sub(r"[~^|]", " ", text) for text in (code.scheme, code.value, code.meaning))
        for code in (segment.category, segment.type)
    )
    values = {
        "ID": f"Segment_{segment.label}",
        "Name": _escaped(segment.name),
        "NameAutoGenerated": "0",
        "Color": " ".join(f"{round(part, 6):g}" for part in segment.shown_color),
        "ColorAutoGenerated": "0",
        "Extent": extent,
        "LabelValue": str(segment.label),
        "Layer": "0",
        "Tags": f"{_TERMINOLOGY}{_CONTEXT}~{_escaped(category)}~{_escaped(kind)}~^^~{_ANATOMY}~^^~^^|",
    }
    yield from (f"Segment{number}_{key}:={value}" for key, value in values.items())


def _escaped(text: str) -> str:
    return printable(text).replace("\\", "\\\\").replace("\n", "\\n")


def _unescaped(text: str) -> str:
    return re.sub(r"\\([\\n])", lambda match: "\n" if match[1] == "n" else "\\", text)
