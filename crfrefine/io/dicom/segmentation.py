"""Segmentations of DICOM: their segments as a label map, or one by one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom

from crfrefine.base.array_types import Array, Float64
from crfrefine.base.geometry import describe_difference, same_grid
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import listed, shorten
from crfrefine.errors import GridMismatchError, InputError, UnsupportedFormatError
from crfrefine.io.dicom.files import (
    class_name,
    decoding,
    groups_in,
    is_segmentation,
    limit,
    read_file,
    require_same_identity,
    text_of,
)
from crfrefine.io.dicom.series import Series, volume_of
from crfrefine.io.volume import MAX_OF_A_NAME, Segment, Segments, Volume, VolumeHeader

SEGMENTATION = "DICOM segmentation"

# End of a segment's description, where its label is not its number: numbers have no gaps.
LABEL_ENDING = re.compile(r"(?:^|; )label value ([0-9]{1,5})$", re.ASCII)


def read(path: Path, like: Path | None = None, uid: str | None = None) -> Volume:
    """Read a series as it is measured, or a segmentation as a label map; both with a header.

    The path is the folder of a series, a file of several frames, or a segmentation, which is placed
    on the grid of the series `like`; `uid` chooses a series of a folder. Raises InputError if the
    slices are no volume, or the two are of different patients or frames of reference;
    GridMismatchError; and UnsupportedFormatError or CapacityError if decoding fails.
    """
    with decoding(path):
        dataset = None
        if path.is_file():
            limit(path, [path])
            dataset = read_file(path)
        if dataset is None or not is_segmentation(dataset):
            series = Series(path, uid)
            stored = series.read_voxels()
            header = replace(series.header, dtype=stored.dtype.name)
            return Volume(stored.T, *header.geometry(), header)

        notes: list[Note] = []
        items = items_by_label(path, dataset)
        segmentation, grid = _open(path, dataset, like, uid, notes)
        try:
            volume = segmentation.get_volume(combine_segments=True, rtol=0.05).flip_spatial(0)
        except RuntimeError as error:
            if "overlap" in str(error):
                raise InputError(
                    f"{path}: its segments overlap, and a voxel of a label map has one label\n"
                    "  Name a folder for one file per segment: crfrefine convert "
                    f"{path} FOLDER; infer -p FOLDER --input-type labels reads it."
                ) from None
            raise InputError(
                f"{path}: its segments cannot become one label map: {shorten(error, 200)}"
            ) from None
        numbers = [int(item.SegmentNumber) for item in items.values()]
        table = np.zeros(max(numbers) + 1, np.uint8 if max(items) < 256 else np.uint16)
        table[numbers] = list(items)
        segments = tuple(_segment(label, item) for label, item in items.items())
        stored = table[volume.array.astype(np.intp)]
        return _placed(path, stored, _affine_of(volume), grid, segments, notes)


def items_by_label(path: Path, dataset: Any) -> dict[int, Any]:
    """Return the element that describes each segment, by the label of the segment."""
    items = {int(item.SegmentNumber): item for item in dataset.SegmentSequence}
    items.pop(0, None)  # It is the background of a label map.
    labels = []
    for number, item in items.items():
        written = LABEL_ENDING.search(text_of(item, "SegmentDescription"))
        labels.append(int(written[1]) if written else number)
    are_different = len(set(labels)) == len(labels)
    if not labels or not are_different or not 0 < min(labels) <= max(labels) < 1 << 16:
        raise UnsupportedFormatError(
            f"{path}: expected segments with different labels from 1 to 65535, "
            f"found {listed(labels)}"
        )
    return dict(zip(labels, items.values(), strict=True))


def _make_binary(path: Path, dataset: Any, notes: list[Note]) -> None:
    """Make fractional segments binary, at half of their maximum."""
    # Half of another fraction means nothing.
    kind = text_of(dataset, "SegmentationFractionalType")
    if kind not in ("OCCUPANCY", "PROBABILITY"):
        raise UnsupportedFormatError(
            f"{path}: expected fractions of the type OCCUPANCY or PROBABILITY, "
            f"found {shorten(kind)!r}"
        )
    maximum = int(dataset.get("MaximumFractionalValue") or 0)
    if not 1 <= maximum <= 255 or dataset.BitsAllocated != 8:
        raise UnsupportedFormatError(
            f"{path}: damaged DICOM: expected fractions of 8 bits up to a maximum from 1 to "
            f"255, found {dataset.BitsAllocated} bits and the maximum {maximum}"
        )
    if dataset.file_meta.TransferSyntaxUID.is_compressed:
        dataset.decompress()
    fractions = np.frombuffer(dataset.PixelData, np.uint8)
    is_inside = fractions >= maximum / 2
    dataset.PixelData = np.where(is_inside, np.uint8(maximum), np.uint8(0)).tobytes()
    notes.append(NoteKind.FRACTIONS(what=kind.lower()))


def _open(
    path: Path, dataset: Any, like: Path | None, uid: str | None, notes: list[Note]
) -> tuple[Any, VolumeHeader | None]:
    """Return a segmentation, and the header of the series `like`, whose patient is the same.

    Raise InputError for segments of a picture, such as a radiograph or a slide.
    """
    frames = dataset.get("PerFrameFunctionalGroupsSequence") or ()
    shared = dataset.get("SharedFunctionalGroupsSequence") or ()
    places = ("PlanePositionSequence",)
    if not any(groups_in(frame, places) for frame in (*frames[:1], *shared[:1])):
        raise InputError(
            f"{path}: its segments have no place in the world, as those of a radiograph, a "
            "photograph or a slide; expected a segmentation of a series of slices, such as of CT, "
            "MR or PET\n"
            "  Refine such a picture as an array, with crfrefine.refine of Python."
        )
    grid = None
    if like is not None:
        series = Series(like, uid)
        notes += series.header.notes
        require_same_identity(path, dataset, like, series.first)
        grid = series.header
    else:
        notes.append(NoteKind.ONLY_SLICES_OF_SEGMENTS())
    num_voxels = int(dataset.get("NumberOfFrames") or 1) * int(dataset.Rows) * int(dataset.Columns)
    # After that of the files of the series.
    limit(path, [path], num_voxels, int(dataset.BitsAllocated))
    with_pixels = pydicom.dcmread(path)
    for item in with_pixels.SegmentSequence:
        if not item.get("SegmentAlgorithmType"):  # Old files lack it, and highdicom asks for it.
            item.SegmentAlgorithmType = "MANUAL"
        algorithms = item.get("SegmentationAlgorithmIdentificationSequence") or []
        del algorithms[1:]  # highdicom reads a single one.
    if with_pixels.get("SegmentationType") == "FRACTIONAL":
        _make_binary(path, with_pixels, notes)
    import highdicom

    return highdicom.seg.Segmentation.from_dataset(with_pixels, copy=False), grid


def list_segments(path: Path) -> list[Segment]:
    """Return the segments of a segmentation; raises as `read`."""
    with decoding(path):
        _, items = read_items(path)
        return [_segment(label, item) for label, item in items.items()]


def read_items(path: Path) -> tuple[Any, dict[int, Any]]:
    """Return the header of a segmentation, and what describes its segments, by their labels."""
    limit(path, [path])
    dataset = read_file(path)
    if not is_segmentation(dataset):
        raise InputError(
            f"{path}: expected a DICOM segmentation, as only its segments describe labels and "
            f"become the files of a folder; found {class_name(dataset)}; "
            "an image becomes one file, such as ct.nii.gz"
        )
    return dataset, items_by_label(path, dataset)


def read_segments(path: Path, like: Path | None = None, uid: str | None = None) -> Iterator[Volume]:
    """Yield the mask of each segment, of 0 and 1, which may overlap; otherwise as `read`."""
    with decoding(path):
        notes: list[Note] = []
        dataset, items = read_items(path)
        segmentation, grid = _open(path, dataset, like, uid, notes)
        for label, item in items.items():
            number = int(item.SegmentNumber)
            volume = segmentation.get_volume(segment_numbers=[number], rtol=0.05).flip_spatial(0)
            stored = (volume.array[..., 0] > 0).astype(np.uint8)
            named = (replace(_segment(label, item), label=1),)
            yield _placed(path, stored, _affine_of(volume), grid, named, notes)


def _affine_of(volume: Any) -> Float64:
    """Return the affine to RAS+ of a volume of highdicom, whose axes are slice, row, column."""
    return volume.get_affine("RAS")[:, [2, 1, 0, 3]] + 0.0


def _placed(
    path: Path,
    stored: Array,
    affine: Float64,
    grid: VolumeHeader | None,
    segments: Segments,
    notes: list[Note],
) -> Volume:
    """Return labels, (slices, rows, columns), on the whole grid of their series if it is given."""
    if grid is not None:
        whole = grid.required_affine
        shape = stored.shape[::-1]
        offset = np.rint(np.linalg.solve(whole, affine[:, 3])[:3]).astype(int)
        expected = whole.copy()
        expected[:3, 3] += whole[:3, :3] @ offset
        after = grid.grid_shape - offset - shape
        if min(*offset, *after) < 0 or not same_grid(shape, affine, shape, expected):
            difference = describe_difference(
                (path, shape, affine), (grid.path, grid.grid_shape, whole)
            )
            raise GridMismatchError(
                f"{path}: not on the grid of --like\n{difference}\n"
                "  Name the series that it was made on."
            )
        stored = np.pad(stored, np.column_stack([offset, after])[::-1])
        affine = whole
    header = volume_of(path, SEGMENTATION, stored.shape, affine, notes)
    header = replace(header, dtype=stored.dtype.name, segments=segments)
    return Volume(stored.T, *header.geometry(), header)


def _segment(label: int, item: Any) -> Segment:
    """Return a segment by the element that describes it."""
    name = shorten(str(item.get("SegmentLabel") or f"Label {label}"), MAX_OF_A_NAME)
    lab = item.get("RecommendedDisplayCIELabValue")
    if not lab:
        return Segment(label, name)
    import highdicom

    red, green, blue = highdicom.color.CIELabColor.from_dicom_value(list(lab)).to_rgb()
    return Segment(label, name, (red / 255, green / 255, blue / 255))
