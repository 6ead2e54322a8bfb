"""DICOM segmentations, `.dcm`: binary segments frame by frame, or a label map; read through pydicom, written through highdicom."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.geometry import require_usable, spacing_of
from crfrefine.base.text import counted, shorten
from crfrefine.errors import InputError, UnsupportedFormatError
from crfrefine.io.decode import array_stream
from crfrefine.io.dicom_files import first_of, interpreting, is_segmentation, read_dataset, require_decoder, require_size
from crfrefine.io.dicom_frames import FrameDecoder
from crfrefine.io.dicom_identity import identity_of
from crfrefine.io.dicom_segments import read_segments
from crfrefine.io.segments import empty_label_map, put_segment
from crfrefine.io.streams import cut_off, read_start
from crfrefine.io.volume import VolumeHeader

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.io.content import Content
    from crfrefine.io.decode import VoxelStream
    from crfrefine.io.segments import Segment
    from crfrefine.io.volume import Volume

_MOST_PLANES = 1 << 14
_PLANES_PER_FRAME = 8
_SPARSE_BYTES = 1 << 28
"""Larger label maps need a frame in every eighth plane, unless an image gives the planes."""


@dataclass(frozen=True)
class _Template:
    """What is needed to read the pixels."""

    frames: tuple[tuple[int, int | None], ...]  # plane and segment (None in a label map)
    by_number: dict[int, Segment]  # segments
    bits: int  # of a pixel
    syntax: Any  # UID of the transfer syntax


def recognizes(start: bytes) -> bool:
    """Return whether it is a DICOM file that says it is a segmentation."""
    return is_segmentation(start)


def read_header(path: Path) -> VolumeHeader:
    """Read everything but the pixels; the grid are the planes from the first frame to the last.

    Raises:
        UnsupportedFormatError: not such a file, damaged, cut off, or with fractions.
        InputError: frames that are not parallel planes, evenly spaced.
    """
    if not is_segmentation(read_start(path)):
        raise UnsupportedFormatError(f"{path}: not a DICOM segmentation")
    with interpreting(path):
        found = read_dataset(path, None)
        segments, note = read_segments(path, found)
        affine, num_planes, planes = _planes(path, found)
        bits = int(found.BitsAllocated)
        is_binary = str(found.SegmentationType) == "BINARY"
        if str(found.SegmentationType) not in ("BINARY", "LABELMAP") or bits not in ((1,) if is_binary else (8, 16)):
            raise UnsupportedFormatError(
                f"{path}: a segmentation of type {shorten(found.SegmentationType, 20)} with {bits} bits; expected BINARY or LABELMAP"
            )
        numbers = _numbers(found) if is_binary else [None] * len(planes)
        unknown = next((number for number in numbers if is_binary and number not in segments), None)
        if unknown is not None:
            raise UnsupportedFormatError(f"{path}: damaged DICOM file: a frame is of segment {unknown}, which is not described")
        identity = identity_of(found)
        shape = (int(found.Columns), int(found.Rows), num_planes)
        syntax = found.file_meta.TransferSyntaxUID
        require_size(path, syntax, -(-math.prod((*shape[:2], len(planes))) * bits // 8))
        require_usable(affine, 3, path)
        return VolumeHeader(
            path=path,
            format="DICOM segmentation" + ("" if is_binary else ", label map"),
            grid_shape=shape,
            num_channels=1,
            dtype="uint8" if max(segment.label for segment in segments.values()) <= 255 else "uint16",
            spacing=spacing_of(affine),
            affine=affine,
            template=_Template(tuple(zip(planes, numbers, strict=True)), segments, bits, syntax),
            notes=() if note is None else (note,),
            details=(("segments", counted(len(segments), "segment")), *identity.details),
            identity=identity,
            segments=tuple(sorted(segments.values(), key=lambda segment: segment.label)),
            covers_part=True,
        )


@contextmanager
def open_voxels(header: VolumeHeader) -> Iterator[VoxelStream]:
    """Put the segments together to a label map, in memory."""
    template: _Template = header.template
    columns, rows, num_planes = header.grid_shape
    segments = template.by_number
    if header.covers_part:
        _require_frames(header)
    labels = empty_label_map(header.path, (num_planes, rows, columns), segments.values())
    for (plane, of_frame), pixels in zip(template.frames, _frames(header.path, template, (rows, columns)), strict=True):
        for number in (of_frame,) if of_frame is not None else np.unique(pixels[pixels > 0]).tolist():
            if number not in segments:
                raise UnsupportedFormatError(f"{header.path}: damaged DICOM file: a voxel is of segment {number}, which is not described")
            inside = pixels > 0 if of_frame is not None else pixels == number
            put_segment(labels[plane], segments[number], inside, segments.values(), header.path)
    yield array_stream(labels, header.path)


def _require_frames(header: VolumeHeader) -> None:
    """Raise InputError if a large label map has few planes with a frame.

    Its memory would follow from positions of frames, which cost a file nothing.
    """
    with_frame = len({plane for plane, _ in header.template.frames})
    num_planes = header.grid_shape[2]
    num_bytes = math.prod(header.grid_shape) * np.dtype(header.dtype).itemsize
    if num_planes > _PLANES_PER_FRAME * with_frame and num_bytes > _SPARSE_BYTES:
        raise InputError(
            f"{header.path}: only {with_frame} of its {num_planes} planes have a frame, and all of them take {num_bytes >> 20} MiB; "
            "if that is right, name the series it was made on, which says how many planes there are (convert: --like SERIES)"
        )


def write(content: Content, like: Volume, threads: int) -> None:
    """Write a label map as binary segments that refer to the series they were made on."""
    from crfrefine.io.dicom_segmentation_writing import write_segmentation

    write_segmentation(content, like.header)


def _numbers(found: Any) -> list[int | None]:
    """Return the number of the segment of each frame, from the values that all frames share or from the frame's own."""
    shared = first_of(found, "SharedFunctionalGroupsSequence")
    name = "SegmentIdentificationSequence"
    groups = (shared if name in shared else frame for frame in found.PerFrameFunctionalGroupsSequence)
    return [int(first_of(group, name).ReferencedSegmentNumber) for group in groups]


def _planes(path: Path, found: Any) -> tuple[NDArray[np.float64], int, list[int]]:
    """Return the affine, the number of planes, and the plane of each frame."""
    shared = first_of(found, "SharedFunctionalGroupsSequence")
    frames = found.PerFrameFunctionalGroupsSequence
    if len(frames) != int(found.NumberOfFrames) or not frames:
        raise UnsupportedFormatError(f"{path}: damaged DICOM file: {found.NumberOfFrames} frames, of which {len(frames)} are described")
    orientations = [_orientation(shared if "PlaneOrientationSequence" in shared else frame) for frame in frames]
    positions = np.array(
        [[float(value) for value in first_of(frame, "PlanePositionSequence").ImagePositionPatient] for frame in frames], np.float64
    ).reshape(-1, 3)
    if max(float(np.abs(one - orientations[0]).max()) for one in orientations) > 1e-3:
        raise InputError(f"{path}: frames that are not parallel; expected the planes of a volume")
    row, column = orientations[0]
    measures = first_of(shared if "PixelMeasuresSequence" in shared else frames[0], "PixelMeasuresSequence")
    between_rows, between_columns = (float(value) for value in measures.PixelSpacing)
    normal = np.cross(row, column)
    places = positions @ normal
    distinct = np.unique(np.round(places, 4))
    stated = [abs(float(value)) for name in ("SpacingBetweenSlices", "SliceThickness") if (value := measures.get(name))]
    step = _step(distinct, stated)
    first = int(places.argmin())
    exact = (places - places[first]) / step
    planes = np.rint(exact).astype(np.int64) if np.abs(exact).max() < _MOST_PLANES else np.array([_MOST_PLANES])
    if planes.max() >= _MOST_PLANES:
        raise InputError(f"{path}: its frames are up to {np.ptp(places):.4g} mm apart in steps of {step:.4g} mm: too many planes")
    last = int(places.argmax())
    vector = (positions[last] - positions[first]) / planes[last] if planes[last] else normal * step
    off = np.sqrt(((positions - positions[first] - planes[:, np.newaxis] * vector) ** 2).sum(axis=1))
    if off.max() > 0.1 * step:
        raise InputError(f"{path}: frames are up to {off.max():.3g} mm away from evenly spaced planes in steps of {step:.4g} mm")
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = row * between_columns, column * between_rows, vector
    affine[:3, 3] = positions[first]
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine + 0.0, int(planes.max()) + 1, planes.tolist()


def _orientation(group: Any) -> NDArray[np.float64]:
    values = [float(value) for value in first_of(group, "PlaneOrientationSequence").ImageOrientationPatient]
    orientation = np.array(values, np.float64).reshape(2, 3)
    orientation /= np.sqrt((orientation**2).sum(axis=1))[:, np.newaxis]
    return orientation


def _step(distinct: NDArray[np.float64], stated: Sequence[float]) -> float:
    """Return the distance of planes: what the file states if all frames are at multiples of it, else the smallest one between frames."""
    differences = np.diff(distinct)
    for step in stated:
        multiples = differences / step
        if 0 < step < np.inf and (np.abs(multiples - np.rint(multiples)) < 0.1).all() and (multiples > 0.5).all():
            return step
    return float(differences.min()) if len(differences) else 1.0


def _frames(path: Path, template: _Template, shape: tuple[int, int]) -> Iterator[NDArray[Any]]:
    """Yield the pixels of each frame, (rows, columns)."""
    num_frames, num_pixels = len(template.frames), math.prod(shape)
    dtype = np.dtype(f"{'<' if template.syntax.is_little_endian else '>'}u{max(template.bits // 8, 1)}")
    if template.syntax.is_encapsulated:
        require_decoder(template.syntax, path)
        with FrameDecoder() as decoder:
            for number in range(num_frames):
                yield decoder.frame(path, number, shape, dtype)
        return
    with interpreting(path):
        content = bytes(read_dataset(path, None, with_pixels=True).get("PixelData") or b"")
    num_bits = num_frames * num_pixels * template.bits
    if len(content) * 8 < num_bits:
        raise cut_off(path, f"{-(-num_bits // 8)} bytes of voxels", f"it holds {len(content)}")
    if template.bits > 1:
        yield from np.frombuffer(content, dtype, count=num_frames * num_pixels).reshape(num_frames, *shape)
        return
    for number in range(num_frames):
        yield _unpacked(content, number * num_pixels, num_pixels).reshape(shape)


def _unpacked(content: bytes, first: int, count: int) -> NDArray[np.uint8]:
    """Return bits from the first one, which need not begin a byte."""
    start = first // 8
    stored = np.frombuffer(content, np.uint8, offset=start, count=-(-(first + count) // 8) - start)
    return np.unpackbits(stored, bitorder="little")[first % 8 : first % 8 + count]
