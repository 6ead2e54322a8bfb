"""Series and segmentations of DICOM, read and written by highdicom in the process of `io/dicom.py`."""

from __future__ import annotations

import copy
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.geometry import describe_difference, same_grid
from crfrefine.base.text import counted, listed, shorten
from crfrefine.errors import GridMismatchError, InputError, UnsupportedFormatError
from crfrefine.io.streams import MAX_RATIO, cut_off
from crfrefine.io.text_header import LPS, affine_of
from crfrefine.io.volume import MAX_OF_A_NAME, Segment

SEGMENTATION = "DICOM segmentation"
_SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
_CLASSES = {"CT": "1.2.840.10008.5.1.4.1.1.2", "MR": "1.2.840.10008.5.1.4.1.1.4", "PT": "1.2.840.10008.5.1.4.1.1.128"}
_SMALL = 1 << 26  # Bytes of voxels that a compressed file of any size may hold.
# End of a segment's description, where its label is not its number: numbers have no gaps.
_LABEL = re.compile(r"(?:^|; )label value ([0-9]{1,5})$", re.ASCII)
_IDENTITY = {"PatientID": "patients", "FrameOfReferenceUID": "frames of reference"}
# Elements that the standard wants in every file, but perhaps without a value.
_OF_PATIENT = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex")
_OF_STUDY = ("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName")
# Elements of an image that a segmentation repeats.
_REFERENCED = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID", "Modality")
# Distances of slices, and deviations from an even row, as parts of the usual step; and an angle.
_SAME_PLACE, _UNEVEN, _MAX_TILT = 1e-3, 0.1, 2.0


def _limit(path: Path, request: Mapping[str, Any], files: Iterable[Path], num_voxels: int = 0, bits: int = 0) -> None:
    """Limit memory and processor time from now on; raise an error if the files are too small for so many voxels."""
    import resource

    num_bytes, promised = sum(file.stat().st_size for file in files), num_voxels * bits // 8
    if promised > max(num_bytes * MAX_RATIO, _SMALL):
        raise cut_off(path, f"{promised} bytes of voxels", f"it holds {num_bytes}")
    seconds, memory = request["limits"]
    most_memory = request["addresses"] + memory + 32 * num_voxels + 4 * num_bytes
    for kind, most in ((resource.RLIMIT_CPU, seconds + num_bytes // 1_000_000), (resource.RLIMIT_AS, most_memory)):
        hard = resource.getrlimit(kind)[1]  # RLIM_INFINITY is -1.
        resource.setrlimit(kind, (most if hard < 0 else min(most, hard), hard))


@dataclass(frozen=True)
class _Series:
    """The files of a series, and its grid."""

    datasets: dict[Path, Any]  # by file, without pixels
    order: NDArray[np.intp]  # numbers of the slices along their normal
    shape: tuple[int, int, int]  # (slices, rows, columns)
    affine: NDArray[np.float64]  # (4, 4) voxel (column, row, slice) to RAS, mm
    thickness: float  # mm; 0 if unknown


def _datasets(path: Path, request: Mapping[str, Any], notes: list[str]) -> dict[Path, Any]:
    """Return the headers of a series' files, or of the one file."""
    import pydicom

    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")) if path.is_dir() else [path]
    _limit(path, request, files)
    datasets, others = {}, []
    for file in files:
        try:
            dataset = pydicom.dcmread(file, stop_before_pixels=True)
        except pydicom.errors.InvalidDicomError:
            if file.suffix.lower() == ".dcm" or file == path:
                raise UnsupportedFormatError(f"{file}: not a DICOM file, although its name says so") from None
            dataset = pydicom.FileDataset(file, {})
        if "Rows" in dataset and (file == path or dataset.get("SOPClassUID") not in _SEGMENTATIONS):
            if not dataset.get("SOPClassUID"):  # De-identification may empty it.
                dataset.SOPClassUID = dataset.file_meta.get("MediaStorageSOPClassUID") or _CLASSES.get(dataset.get("Modality"), "")
            datasets[file] = dataset
        else:
            others.append(file.name)
    if not datasets:
        raise InputError(f"{path}: expected the slices of a DICOM series or a segmentation, found none; name the folder of the series")
    if others:
        notes.append(f"{counted(len(others), 'file')} without slices, such as {others[0]}, left aside")
    return datasets


def _slices(file: Path, dataset: Any) -> Iterator[tuple[str, float, NDArray[np.float64]]]:
    """Yield the slices of a file: name, thickness in mm or 0, and numbers."""
    # The 13 numbers are rows and columns, the mm between them, the directions along a row and along
    # a column, and the center of the first voxel, in LPS.
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [{}])[0]
    frames = dataset.get("PerFrameFunctionalGroupsSequence") or [{}]
    if len(frames) != int(dataset.get("NumberOfFrames") or 1):
        raise UnsupportedFormatError(f"{file}: several frames that do not say where they are; convert the file with dcm2niix")
    if dataset.get("SamplesPerPixel", 1) != 1:
        raise UnsupportedFormatError(f"{file}: expected one number per voxel, found colors")

    def value(frame: Any, group: str, keyword: str) -> Any:
        items = frame.get(group) or shared.get(group)
        return (items[0] if items else dataset).get(keyword)

    for number, frame in enumerate(frames, 1):
        name = file.name if len(frames) == 1 else f"frame {number} of {file.name}"
        spacing = value(frame, "PixelMeasuresSequence", "PixelSpacing") or ()
        axes = value(frame, "PlaneOrientationSequence", "ImageOrientationPatient") or ()
        position = value(frame, "PlanePositionSequence", "ImagePositionPatient") or ()
        thickness = [value(frame, "PixelMeasuresSequence", keyword) for keyword in ("SpacingBetweenSlices", "SliceThickness")]
        numbers = np.array([dataset.Rows, dataset.Columns, *spacing, *axes, *position], float)
        is_whole = (len(spacing), len(axes), len(position)) == (2, 6, 3) and np.isfinite(numbers).all() and min(spacing) > 0
        if not is_whole or np.abs(np.inner(numbers[4:10].reshape(2, 3), numbers[4:10].reshape(2, 3)) - np.eye(2)).max() > 0.02:
            raise UnsupportedFormatError(
                f"{file}: {name} has no place in the world, or it is damaged: its orientation, position or spacing is no geometry; "
                "expected slices such as of CT, MR or PET"
            )
        yield name, next((abs(float(mm)) for mm in thickness if mm), 0.0), numbers


def _series(path: Path, request: Mapping[str, Any], notes: list[str]) -> _Series:
    """Read the headers of a series; raise InputError if its slices are not one volume."""
    datasets = _datasets(path, request, notes)
    names_by_series = {str(dataset.get("SeriesInstanceUID") or ""): file.name for file, dataset in datasets.items()}
    if len(names_by_series) > 1:
        examples = listed(names_by_series.values())
        raise InputError(f"{path}: expected one series, found {len(names_by_series)}: {examples}; give each a folder of its own")
    names, thicknesses, rows_of_numbers = zip(*(part for file, dataset in datasets.items() for part in _slices(file, dataset)), strict=True)
    numbers = np.array(rows_of_numbers)
    shapes, spacings, directions, positions = np.split(numbers, [2, 4, 10], axis=1)
    tolerances = np.repeat([0.0, 1e-3 * spacings[0].min(), 1e-3], [2, 2, 6])
    differs = (np.abs(numbers - numbers[0])[:, :10] > tolerances).any(axis=1)
    if differs.any():
        other = int(differs.argmax())
        raise InputError(
            f"{path}: slices of different sizes, voxel sizes or orientations: {names[0]} has {numbers[0, :10].tolist()}, {names[other]} "
            f"has {numbers[other, :10].tolist()}; a localizer? Give each volume a folder of its own"
        )
    axes = directions[0].reshape(2, 3)
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    normal = np.cross(*axes)
    places = positions @ normal
    order = np.argsort(places, kind="stable")
    step = normal * (thicknesses[0] or 1.0)
    if len(names) > 1:
        distances = np.diff(places[order])
        usual, step = np.median(distances), (positions[order[-1]] - positions[order[0]]) / len(distances)
        row = positions[order[0]] + np.arange(len(names))[:, np.newaxis] * step
        off = np.linalg.norm(positions[order] - row, axis=1).max()
        tilt = np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1.0, 1.0)))
        if distances.min() <= max(_SAME_PLACE * usual, 1e-6) or off > _UNEVEN * usual or tilt > _MAX_TILT:
            worst = int(np.abs(distances - usual).argmax())
            raise InputError(
                f"{path}: expected slices straight above each other, evenly spaced; found most of them {usual:.4g} mm apart, "
                f"{names[order[worst]]} and {names[order[worst + 1]]} {distances[worst]:.4g} mm, and a tilt of {tilt:.1f} degrees\n"
                "  Is there a gap, or a second echo, time or reconstruction? Give each volume a folder of its own.\n"
                "  dcm2niix resamples uneven slices, and straightens those of a tilted gantry."
            )
    elif not thicknesses[0]:
        notes.append("a single slice without thickness; 1 mm is assumed")
    vectors = np.column_stack([axes[0] * spacings[0, 1], axes[1] * spacings[0, 0], step])
    affine = affine_of(vectors, positions[order[0]], LPS)
    rows, columns = map(int, shapes[0])
    return _Series(datasets, order, (len(names), rows, columns), affine, thicknesses[0])


def read(path: Path, request: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return the header and the voxels of a series or a segmentation, (slices, rows, columns)."""
    notes: list[str] = []
    answer: dict[str, Any] = {"format": "DICOM series", "segments": [], "notes": notes}
    if path.is_file() and (dataset := next(iter(_datasets(path, request, notes).values()))).get("SOPClassUID") in _SEGMENTATIONS:
        names, stored, affine = _read_segmentation(path, request, dataset, notes)
        answer |= {"format": SEGMENTATION, "segments": names}
    else:
        series = _series(path, request, notes)
        affine, empty = series.affine, np.broadcast_to(np.float32(0), series.shape)
        stored = empty if request["grid_only"] else _voxels(path, series, request)
    answer |= {"shape": stored.shape, "dtype": stored.dtype.str, "affine": affine.tolist()}
    return answer, b"" if request["grid_only"] else stored.tobytes()


def _voxels(path: Path, series: _Series, request: Mapping[str, Any]) -> NDArray[Any]:
    """Return the scaled values of a series, (slices along the normal, rows, columns), as integers if they are whole."""
    import highdicom
    import pydicom

    datasets, num_voxels = series.datasets, math.prod(series.shape)
    first = next(iter(datasets.values()))
    _limit(path, request, datasets, num_voxels, int(first.BitsAllocated))
    # Series with 32 bits need float64 before they are written.
    transforms = ("real_world_transform", "presentation_lut", "palette_color_lut", "icc_profile")
    options: dict[str, Any] = {f"apply_{name}": False for name in transforms}
    options |= {"dtype": np.float32 if int(first.BitsStored) <= 16 else np.float64, "rtol": 0.25}
    if "NumberOfFrames" in first:
        if len(datasets) > 1:
            raise InputError(f"{path}: expected one file of several frames, found {len(datasets)}; convert each by itself")
        array = highdicom.imread(next(iter(datasets))).get_volume(**options).array
    else:
        images = [pydicom.dcmread(file) for file in datasets]
        for image in images:  # De-identification removes it from some files, or from all.
            image.FrameOfReferenceUID, image.SOPClassUID = first.get("FrameOfReferenceUID") or "2.25.1", first.SOPClassUID
        array = highdicom.get_volume_from_series(images, orientation_tol=1e-2, **options).array
    array = array[::-1]  # highdicom's slices run against the normal.
    if not np.isfinite(array).all():
        raise InputError(f"{path}: expected finite values, found NaN or infinite ones")
    low, high, is_whole = array.min(), array.max(), (array == np.rint(array)).all()
    dtypes = (dtype for dtype in ("<i2", "<u2", "<i4") if is_whole and np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max)
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
        raise UnsupportedFormatError(f"{path}: expected segments with different labels from 1 to 65535, found {listed(labels)}")
    return segments


def _require_same_identity(path: Path, dataset: Any, like: Path, other: Any) -> None:
    """Raise InputError if two files are of different patients or frames of reference; a missing value is no difference."""
    for keyword, name in _IDENTITY.items():
        found, expected = (str(source.get(keyword) or "").strip() for source in (dataset, other))
        if found and expected and found != expected:
            raise InputError(
                f"{path} and {like} are of different {name}\n"
                f"  {keyword}: expected {shorten(expected)!r} as in {like}, found {shorten(found)!r} in {path}\n"
                "  Name the files of one patient, whose segmentation was made on this series."
            )


def _read_segmentation(
    path: Path, request: Mapping[str, Any], dataset: Any, notes: list[str]
) -> tuple[list[Any], NDArray[Any], NDArray[np.float64]]:
    """Return label, name and color of each segment, the label map, (slices, rows, columns), and its affine."""
    import highdicom

    if dataset.get("SegmentationType") == "FRACTIONAL":
        raise UnsupportedFormatError(f"{path}: expected whole segments, found fractions, which are no probabilities of labels")
    described = _labels_of(path, dataset)
    num_voxels = int(dataset.get("NumberOfFrames") or 1) * int(dataset.Rows) * int(dataset.Columns)
    _limit(path, request, [path], num_voxels, int(dataset.BitsAllocated))
    try:
        volume = highdicom.seg.segread(path).get_volume(combine_segments=True, rtol=0.05).flip_spatial(0)
    except RuntimeError as error:
        raise InputError(f"{path}: its segments cannot become one label map: {shorten(error, 200)}; do they overlap?") from None
    labels = [label for label, _ in described.values()]
    table = np.zeros(max(described) + 1, np.uint8 if max(labels) < 256 else np.uint16)
    table[list(described)] = labels
    stored = table[volume.array.astype(np.intp)]
    affine = volume.get_affine("RAS")[:, [2, 1, 0, 3]] + 0.0  # Its axes are slice, row, column.
    if request["like"] is None:
        notes.append("it holds only the slices that its segments reach; --like SERIES gives it the grid of its series")
    else:
        like = Path(request["like"])
        series = _series(like, request, notes)
        _require_same_identity(path, dataset, like, next(iter(series.datasets.values())))
        stored, affine = _placed(path, stored, affine, like, series), series.affine
    segments = []
    for label, item in described.values():
        lab = item.get("RecommendedDisplayCIELabValue")
        color = [float(part) / 255 for part in highdicom.color.CIELabColor.from_dicom_value(list(lab)).to_rgb()] if lab else None
        segments.append([label, shorten(str(item.get("SegmentLabel") or f"Label {label}"), MAX_OF_A_NAME), color])
    return segments, stored, affine


def _placed(path: Path, stored: NDArray[Any], affine: NDArray[np.float64], like: Path, series: _Series) -> NDArray[Any]:
    """Return a label map of some slices on the grid of a series."""
    grid, shape = series.affine, stored.shape[::-1]
    offset = np.rint(np.linalg.solve(grid, affine[:, 3])[:3]).astype(int)
    expected = grid.copy()
    expected[:3, 3] += grid[:3, :3] @ offset
    is_inside = (offset >= 0).all() and (offset + shape <= series.shape[::-1]).all()
    if not is_inside or not same_grid(shape, affine, shape, expected):
        difference = describe_difference((path, shape, affine), (like, series.shape[::-1], grid))
        raise GridMismatchError(f"{path}: not on the grid of --like\n{difference}\n  Name the series that it was made on.")
    label_map = np.zeros(series.shape, stored.dtype)
    label_map[tuple(slice(start, start + size) for start, size in zip(offset[::-1], stored.shape, strict=True))] = stored
    return label_map


def write(path: Path, request: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Return the file of a segmentation on the grid of the series `path`; the label map is on the standard input."""
    import highdicom
    import pydicom

    from crfrefine import __version__

    series = _series(path, request, [])
    sources = list(series.datasets.values())
    labels = np.frombuffer(sys.stdin.buffer.read(), request["dtype"]).reshape(request["shape"])
    _limit(path, request, series.datasets, labels.size)
    items: dict[int, Any] = {}
    if request["segments"] is not None:
        file = Path(request["segments"])
        source = pydicom.dcmread(file, stop_before_pixels=True)
        if "SegmentSequence" not in source:
            raise InputError(f"{file}: expected a DICOM segmentation whose segments describe labels")
        _require_same_identity(file, source, path, sources[0])
        items = dict(_labels_of(file, source).values())
    names = {**dict.fromkeys(items, ""), **dict(request["names"])} or {1: "Label 1"}
    table = np.zeros(max(names) + 1, np.uint16)
    table[sorted(names)] = np.arange(1, len(names) + 1)
    described = [_describe(number, label, names[label], items.get(label)) for number, label in enumerate(sorted(names), 1)]
    for file, source in series.datasets.items():
        _complete(file, source, sources[0], series.thickness)
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
            omit_empty_frames=True,
        )
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"{path}: highdicom refuses to write a segmentation of this series: {shorten(error, 200)}") from None
    buffer = BytesIO()
    segmentation.save_as(buffer)
    return {}, buffer.getvalue()


def _complete(file: Path, source: Any, first: Any, thickness: float) -> None:
    """Give a header what highdicom asks for; raise InputError if a segmentation cannot refer to its file."""
    lacking = [keyword for keyword in _REFERENCED if not source.get(keyword)]
    if lacking:
        raise InputError(
            f"{file}: a DICOM segmentation refers to its series, and this file has no {' and no '.join(lacking)}\n"
            "  De-identification may replace these values, but not empty them: set them in the files, or keep the NIfTI file."
        )
    for keyword in (*_OF_PATIENT, *_OF_STUDY):
        source.setdefault(keyword, None)
    if "PerFrameFunctionalGroupsSequence" in source:  # highdicom looks for these only among the shared groups.
        shared, frame = source.SharedFunctionalGroupsSequence[0], source.PerFrameFunctionalGroupsSequence[0]
        for name in ("PlaneOrientationSequence", "PixelMeasuresSequence"):
            shared.setdefault(name, frame.get(name))
    else:
        source.ImageOrientationPatient = first.ImageOrientationPatient  # Equal up to rounding.
        source.SliceThickness = source.get("SliceThickness") or f"{thickness or 1.0:.10g}"


def _describe(number: int, label: int, name: str, item: Any) -> Any:
    """Return the description of a segment: the given one with another number, or a new one of a tissue."""
    import highdicom

    if item is not None:
        item = copy.deepcopy(item)
        item.decode()  # The file to write has another character set.
        item.SegmentNumber = number
        if item.get("SegmentAlgorithmType") == "MANUAL":  # It was, before the refinement.
            item.SegmentAlgorithmType, item.SegmentAlgorithmName = "SEMIAUTOMATIC", "crfrefine"
        item = highdicom.seg.SegmentDescription.from_dataset(item)
    else:
        tissue = highdicom.sr.CodedConcept("85756007", "SCT", "Tissue")
        artificial = highdicom.sr.CodedConcept("123110", "DCM", "Artificial Intelligence")
        algorithm = highdicom.AlgorithmIdentificationSequence(name="unknown", version="unknown", family=artificial)
        color = highdicom.color.CIELabColor.from_rgb(*(round(255 * part) for part in Segment(label, name).shown_color))
        text = name[:MAX_OF_A_NAME].replace("\\", "/")
        item = highdicom.seg.SegmentDescription(number, text, tissue, tissue, "AUTOMATIC", algorithm, display_color=color)
    before = _LABEL.sub("", str(item.get("SegmentDescription") or ""))
    ending = f"label value {label}" if label != number else ""
    text = "; ".join(part for part in (before[: 1022 - len(ending)], ending) if part)
    if text:
        item.SegmentDescription = text
    elif "SegmentDescription" in item:
        del item.SegmentDescription
    return item
