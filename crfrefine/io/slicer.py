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
from crfrefine.io import nrrd
from crfrefine.io.decode import array_stream, read_whole
from crfrefine.io.segments import empty_label_map, put_segment, with_unique_labels
from crfrefine.io.slicer_segments import NO_OFFSET, OFFSET_KEY, StoredSegment, lines_to_write, read_segments
from crfrefine.io.text_formats import checked

if TYPE_CHECKING:
    from crfrefine.io.content import Content
    from crfrefine.io.decode import VoxelStream
    from crfrefine.io.volume import Volume, VolumeHeader


@dataclass(frozen=True)
class _Template:
    """What is needed to read the label map, and to write another one on its grid."""

    lines: tuple[str, ...]  # that place the grid, as in an NRRD file
    num_layers: int  # of the file
    stored: tuple[StoredSegment, ...]  # the segments of its layers; none if there is one layer, which is the label map
    offset: str  # of the grid in that of the reference image, as the file says it


def recognizes(start: bytes) -> bool:
    """Return whether it is an NRRD header with lines about segments."""
    return start.startswith(b"NRRD000") and nrrd.has_segments(start)


def read_header(path: Path) -> VolumeHeader:
    """Read only the header."""
    header, lines = nrrd.parse(path)
    header = checked(header)
    stored = read_segments(path, lines)
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
        template=_Template(header.template, num_layers, stored if num_layers > 1 else (), lines.get(OFFSET_KEY, NO_OFFSET)),
        notes=() if note is None else (note,),
        details=(("segments", counted(len(segments), "segment")),) if segments else (),
        segments=segments,
        covers_part=len(header.grid_shape) == 3,
    )


@contextmanager
def open_voxels(header: VolumeHeader) -> Iterator[VoxelStream]:
    """Open the label map; several layers are put together first, in memory."""
    template: _Template = header.template
    with nrrd.open_voxels(header) as stream:
        if template.stored:
            stream = array_stream(_merged(header, template, stream), header.path)
        yield stream


voxel_files = nrrd.voxel_files


def write(content: Content, like: Volume, threads: int) -> None:
    """Write a label map as one layer, with its segments."""
    sizes = content.grid_shape[::-1]
    if len(sizes) != 3:
        raise UnsupportedFormatError(f"{content.path}: 3D Slicer knows segmentations of three axes only; this one has {len(sizes)}")
    offset = NO_OFFSET
    if like.header is not None and isinstance(like.header.template, _Template):
        # On the grid of a segmentation, which may be a part of the reference image's.
        offset = like.header.template.offset
        like = replace(like, header=replace(like.header, format=nrrd.NAME, template=like.header.template.lines))
    nrrd.write(content, like, threads, lines_to_write(content.segments, sizes, offset))


def _merged(header: VolumeHeader, template: _Template, stream: VoxelStream) -> np.ndarray[tuple[int, ...], np.dtype[np.unsignedinteger]]:
    """Read all layers, and put their segments together."""
    shape = (template.num_layers, *header.grid_shape[::-1])
    layers = read_whole(stream, shape, header.path)
    segments = [one.segment for one in template.stored]
    labels = empty_label_map(header.path, shape[1:], segments)
    for one in template.stored:
        put_segment(labels, one.segment, layers[one.layer] == one.value, segments, header.path)
    return labels
