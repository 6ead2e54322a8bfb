"""Series and segmentations of DICOM, read and written by pydicom and highdicom.

Decoders of damaged files need limits of time and memory: `crfrefine convert` imports this module in
a process of its own.
"""

from __future__ import annotations

import math
import re
import resource
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import highdicom
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels.processing import apply_modality_lut
from pydicom.pixels.utils import iter_pixels

from crfrefine import __version__
from crfrefine.base.geometry import describe_difference, require_usable, same_grid, spacing_of
from crfrefine.base.text import counted, listed, shorten
from crfrefine.errors import (
    CapacityError,
    CrfRefineError,
    GridMismatchError,
    InputError,
    UnsupportedFormatError,
)
from crfrefine.io.atomic import write_small_file
from crfrefine.io.streams import MAX_RATIO, cut_off
from crfrefine.io.text_header import LPS, affine_of
from crfrefine.io.volume import MAX_OF_A_NAME, Segment, Volume, VolumeHeader, segments_of

pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

SEGMENTATION = "DICOM segmentation"
# Processor time that this process may take, if it is there for a conversion alone; each million
# bytes of its files adds a second.
seconds: int | None = None
# Bytes that it may take then; 32 for each voxel and 4 for each byte of its files are added.
MEMORY = 1 << 30

_SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
_CLASSES = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "PT": "1.2.840.10008.5.1.4.1.1.128",
}
_SMALL = 1 << 26  # Bytes of voxels that a compressed file of any size may hold.
# End of a segment's description, where its label is not its number: numbers have no gaps.
_LABEL = re.compile(r"(?:^|; )label value ([0-9]{1,5})$", re.ASCII)
_IDENTITY = {"PatientID": "patients", "FrameOfReferenceUID": "frames of reference"}
# Elements that the standard wants in every file, but perhaps without a value: of the patient and of
# the study.
_EXPECTED = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
)
# Elements of an image that a segmentation repeats.
_REFERENCED = (
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "FrameOfReferenceUID",
    "Modality",
)
# Elements of a slice, the last two of which are the thickness, and the functional groups that hold
# them.
_OF_SLICE = (
    *(
        "PixelSpacing",
        "ImageOrientationPatient",
        "ImagePositionPatient",
        "RescaleSlope",
        "RescaleIntercept",
    ),
    *("SpacingBetweenSlices", "SliceThickness"),
)
_GROUPS = (
    "PixelMeasuresSequence",
    "PlaneOrientationSequence",
    "PlanePositionSequence",
    "PixelValueTransformationSequence",
)
# Distances of slices, and deviations from an even row, as parts of the usual step; and an angle.
_SAME_PLACE = 1e-3
_UNEVEN = 0.1
_MAX_TILT = 2.0


def read(path: Path, like: Path | None = None) -> Volume:
    """Read a series as it is measured, or a segmentation as a label map; both with a header.

    The path is the folder of a series, a file of several frames, or a segmentation, which is placed
    on the grid of the series `like`. Raises InputError if the slices are no volume, or the two are
    of different patients or frames of reference; GridMismatchError; and UnsupportedFormatError or
    CapacityError if decoding fails.
    """
    with _decoding(path):
        notes: list[str] = []
        if (
            path.is_file()
            and (dataset := next(iter(_datasets(path, notes).values()))).get("SOPClassUID")
            in _SEGMENTATIONS
        ):
            segments, stored, affine = _label_map(path, like, dataset, notes)
            header = _header(path, SEGMENTATION, stored.shape, affine, notes)
        else:
            series = read_series(path)
            segments = ()
            stored = _voxels(series)
            header = series.header
    header = replace(header, dtype=stored.dtype.name, segments=segments)
    return Volume(stored.T, *header.geometry(), path, header)


def _header(
    path: Path, kind: str, shape: Sequence[int], affine: NDArray[np.float64], notes: Sequence[str]
) -> VolumeHeader:
    """Return the header of voxels, (slices, rows, columns).

    Raise InputError if their places are not usable.
    """
    require_usable(affine, 3, path)
    return VolumeHeader(
        path, kind, tuple(shape)[::-1], 1, "float32", spacing_of(affine), affine, notes=tuple(notes)
    )


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Turn exceptions into errors that name the file: damage shows as an exception of any kind."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except CrfRefineError:
        raise
    except MemoryError as error:
        raise CapacityError(
            f"{path}: its decoding takes more memory than that of files of its size should; damaged?"
        ) from error
    except Exception as error:
        reason = shorten(f"{type(error).__name__}: {error}", 300)
        raise UnsupportedFormatError(
            f"{path}: damaged DICOM, or a value that is needed is missing ({reason})"
        ) from error


def _limit(path: Path, files: Iterable[Path], num_voxels: int = 0, bits: int = 0) -> None:
    """Limit memory and processor time from now on.

    Raise an error if the files are too small for so many voxels.
    """
    num_bytes = sum(file.stat().st_size for file in files)
    promised = num_voxels * bits // 8
    if promised > max(num_bytes * MAX_RATIO, _SMALL):
        raise cut_off(path, f"{promised} bytes of voxels", f"it holds {num_bytes}")
    if seconds is None:
        return
    present = (
        int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        * resource.getpagesize()
    )
    most_memory = present + MEMORY + 32 * num_voxels + 4 * num_bytes
    for kind, most in (
        (resource.RLIMIT_CPU, seconds + num_bytes // 1_000_000),
        (resource.RLIMIT_AS, most_memory),
    ):
        hard = resource.getrlimit(kind)[1]  # RLIM_INFINITY is -1.
        resource.setrlimit(kind, (most if hard < 0 else min(most, hard), hard))


def _datasets(path: Path, notes: list[str]) -> dict[Path, Any]:
    """Return the headers of a series' files, or of the one file."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_dir():
        files = sorted(
            file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")
        )
    else:
        files = [path]
    _limit(path, files)
    datasets = dict[Path, Any]()
    others = []
    for file in files:
        try:
            dataset: Any = pydicom.dcmread(file, stop_before_pixels=True)
        except pydicom.errors.InvalidDicomError:
            if file.suffix.lower() == ".dcm" or file == path:
                raise UnsupportedFormatError(f"{file}: not a DICOM file") from None
            dataset = {}
        if "Rows" in dataset and (file == path or dataset.get("SOPClassUID") not in _SEGMENTATIONS):
            datasets[file] = dataset
        else:
            others.append(file.name)
    if not datasets:
        raise InputError(
            f"{path}: expected the slices of a DICOM series or a segmentation, found none; name the folder of the series"
        )
    if others:
        notes.append(
            f"{counted(len(others), 'file')} without slices, such as {others[0]}, left aside"
        )
    return datasets


def _slices(file: Path, dataset: Any) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Yield the name and the numbers of each slice of a file."""
    # The 16 numbers are rows and columns, the mm between them, the directions along a row and along
    # a column, the center of the first voxel, in LPS, slope and intercept of the values, and the
    # thickness, 0 if unknown.
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [()])[0]
    frames = dataset.get("PerFrameFunctionalGroupsSequence") or [()]
    if len(frames) != int(dataset.get("NumberOfFrames") or 1):
        raise UnsupportedFormatError(
            f"{file}: several frames that do not say where they are; convert the file with dcm2niix"
        )
    if dataset.get("SamplesPerPixel", 1) != 1:
        raise UnsupportedFormatError(f"{file}: expected one number per voxel, found colors")
    for number, frame in enumerate(frames, 1):
        name = file.name if len(frames) == 1 else f"frame {number} of {file.name}"
        groups = [
            group[name].value[0]
            for group in (frame, shared)
            for name in _GROUPS
            if name in group and group[name].value
        ]
        spacing, axes, position, slope, intercept, *thicknesses = (
            next((group[keyword].value for group in (*groups, dataset) if keyword in group), None)
            or ()
            for keyword in _OF_SLICE
        )
        thickness = next((abs(float(mm)) for mm in thicknesses if mm), 0.0)
        scaling = [float(slope or 1), float(intercept or 0)]
        numbers = np.array(
            [dataset.Rows, dataset.Columns, *spacing, *axes, *position, *scaling, thickness], float
        )
        is_whole = (
            (len(spacing), len(axes), len(position)) == (2, 6, 3)
            and np.isfinite(numbers[:13]).all()
            and min(spacing) > 0
        )
        if (
            not is_whole
            or np.abs(
                np.inner(numbers[4:10].reshape(2, 3), numbers[4:10].reshape(2, 3)) - np.eye(2)
            ).max()
            > 0.02
        ):
            raise UnsupportedFormatError(
                f"{file}: {name} has no place in the world, or it is damaged: its orientation, position or spacing is no geometry; "
                "expected slices such as of CT, MR or PET"
            )
        yield name, numbers


class Series(NamedTuple):
    """The files of a series, and its grid."""

    header: VolumeHeader
    datasets: dict[Path, Any]  # by file, without pixels
    order: NDArray[np.intp]  # numbers of the slices along their normal
    scalings: NDArray[np.float64]  # slope and intercept of each slice
    thickness: float  # mm; 0 if unknown


def read_series(path: Path) -> Series:
    """Read the headers of a series.

    Raise InputError if its slices are not one volume, and errors as `read`.
    """
    with _decoding(path):
        notes: list[str] = []
        datasets = _datasets(path, notes)
        names_by_series = {
            str(dataset.get("SeriesInstanceUID") or ""): file.name
            for file, dataset in datasets.items()
        }
        if len(names_by_series) > 1:
            examples = listed(names_by_series.values())
            raise InputError(
                f"{path}: expected one series, found {len(names_by_series)}: {examples}; give each a folder of its own"
            )
        names, rows_of_numbers = zip(
            *(part for file, dataset in datasets.items() for part in _slices(file, dataset)),
            strict=True,
        )
        if len(names) > len(datasets) > 1:
            raise InputError(
                f"{path}: expected one file of several frames, found {len(datasets)}; convert each by itself"
            )
        numbers = np.array(rows_of_numbers)
        tolerances = np.repeat([0.0, 1e-3 * numbers[0, 2:4].min(), 1e-3], [2, 2, 6])
        differs = (np.abs(numbers - numbers[0])[:, :10] > tolerances).any(axis=1)
        if differs.any():
            other = int(differs.argmax())
            raise InputError(
                f"{path}: slices of different sizes, voxel sizes or orientations: {names[0]} has {numbers[0, :10].tolist()}, "
                f"{names[other]} has {numbers[other, :10].tolist()}; a localizer? Give each volume a folder of its own"
            )
        axes = numbers[0, 4:10].reshape(2, 3)
        positions = numbers[:, 10:13]
        thickness = numbers[0, 15]
        axes /= np.linalg.norm(axes, axis=1, keepdims=True)
        normal = np.cross(*axes)
        places = positions @ normal
        order = np.argsort(places, kind="stable")
        step = normal * (thickness or 1.0)
        if len(names) > 1:
            distances = np.diff(places[order])
            usual = np.median(distances)
            step = (positions[order[-1]] - positions[order[0]]) / len(distances)
            row = positions[order[0]] + np.arange(len(names))[:, np.newaxis] * step
            off = np.linalg.norm(positions[order] - row, axis=1).max()
            tilt = np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1.0, 1.0)))
            if (
                distances.min() <= max(_SAME_PLACE * usual, 1e-6)
                or off > _UNEVEN * usual
                or tilt > _MAX_TILT
            ):
                worst = int(np.abs(distances - usual).argmax())
                raise InputError(
                    f"{path}: expected slices straight above each other, evenly spaced; found most of them {usual:.4g} mm apart, "
                    f"{names[order[worst]]} and {names[order[worst + 1]]} {distances[worst]:.4g} mm, and a tilt of {tilt:.1f} degrees\n"
                    "  Is there a gap, or a second echo, time or reconstruction? Give each volume a folder of its own.\n"
                    "  dcm2niix resamples uneven slices, and straightens those of a tilted gantry."
                )
        elif not thickness:
            notes.append("a single slice without thickness; 1 mm is assumed")
        rows, columns, down, right = numbers[0, :4]
        affine = affine_of(
            np.column_stack([axes[0] * right, axes[1] * down, step]), positions[order[0]], LPS
        )
        header = _header(path, "DICOM series", (len(names), int(rows), int(columns)), affine, notes)
        return Series(header, datasets, order, numbers[:, 13:15], thickness)


def _voxels(series: Series) -> NDArray[Any]:
    """Return the scaled values of a series, (slices along the normal, rows, columns), as integers if they are whole."""
    path = series.header.path
    shape = series.header.grid_shape[::-1]
    first = next(iter(series.datasets.values()))
    _limit(path, series.datasets, math.prod(shape), int(first.BitsAllocated))
    # Series with 32 bits need float64 before they are written.
    array = np.empty(shape, np.float32 if int(first.BitsStored) <= 16 else np.float64)
    frames = (
        (dataset, frame)
        for file, dataset in series.datasets.items()
        for frame in iter_pixels(pydicom.dcmread(file))
    )
    for place, scaling, (dataset, frame) in zip(
        np.argsort(series.order), series.scalings.astype(array.dtype), frames, strict=True
    ):
        has_table = "ModalityLUTSequence" in dataset
        array[place] = (
            apply_modality_lut(frame, dataset) if has_table else frame * scaling[0] + scaling[1]
        )
    if not np.isfinite(array).all():
        raise InputError(f"{path}: expected finite values, found NaN or infinite ones")
    low = array.min()
    high = array.max()
    is_whole = (array == np.rint(array)).all()
    dtypes = (
        dtype
        for dtype in ("<i2", "<u2", "<i4")
        if is_whole and np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max
    )
    return array.astype(next(dtypes, "<f4"), copy=False)


def _labels_of(path: Path, dataset: Any) -> dict[int, tuple[int, Any]]:
    """Return the label of each segment by its number, and what describes it."""
    segments = {}
    for item in dataset.SegmentSequence:
        if number := int(item.SegmentNumber):  # The segment 0 of a label map is the background.
            written = _LABEL.search(str(item.get("SegmentDescription") or ""))
            segments[number] = (int(written[1]) if written else number, item)
    labels = [label for label, _ in segments.values()]
    if not labels or len(set(labels)) < len(labels) or not 0 < min(labels) <= max(labels) < 1 << 16:
        raise UnsupportedFormatError(
            f"{path}: expected segments with different labels from 1 to 65535, found {listed(labels)}"
        )
    return segments


def _require_same_identity(path: Path, dataset: Any, like: Path, other: Any) -> None:
    """Raise InputError if two files are of different patients or frames of reference.

    A missing value is no difference.
    """
    for keyword, name in _IDENTITY.items():
        found, expected = (str(source.get(keyword) or "").strip() for source in (dataset, other))
        if found and expected and found != expected:
            raise InputError(
                f"{path} and {like} are of different {name}\n"
                f"  {keyword}: expected {shorten(expected)!r} as in {like}, found {shorten(found)!r} in {path}\n"
                "  Name the files of one patient, whose segmentation was made on this series."
            )


_FRACTIONS = ("OCCUPANCY", "PROBABILITY")


def _read_segmentation(path: Path, notes: list[str]) -> Any:
    """Return a segmentation of whole segments; fractions become whole at half of their maximum."""
    dataset: Any = pydicom.dcmread(path)
    for item in dataset.SegmentSequence:
        if not item.get("SegmentAlgorithmType"):  # Old files lack it, and highdicom asks for it.
            item.SegmentAlgorithmType = "MANUAL"
    if dataset.get("SegmentationType") == "FRACTIONAL":
        _require_known_fractions(path, dataset)
        most = int(dataset.MaximumFractionalValue)
        if dataset.file_meta.TransferSyntaxUID.is_compressed:
            dataset.decompress()
        fractions = np.frombuffer(dataset.PixelData, np.uint8)
        dataset.PixelData = np.where(fractions >= most / 2, np.uint8(most), np.uint8(0)).tobytes()
        kind = dataset.SegmentationFractionalType.lower()
        notes.append(f"its segments are fractions ({kind}); voxels of at least half are taken")
    return highdicom.seg.Segmentation.from_dataset(dataset, copy=False)


def _require_known_fractions(path: Path, dataset: Any) -> None:
    """Raise UnsupportedFormatError if the half of fractions means nothing."""
    kind = str(dataset.get("SegmentationFractionalType") or "")
    if kind not in _FRACTIONS:
        raise UnsupportedFormatError(
            f"{path}: expected fractions of the type {' or '.join(_FRACTIONS)}, "
            f"found {shorten(kind)!r}"
        )
    most = int(dataset.get("MaximumFractionalValue") or 0)
    if not 1 <= most <= 255 or dataset.BitsAllocated != 8:
        raise UnsupportedFormatError(
            f"{path}: damaged DICOM: expected fractions of 8 bits up to a maximum from 1 to 255, "
            f"found {dataset.BitsAllocated} bits and the maximum {most}"
        )


def _label_map(
    path: Path, like: Path | None, dataset: Any, notes: list[str]
) -> tuple[tuple[Segment, ...], NDArray[Any], NDArray[np.float64]]:
    """Return the segments, the label map, (slices, rows, columns), and its affine."""
    described = _labels_of(path, dataset)
    num_voxels = int(dataset.get("NumberOfFrames") or 1) * int(dataset.Rows) * int(dataset.Columns)
    _limit(path, [path], num_voxels, int(dataset.BitsAllocated))
    segmentation = _read_segmentation(path, notes)
    try:
        volume = segmentation.get_volume(combine_segments=True, rtol=0.05).flip_spatial(0)
    except RuntimeError as error:
        raise InputError(
            f"{path}: its segments cannot become one label map: {shorten(error, 200)}; do they overlap?"
        ) from None
    labels = [label for label, _ in described.values()]
    table = np.zeros(max(described) + 1, np.uint8 if max(labels) < 256 else np.uint16)
    table[list(described)] = labels
    stored = table[volume.array.astype(np.intp)]
    affine = volume.get_affine("RAS")[:, [2, 1, 0, 3]] + 0.0  # Its axes are slice, row, column.
    if like is None:
        notes.append(
            "it holds only the slices that its segments reach; --like SERIES gives it the grid of its series"
        )
    else:
        series = read_series(like)
        notes += series.header.notes
        _require_same_identity(path, dataset, like, next(iter(series.datasets.values())))
        grid, _ = series.header.geometry()
        shape = stored.shape[::-1]
        grid_shape = series.header.grid_shape
        offset = np.rint(np.linalg.solve(grid, affine[:, 3])[:3]).astype(int)
        expected = grid.copy()
        expected[:3, 3] += grid[:3, :3] @ offset
        after = grid_shape - offset - shape
        if min(*offset, *after) < 0 or not same_grid(shape, affine, shape, expected):
            difference = describe_difference((path, shape, affine), (like, grid_shape, grid))
            raise GridMismatchError(
                f"{path}: not on the grid of --like\n{difference}\n  Name the series that it was made on."
            )
        stored = np.pad(stored, np.column_stack([offset, after])[::-1])
        affine = grid
    segments = []
    for label, item in described.values():
        lab = item.get("RecommendedDisplayCIELabValue")
        red, green, blue = (
            highdicom.color.CIELabColor.from_dicom_value(list(lab)).to_rgb() if lab else (0, 0, 0)
        )
        name = shorten(str(item.get("SegmentLabel") or f"Label {label}"), MAX_OF_A_NAME)
        segments.append(Segment(label, name, (red / 255, green / 255, blue / 255) if lab else None))
    return tuple(segments), stored, affine


def write(
    target: Path,
    labels: NDArray[np.unsignedinteger[Any]],
    named: Sequence[Segment],
    like: Series,
    segments: Path | None,
) -> None:
    """Write a label map, (x, y, z) on the grid of a series, as a segmentation of binary segments.

    Raises as `read`.
    """
    # The segments get these names, and keep what describes their labels in the file `segments`.
    with _decoding(like.header.path):
        content = _segmentation(
            labels.T, {segment.label: segment.name for segment in named}, like, segments
        )
    write_small_file(target, content)


def _segmentation(
    labels: NDArray[Any], known: Mapping[int, str], series: Series, file: Path | None
) -> bytes:
    """Return the file of a segmentation."""
    path = series.header.path
    sources = list(series.datasets.values())
    items: dict[int, Any] = {}
    if file is not None:
        source = next(iter(_datasets(file, []).values()))
        if "SegmentSequence" not in source:
            raise InputError(
                f"{file}: expected a DICOM segmentation whose segments describe labels"
            )
        _require_same_identity(file, source, path, sources[0])
        items = dict(_labels_of(file, source).values())
    _limit(path, series.datasets, labels.size)
    occurring = {
        segment.label: known.get(segment.label, segment.name) for segment in segments_of(labels, ())
    }
    names = {**dict.fromkeys(items, ""), **occurring} or {1: "Label 1"}
    table = np.zeros(max(names) + 1, np.uint16)
    table[sorted(names)] = np.arange(1, len(names) + 1)
    described = [
        _describe(number, label, names[label], items.get(label))
        for number, label in enumerate(sorted(names), 1)
    ]
    for image, source in series.datasets.items():
        _complete(image, source, sources[0], series.thickness)
    pixels = table[labels]
    if len(sources) > 1:
        sources = [sources[number] for number in series.order]
    else:
        pixels = pixels[np.argsort(series.order)]
    try:
        segmentation = highdicom.seg.Segmentation(
            source_images=sources,
            pixel_array=pixels,
            segmentation_type="BINARY",
            segment_descriptions=described,
            series_instance_uid=highdicom.UID(),
            series_number=min(100 * int(sources[0].get("SeriesNumber") or 0) + 1, (1 << 31) - 1),
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="crfrefine",
            manufacturer_model_name="crfrefine",
            software_versions=__version__,
            device_serial_number="0",
            series_description="Segmentation converted with crfrefine",
            specific_character_set="ISO_IR 192",  # UTF-8 holds names in any language.
        )
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(
            f"{path}: highdicom refuses to write a segmentation of this series: {shorten(error, 200)}"
        ) from None
    buffer = BytesIO()
    segmentation.save_as(buffer)
    return buffer.getvalue()


def _complete(file: Path, source: Any, first: Any, thickness: float) -> None:
    """Give a header what highdicom asks for.

    Raise InputError if a segmentation cannot refer to its file.
    """
    if not source.get("SOPClassUID"):  # De-identification may empty it.
        source.SOPClassUID = source.file_meta.get("MediaStorageSOPClassUID") or _CLASSES.get(
            source.get("Modality"), ""
        )
    lacking = [keyword for keyword in _REFERENCED if not source.get(keyword)]
    if lacking:
        raise InputError(
            f"{file}: a DICOM segmentation refers to its series, and this file has no {' and no '.join(lacking)}\n"
            "  De-identification may replace these values, but not empty them: set them in the files, or keep the NIfTI file."
        )
    for keyword in _EXPECTED:
        source.setdefault(keyword, None)
    if (
        "PerFrameFunctionalGroupsSequence" in source
    ):  # highdicom looks for these only among the shared groups.
        shared = source.SharedFunctionalGroupsSequence[0]
        frame = source.PerFrameFunctionalGroupsSequence[0]
        for name in ("PlaneOrientationSequence", "PixelMeasuresSequence"):
            shared.setdefault(name, frame.get(name))
    else:
        source.ImageOrientationPatient = first.ImageOrientationPatient  # Equal up to rounding.
        source.SliceThickness = source.get("SliceThickness") or f"{thickness or 1.0:.10g}"


def _describe(number: int, label: int, name: str, item: Any) -> Any:
    """Return the description of a segment: the given one with another number, or a new one of a tissue."""
    if item is not None:
        item.decode()  # The file to write has another character set.
        item.SegmentNumber = number
        if not item.get("SegmentAlgorithmType"):  # Nobody knows: the type without an algorithm.
            item.SegmentAlgorithmType = "MANUAL"
        elif item.SegmentAlgorithmType == "MANUAL":  # It was, before the refinement.
            item.SegmentAlgorithmType = "SEMIAUTOMATIC"
            item.SegmentAlgorithmName = "crfrefine"
        item = highdicom.seg.SegmentDescription.from_dataset(item, copy=False)
    else:
        tissue = highdicom.sr.CodedConcept("85756007", "SCT", "Tissue")
        artificial = highdicom.sr.CodedConcept("123110", "DCM", "Artificial Intelligence")
        algorithm = highdicom.AlgorithmIdentificationSequence(
            name="unknown", version="unknown", family=artificial
        )
        color = highdicom.color.CIELabColor.from_rgb(
            *(round(255 * part) for part in Segment(label, name).shown_color)
        )
        text = name[:MAX_OF_A_NAME].replace("\\", "/")
        item = highdicom.seg.SegmentDescription(
            number, text, tissue, tissue, "AUTOMATIC", algorithm, display_color=color
        )
    before = _LABEL.sub("", str(item.get("SegmentDescription") or ""))
    ending = f"label value {label}" if label != number else ""
    text = "; ".join(part for part in (before[: 1022 - len(ending)], ending) if part)
    if text:
        item.SegmentDescription = text
    elif "SegmentDescription" in item:
        del item.SegmentDescription
    return item
