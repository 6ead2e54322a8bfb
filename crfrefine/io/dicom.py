"""Series and segmentations of DICOM, read and written by pydicom and highdicom.

Decoders need limits of time and memory on damaged files: `crfrefine convert` imports this module in
a separate process.
"""

from __future__ import annotations

import math
import re
import resource
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import highdicom
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels.processing import apply_modality_lut
from pydicom.pixels.utils import iter_pixels

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
from crfrefine.io.stored import smallest_integer
from crfrefine.io.streams import MAX_RATIO, cut_off
from crfrefine.io.text_header import LPS, affine_of
from crfrefine.io.volume import MAX_OF_A_NAME, Segment, Volume, VolumeHeader, segments_of
from crfrefine.version import __version__

pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

SEGMENTATION = "DICOM segmentation"
# Limit of this process's processor time, if it only converts; each million bytes of its files adds
# a second.
seconds: int | None = None
# Limit of its memory in bytes then; 32 for each voxel and 4 for each byte of its files are added.
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
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"),
    *("FrameOfReferenceUID", "Modality"),
)
# Elements of all files that are written.
_CONVERTED: dict[str, Any] = {
    "manufacturer": "crfrefine",
    "manufacturer_model_name": "crfrefine",
    "software_versions": __version__,
    "device_serial_number": "0",
    "series_description": "Segmentation converted with crfrefine",
    "specific_character_set": "ISO_IR 192",  # UTF-8 holds names in any language.
}
# Functional groups that hold the elements of a slice.
_GROUPS = (
    *("PixelMeasuresSequence", "PlaneOrientationSequence"),
    *("PlanePositionSequence", "PixelValueTransformationSequence"),
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
        dataset = None
        if path.is_file():
            dataset = _datasets(path, notes)[path]
        if dataset is not None and _is_segmentation(dataset):
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
    """Return the header of voxels, (slices, rows, columns), whose affine has to be usable."""
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
            f"{path}: its decoding takes more memory than that of files of its size should; "
            "damaged?"
        ) from error
    except Exception as error:
        reason = shorten(f"{type(error).__name__}: {error}", 300)
        raise UnsupportedFormatError(
            f"{path}: damaged DICOM, or a value that is needed is missing ({reason})"
        ) from error


def _limit(path: Path, files: Iterable[Path], num_voxels: int = 0, bits: int = 0) -> None:
    """Limit memory and processor time; raise an error if the files cannot hold so many voxels."""
    num_bytes = sum(file.stat().st_size for file in files)
    promised = num_voxels * bits // 8
    if promised > max(num_bytes * MAX_RATIO, _SMALL):
        raise cut_off(path, f"{promised} bytes of voxels", f"it holds {num_bytes}")
    if seconds is None:
        return
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    present = pages * resource.getpagesize()
    _lower_limit(resource.RLIMIT_CPU, seconds + num_bytes // 1_000_000)
    _lower_limit(resource.RLIMIT_AS, present + MEMORY + 32 * num_voxels + 4 * num_bytes)


def _lower_limit(kind: int, most: int) -> None:
    """Set a limit of this process, within the limit of the system."""
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(kind, (most, hard))


def _datasets(path: Path, notes: list[str]) -> dict[Path, Any]:
    """Return the headers of a series' files, or of the one file."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    files = [path]
    if path.is_dir():
        entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        files = sorted(filter(Path.is_file, entries))
    _limit(path, files)
    datasets: dict[Path, Any] = {}
    others = []
    for file in files:
        dataset = _dataset(file, is_expected=file == path or file.suffix.lower() == ".dcm")
        if "Rows" in dataset and (file == path or not _is_segmentation(dataset)):
            datasets[file] = dataset
        else:
            others.append(file.name)
    if not datasets:
        raise InputError(
            f"{path}: expected the slices of a DICOM series or a segmentation, found none; "
            "name the folder of the series"
        )
    if others:
        notes.append(
            f"{counted(len(others), 'file')} without slices, such as {others[0]}, left aside"
        )
    return datasets


def _is_segmentation(dataset: Any) -> bool:
    return dataset.get("SOPClassUID") in _SEGMENTATIONS


def _dataset(file: Path, *, is_expected: bool) -> Any:
    """Return the header of a file; it is empty for another format, which may be an error."""
    try:
        return pydicom.dcmread(file, stop_before_pixels=True)
    except pydicom.errors.InvalidDicomError:
        if is_expected:
            raise UnsupportedFormatError(f"{file}: not a DICOM file") from None
        return pydicom.Dataset()


@dataclass(frozen=True)
class _Slice:
    """A slice, by its header."""

    name: str  # for people
    size: tuple[int, int]  # rows, columns
    spacing: tuple[float, float]  # mm between rows, and between columns
    axes: NDArray[np.float64]  # the directions along a row and along a column, as rows, in LPS
    position: NDArray[np.float64]  # the center of the first voxel, in LPS
    scaling: tuple[float, float]  # slope and intercept of the values
    thickness: float  # mm; 0 if unknown

    @property
    def plane(self) -> list[float]:
        """Sizes, voxel sizes and directions, which are equal for all slices of a volume."""
        return [*map(float, self.size), *self.spacing, *self.axes.reshape(-1).tolist()]


def _slices(file: Path, dataset: Any) -> list[_Slice]:
    # The functional groups of each frame; a file of one slice has no frames.
    frames: Sequence[Any] = dataset.get("PerFrameFunctionalGroupsSequence") or [()]
    if len(frames) != int(dataset.get("NumberOfFrames") or 1):
        raise UnsupportedFormatError(
            f"{file}: several frames that do not say where they are; convert the file with dcm2niix"
        )
    if dataset.get("SamplesPerPixel", 1) != 1:
        raise UnsupportedFormatError(f"{file}: expected one number per voxel, found colors")
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [()])[0]
    slices = []
    for number, frame in enumerate(frames, 1):
        name = file.name if len(frames) == 1 else f"frame {number} of {file.name}"
        sources = [*_groups_in(frame), *_groups_in(shared), dataset]
        part = _slice(name, dataset, sources)
        if part is None:
            raise UnsupportedFormatError(
                f"{file}: {name} has no place in the world, or it is damaged: "
                "its orientation, position or spacing is no geometry; "
                "expected slices such as of CT, MR or PET"
            )
        slices.append(part)
    return slices


def _groups_in(frame: Any) -> list[Any]:
    """Return the functional groups of a frame that hold the elements of a slice."""
    sequences = [frame[name].value for name in _GROUPS if name in frame]
    return [sequence[0] for sequence in sequences if sequence]


def _element(sources: Sequence[Any], keyword: str) -> Any:
    """Return the value of the first source that has an element; () for none, or an empty one."""
    for source in sources:
        if keyword in source:
            return source[keyword].value or ()
    return ()


def _slice(name: str, dataset: Any, sources: Sequence[Any]) -> _Slice | None:
    """Return a slice, whose elements are in the first of several sources; None for no geometry."""
    spacing = np.array([*_element(sources, "PixelSpacing")], float)
    axes = np.array([*_element(sources, "ImageOrientationPatient")], float)
    position = np.array([*_element(sources, "ImagePositionPatient")], float)
    slope = float(_element(sources, "RescaleSlope") or 1)
    intercept = float(_element(sources, "RescaleIntercept") or 0)
    distance = _element(sources, "SpacingBetweenSlices")
    thickness = abs(float(distance or _element(sources, "SliceThickness") or 0))
    size = (int(dataset.Rows), int(dataset.Columns))

    if (len(spacing), len(axes), len(position)) != (2, 6, 3):
        return None
    if not np.isfinite([*spacing, *axes, *position]).all() or spacing.min() <= 0:
        return None
    axes = axes.reshape(2, 3)
    if np.abs(np.inner(axes, axes) - np.eye(2)).max() > 0.02:
        return None
    down, right = spacing.tolist()
    return _Slice(name, size, (down, right), axes, position, (slope, intercept), thickness)


class Series(NamedTuple):
    """The files of a series, and its grid."""

    header: VolumeHeader
    datasets: dict[Path, Any]  # by file, without pixels
    order: NDArray[np.intp]  # numbers of the slices along their normal
    scalings: NDArray[np.float64]  # slope and intercept of each slice
    thickness: float  # mm; 0 if unknown


def read_series(path: Path) -> Series:
    """Read the headers of a series; raise InputError if it is not one volume, else as `read`."""
    with _decoding(path):
        notes: list[str] = []
        datasets = _datasets(path, notes)
        _require_one_series(path, datasets)
        slices = []
        for file, dataset in datasets.items():
            slices += _slices(file, dataset)
        if len(slices) > len(datasets) > 1:
            raise InputError(
                f"{path}: expected one file of several frames, found {len(datasets)}; "
                "convert each by itself"
            )
        _require_same_planes(path, slices)

        first = slices[0]
        if len(slices) == 1 and not first.thickness:
            notes.append("a single slice without thickness; 1 mm is assumed")
        axes = first.axes / np.linalg.norm(first.axes, axis=1, keepdims=True)
        order, step = _stack(path, slices, normal=np.cross(*axes))
        down, right = first.spacing
        vectors = np.column_stack([axes[0] * right, axes[1] * down, step])
        affine = affine_of(vectors, slices[order[0]].position, LPS)
        header = _header(path, "DICOM series", (len(slices), *first.size), affine, notes)
        scalings = np.array([part.scaling for part in slices])
        return Series(header, datasets, order, scalings, first.thickness)


def _require_one_series(path: Path, datasets: Mapping[Path, Any]) -> None:
    file_of_series = {}
    for file, dataset in datasets.items():
        file_of_series[_text_of(dataset, "SeriesInstanceUID")] = file.name
    if len(file_of_series) > 1:
        raise InputError(
            f"{path}: expected one series, found {len(file_of_series)}: "
            f"{listed(file_of_series.values())}; give each a folder of its own"
        )


def _require_same_planes(path: Path, slices: Sequence[_Slice]) -> None:
    """Raise InputError if slices have different sizes, voxel sizes or orientations."""
    planes = np.array([part.plane for part in slices])
    tolerances = np.repeat([0.0, 1e-3 * min(slices[0].spacing), 1e-3], [2, 2, 6])
    differs = (np.abs(planes - planes[0]) > tolerances).any(axis=1)
    if differs.any():
        first = slices[0]
        other = slices[int(differs.argmax())]
        raise InputError(
            f"{path}: slices of different sizes, voxel sizes or orientations: "
            f"{first.name} has {first.plane}, {other.name} has {other.plane}; "
            "a localizer? Give each volume a folder of its own"
        )


def _stack(
    path: Path, slices: Sequence[_Slice], normal: NDArray[np.float64]
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Return the order of evenly spaced slices along their normal, and the step between them."""
    positions = np.array([part.position for part in slices])
    places = positions @ normal
    order = np.argsort(places, kind="stable")
    if len(slices) == 1:
        return order, normal * (slices[0].thickness or 1.0)

    positions = positions[order]
    distances = np.diff(places[order])
    usual = np.median(distances)
    step = (positions[-1] - positions[0]) / len(distances)
    row = positions[0] + np.arange(len(slices))[:, np.newaxis] * step
    deviation = np.linalg.norm(positions - row, axis=1).max()
    tilt = np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1.0, 1.0)))
    are_apart = distances.min() > max(_SAME_PLACE * usual, 1e-6)
    if not are_apart or deviation > _UNEVEN * usual or tilt > _MAX_TILT:
        worst = int(np.abs(distances - usual).argmax())
        below = slices[order[worst]].name
        above = slices[order[worst + 1]].name
        raise InputError(
            f"{path}: expected slices straight above each other, evenly spaced; "
            f"found most of them {usual:.4g} mm apart, "
            f"{below} and {above} {distances[worst]:.4g} mm, and a tilt of {tilt:.1f} degrees\n"
            "  Is there a gap, or a second echo, time or reconstruction? "
            "Give each volume a folder of its own.\n"
            "  dcm2niix resamples uneven slices, and straightens those of a tilted gantry."
        )
    return order, step


def _voxels(series: Series) -> NDArray[Any]:
    """Return the scaled values of a series, (slices along the normal, rows, columns)."""
    path = series.header.path
    shape = series.header.grid_shape[::-1]
    first = next(iter(series.datasets.values()))
    _limit(path, series.datasets, math.prod(shape), int(first.BitsAllocated))
    # Series with 32 bits need float64 before they are written.
    array = np.empty(shape, np.float32 if int(first.BitsStored) <= 16 else np.float64)
    scalings = series.scalings.astype(array.dtype)
    places = np.argsort(series.order)
    frames = _frames(series)
    for place, (slope, intercept), (dataset, frame) in zip(places, scalings, frames, strict=True):
        if "ModalityLUTSequence" in dataset:
            array[place] = apply_modality_lut(frame, dataset)
        else:
            array[place] = frame * slope + intercept
    if not np.isfinite(array).all():
        raise InputError(f"{path}: expected finite values, found NaN or infinite ones")
    if (array == np.rint(array)).all():
        types = ("int16", "uint16", "int32")
        integer = smallest_integer(types, float(array.min()), float(array.max()))
        if integer is not None:
            return array.astype(integer)
    return array.astype(np.float32, copy=False)


def _frames(series: Series) -> Iterator[tuple[Any, NDArray[Any]]]:
    """Yield the stored values of each slice, with the header of its file."""
    for file, dataset in series.datasets.items():
        for frame in iter_pixels(pydicom.dcmread(file)):
            yield dataset, frame


class _Described(NamedTuple):
    """The label of a segment, and the element that describes it."""

    label: int
    item: Any


def _labels_of(path: Path, dataset: Any) -> dict[int, _Described]:
    """Return the label of each segment by its number, and what describes it."""
    segments = {}
    for item in dataset.SegmentSequence:
        number = int(item.SegmentNumber)
        if number == 0:  # It is the background of a label map.
            continue
        written = _LABEL.search(_text_of(item, "SegmentDescription"))
        segments[number] = _Described(int(written[1]) if written else number, item)
    labels = [label for label, _ in segments.values()]
    are_different = len(set(labels)) == len(labels)
    if not labels or not are_different or not 0 < min(labels) <= max(labels) < 1 << 16:
        raise UnsupportedFormatError(
            f"{path}: expected segments with different labels from 1 to 65535, "
            f"found {listed(labels)}"
        )
    return segments


def _require_same_identity(path: Path, dataset: Any, like: Path, other: Any) -> None:
    """Raise InputError if two files state different patients or frames of reference."""
    for keyword, name in _IDENTITY.items():
        found = _text_of(dataset, keyword)
        expected = _text_of(other, keyword)
        if found and expected and found != expected:
            raise InputError(
                f"{path} and {like} are of different {name}\n"
                f"  {keyword}: expected {shorten(expected)!r} as in {like}, "
                f"found {shorten(found)!r} in {path}\n"
                "  Name the files of one patient, whose segmentation was made on this series."
            )


def _text_of(dataset: Any, keyword: str) -> str:
    """Return the text of an element; "" for none, or an empty one."""
    return str(dataset.get(keyword) or "").strip()


def _read_segmentation(path: Path, notes: list[str]) -> Any:
    """Return a segmentation of whole segments; fractions become whole at half of their maximum."""
    dataset: Any = pydicom.dcmread(path)
    for item in dataset.SegmentSequence:
        if not item.get("SegmentAlgorithmType"):  # Old files lack it, and highdicom asks for it.
            item.SegmentAlgorithmType = "MANUAL"
    if dataset.get("SegmentationType") == "FRACTIONAL":
        _require_known_fractions(path, dataset)
        maximum = int(dataset.MaximumFractionalValue)
        if dataset.file_meta.TransferSyntaxUID.is_compressed:
            dataset.decompress()
        fractions = np.frombuffer(dataset.PixelData, np.uint8)
        is_inside = fractions >= maximum / 2
        dataset.PixelData = np.where(is_inside, np.uint8(maximum), np.uint8(0)).tobytes()
        kind = dataset.SegmentationFractionalType.lower()
        notes.append(f"its segments are fractions ({kind}); voxels of at least half are taken")
    return highdicom.seg.Segmentation.from_dataset(dataset, copy=False)


def _require_known_fractions(path: Path, dataset: Any) -> None:
    """Raise UnsupportedFormatError if half of a fraction means nothing."""
    kind = _text_of(dataset, "SegmentationFractionalType")
    if kind not in ("OCCUPANCY", "PROBABILITY"):
        raise UnsupportedFormatError(
            f"{path}: expected fractions of the type OCCUPANCY or PROBABILITY, "
            f"found {shorten(kind)!r}"
        )
    maximum = int(dataset.get("MaximumFractionalValue") or 0)
    if not 1 <= maximum <= 255 or dataset.BitsAllocated != 8:
        raise UnsupportedFormatError(
            f"{path}: damaged DICOM: expected fractions of 8 bits up to a maximum from 1 to 255, "
            f"found {dataset.BitsAllocated} bits and the maximum {maximum}"
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
            f"{path}: its segments cannot become one label map: {shorten(error, 200)}; "
            "do they overlap?"
        ) from None
    labels = [label for label, _ in described.values()]
    table = np.zeros(max(described) + 1, np.uint8 if max(labels) < 256 else np.uint16)
    table[list(described)] = labels
    stored = table[volume.array.astype(np.intp)]
    affine = volume.get_affine("RAS")[:, [2, 1, 0, 3]] + 0.0  # Its axes are slice, row, column.
    if like is None:
        notes.append(
            "it holds only the slices that its segments reach; "
            "--like SERIES gives it the grid of its series"
        )
    else:
        series = read_series(like)
        notes += series.header.notes
        _require_same_identity(path, dataset, like, next(iter(series.datasets.values())))
        stored = _padded(path, stored, affine, series.header)
        affine, _ = series.header.geometry()
    segments = tuple(_segment(label, item) for label, item in described.values())
    return segments, stored, affine


def _padded(
    path: Path, stored: NDArray[Any], affine: NDArray[np.float64], series: VolumeHeader
) -> NDArray[Any]:
    """Return a label map, (slices, rows, columns), extended to the grid of a whole series."""
    grid, _ = series.geometry()
    shape = stored.shape[::-1]
    offset = np.rint(np.linalg.solve(grid, affine[:, 3])[:3]).astype(int)
    expected = grid.copy()
    expected[:3, 3] += grid[:3, :3] @ offset
    after = series.grid_shape - offset - shape
    if min(*offset, *after) < 0 or not same_grid(shape, affine, shape, expected):
        difference = describe_difference(
            (path, shape, affine), (series.path, series.grid_shape, grid)
        )
        raise GridMismatchError(
            f"{path}: not on the grid of --like\n{difference}\n"
            "  Name the series that it was made on."
        )
    return np.pad(stored, np.column_stack([offset, after])[::-1])


def _segment(label: int, item: Any) -> Segment:
    """Return a segment by the element that describes it."""
    name = shorten(str(item.get("SegmentLabel") or f"Label {label}"), MAX_OF_A_NAME)
    lab = item.get("RecommendedDisplayCIELabValue")
    if not lab:
        return Segment(label, name)
    red, green, blue = highdicom.color.CIELabColor.from_dicom_value(list(lab)).to_rgb()
    return Segment(label, name, (red / 255, green / 255, blue / 255))


def write(
    target: Path,
    labels: NDArray[np.unsignedinteger[Any]],
    named: Sequence[Segment],
    like: Series,
    segments: Path | None,
) -> None:
    """Write a label map (x, y, z) on the grid of a series, in binary segments; raises as `read`."""
    # The segments get these names, and keep what describes their labels in the file `segments`.
    names = {segment.label: segment.name for segment in named}
    with _decoding(like.header.path):
        content = _segmentation(labels.T, names, like, segments)
    write_small_file(target, content)


def _segmentation(
    labels: NDArray[Any], known: Mapping[int, str], series: Series, file: Path | None
) -> bytes:
    path = series.header.path
    sources = list(series.datasets.values())
    items = _items_of(file, path, sources[0])
    _limit(path, series.datasets, labels.size)
    names = dict.fromkeys(items, "")
    for segment in segments_of(labels, ()):
        names[segment.label] = known.get(segment.label, segment.name)
    names = names or {1: "Label 1"}
    table = np.zeros(max(names) + 1, np.uint16)
    described = []
    for number, label in enumerate(sorted(names), 1):
        table[label] = number
        described.append(_describe(number, label, names[label], items.get(label)))
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
            # It sorts the segmentation behind its series.
            series_number=min(100 * int(sources[0].get("SeriesNumber") or 0) + 1, (1 << 31) - 1),
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            **_CONVERTED,
        )
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(
            f"{path}: highdicom refuses to write a segmentation of this series: "
            f"{shorten(error, 200)}"
        ) from None
    buffer = BytesIO()
    segmentation.save_as(buffer)
    return buffer.getvalue()


def _items_of(file: Path | None, series: Path, first: Any) -> dict[int, Any]:
    """Return what describes the labels in another segmentation of a series with this first file."""
    if file is None:
        return {}
    dataset = next(iter(_datasets(file, []).values()))
    if "SegmentSequence" not in dataset:
        raise InputError(f"{file}: expected a DICOM segmentation whose segments describe labels")
    _require_same_identity(file, dataset, series, first)
    return dict(_labels_of(file, dataset).values())


def _complete(file: Path, source: Any, first: Any, thickness: float) -> None:
    """Complete the header of a file for highdicom; raise InputError if it cannot be."""
    if not source.get("SOPClassUID"):  # De-identification may empty it.
        class_of_modality = _CLASSES.get(source.get("Modality"), "")
        source.SOPClassUID = source.file_meta.get("MediaStorageSOPClassUID") or class_of_modality
    lacking = [keyword for keyword in _REFERENCED if not source.get(keyword)]
    if lacking:
        raise InputError(
            f"{file}: a DICOM segmentation refers to its series, "
            f"and this file has no {' and no '.join(lacking)}\n"
            "  De-identification may replace these values, but not empty them: "
            "set them in the files, or keep the NIfTI file."
        )
    for keyword in _EXPECTED:
        source.setdefault(keyword, None)
    if "PerFrameFunctionalGroupsSequence" in source:
        # highdicom looks for these only among the shared groups.
        shared = source.SharedFunctionalGroupsSequence[0]
        frame = source.PerFrameFunctionalGroupsSequence[0]
        for name in ("PlaneOrientationSequence", "PixelMeasuresSequence"):
            shared.setdefault(name, frame.get(name))
    else:
        source.ImageOrientationPatient = first.ImageOrientationPatient  # Equal up to rounding.
        source.SliceThickness = source.get("SliceThickness") or f"{thickness or 1.0:.10g}"


def _describe(number: int, label: int, name: str, item: Any) -> Any:
    """Return the description of a segment: the item with this number, or else that of a tissue."""
    if item is None:
        description = _describe_tissue(number, label, name)
    else:
        description = _renumbered(item, number)
    ending = f"label value {label}" if label != number else ""
    text = _LABEL.sub("", str(description.get("SegmentDescription") or ""))
    text = text[: 1022 - len(ending)]
    if text and ending:
        text += "; "
    text += ending
    if text:
        description.SegmentDescription = text
    elif "SegmentDescription" in description:
        del description.SegmentDescription
    return description


def _renumbered(item: Any, number: int) -> Any:
    """Return the description of a segment of another file, which is changed, with a new number."""
    item.decode()  # The file to write has another character set.
    item.SegmentNumber = number
    if not item.get("SegmentAlgorithmType"):  # It is unknown; MANUAL needs no algorithm.
        item.SegmentAlgorithmType = "MANUAL"
    elif item.SegmentAlgorithmType == "MANUAL":  # It was, before the refinement.
        item.SegmentAlgorithmType = "SEMIAUTOMATIC"
        item.SegmentAlgorithmName = "crfrefine"
    return highdicom.seg.SegmentDescription.from_dataset(item, copy=False)


def _describe_tissue(number: int, label: int, name: str) -> Any:
    """Return a description with label and name, for a segment without further facts."""
    tissue = highdicom.sr.CodedConcept("85756007", "SCT", "Tissue")
    artificial = highdicom.sr.CodedConcept("123110", "DCM", "Artificial Intelligence")
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="unknown", version="unknown", family=artificial
    )
    rgb = [round(255 * part) for part in Segment(label, name).shown_color]
    color = highdicom.color.CIELabColor.from_rgb(*rgb)
    text = name[:MAX_OF_A_NAME].replace("\\", "/")
    return highdicom.seg.SegmentDescription(
        number, text, tissue, tissue, "AUTOMATIC", algorithm, display_color=color
    )
