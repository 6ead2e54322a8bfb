"""Segmentations of 3D Slicer, `.seg.nrrd`: an NRRD label map, or several as layers, with lines about each segment in its header."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.base.text import counted, shorten
from crfrefine.errors import UnsupportedFormatError
from crfrefine.io import nrrd, nrrd_header
from crfrefine.io.allocation import allocate_as
from crfrefine.io.decode import Decoder
from crfrefine.io.layers import LabelMapBuilder, with_unique_labels
from crfrefine.io.memory_stream import array_stream
from crfrefine.io.slicer_segments import NO_OFFSET, OFFSET_KEY, StoredSegment, lines_to_write, read_segments
from crfrefine.io.text_formats import detached_voxels, volume_header

if TYPE_CHECKING:
    from crfrefine.io.content import Content
    from crfrefine.io.volume import Volume, VolumeHeader
    from crfrefine.io.voxel_stream import VoxelStream


@dataclass(frozen=True)
class _Template:
    """What is needed to read the label map, and to write another one on its grid.

    Attributes:
        header: as that of an NRRD file.
        stored: the segments of its layers; none if there is one layer, which is the label map.
        offset: of the grid in that of the reference image, as the file says it.
    """

    header: VolumeHeader
    stored: tuple[StoredSegment, ...]
    offset: str


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
    stored = read_segments(path, text.segments)
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
        template=_Template(header, stored if num_layers > 1 else (), text.segments.get(OFFSET_KEY, NO_OFFSET)),
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
    header, offset = like.header, NO_OFFSET
    if header is not None and isinstance(header.template, _Template):
        # On the grid of a segmentation, which may be a part of the reference image's.
        header, offset = header.template.header, header.template.offset
    lines = lines_to_write(content.segments, sizes, offset)
    nrrd.write_nrrd(path, content, replace(like, header=header), voxels=voxels, threads=threads, more_lines=lines)


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
