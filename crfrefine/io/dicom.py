"""DICOM for `crfrefine convert`: highdicom reads and writes it in a separate process.

Decoders never return from some damaged files, and take gigabytes for others. The process therefore
has limits of processor time and of memory. Its request is a line of JSON, followed by the voxels of
a label map to write. Its answer is a line of JSON, followed by voxels or by the file to write.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine import errors
from crfrefine.base.geometry import describe_difference, require_usable, same_grid, spacing_of
from crfrefine.base.text import counted, listed, shorten
from crfrefine.errors import CrfRefineError, GridMismatchError, InputError, UnsupportedFormatError
from crfrefine.io.atomic import atomic_files
from crfrefine.io.decode import as_bytes
from crfrefine.io.streams import MAX_RATIO, cut_off
from crfrefine.io.volume import MAX_OF_A_NAME, Segment, Volume, VolumeHeader, segments_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

INSTALL = "pip install 'crfrefine[dicom]'"
SEGMENTATION = "DICOM segmentation"
SECONDS = 60
"""Processor time that a conversion may take; each million bytes of its files adds a second."""

MEMORY = 1 << 30
"""Bytes that a conversion may take; 32 for each voxel and 4 for each byte of its files are added."""

_START = "import sys; sys.path.append(sys.argv[1]); from crfrefine.io.dicom import serve; serve()"
_SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
_CLASSES = {"CT": "1.2.840.10008.5.1.4.1.1.2", "MR": "1.2.840.10008.5.1.4.1.1.4", "PT": "1.2.840.10008.5.1.4.1.1.128"}
_SMALL = 1 << 26  # Bytes of voxels that a compressed file of any size may hold.
_LABEL = re.compile(r"(?:^|; )label value ([0-9]{1,5})$", re.ASCII)
"""End of a segment's description, where its label is not its number: numbers have no gaps."""

_IDENTITY = {"PatientID": "patients", "FrameOfReferenceUID": "frames of reference"}
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime"),
    *("StudyID", "AccessionNumber", "ReferringPhysicianName"),
)
"""Elements that the standard wants in every file, but perhaps without a value."""

_REFERENCED = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID", "Modality")
"""Elements of an image that a segmentation repeats."""

_SAME_PLACE, _UNEVEN = 1e-3, 0.1
"""Distances of slices, and deviations from an even row, as parts of the usual step."""


# What `convert` calls.


def read(path: Path, like: Path | None = None) -> Volume:
    """Read a series as it is measured, or a segmentation as a label map; both with a header.

    Args:
        path: the folder of a series, a file of several frames, or a segmentation.
        like: the series on whose grid a segmentation is placed.

    Raises:
        InputError: the slices are no volume, or `like` is of another patient or frame of reference.
        GridMismatchError: the segmentation is not on the grid of `like`.
        UnsupportedFormatError: damaged, or its decoding takes too long.
        CapacityError: its decoding takes too much memory.
    """
    answer, content = _run(path, {"task": "read", "like": like and str(like), "grid_only": False})
    stored = np.frombuffer(content, answer["dtype"]).reshape(answer["shape"])
    header = _header(path, answer)
    return Volume(stored.T, *header.geometry(), path, header)


def read_grid(series: Path) -> VolumeHeader:
    """Return the grid of a series, without its voxels; raises as `read`."""
    return _header(series, _run(series, {"task": "read", "like": None, "grid_only": True})[0])


def write(target: Path, labels: NDArray[np.unsignedinteger[Any]], named: Sequence[Segment], like: Path, segments: Path | None) -> None:
    """Write a label map on the grid of a series as a segmentation of binary segments.

    Args:
        target: the file.
        labels: (x, y, z) on the grid of the series.
        named: names of labels.
        like: the series.
        segments: a segmentation; its description of each label is kept.

    Raises:
        CrfRefineError: as for `read`; or highdicom refuses the series.
    """
    stored = np.ascontiguousarray(labels.T)
    known = {segment.label: segment.name for segment in named}
    names = [(segment.label, known.get(segment.label, segment.name)) for segment in segments_of(stored, ())]
    request = {"task": "write", "names": names, "segments": segments and str(segments)}
    request |= {"shape": stored.shape, "dtype": stored.dtype.str}
    _, content = _run(like, request, as_bytes(stored))
    with atomic_files(target) as (file,):
        file.write(content)


def _header(path: Path, answer: Mapping[str, Any]) -> VolumeHeader:
    affine = np.array(answer["affine"])
    require_usable(affine, 3, path)
    return VolumeHeader(
        path=path,
        format=answer["format"],
        grid_shape=tuple(answer["shape"][::-1]),
        num_channels=1,
        dtype=answer["dtype"],
        spacing=spacing_of(affine),
        affine=affine,
        notes=tuple(answer["notes"]),
        segments=tuple(Segment(label, name, color and tuple(color)) for label, name, color in answer["segments"]),
    )


def _run(path: Path, request: Mapping[str, Any], voxels: memoryview | bytes = b"") -> tuple[Any, bytes]:
    """Return the answer of the process; its errors are raised here."""
    command = [sys.executable, "-P", "-c", _START, str(Path(__file__).parents[2])]
    line = json.dumps({"path": str(path), "limits": (SECONDS, MEMORY), **request}).encode() + b"\n"
    done = subprocess.run(command, input=b"".join((line, voxels)), capture_output=True, check=False)
    found, _, content = done.stdout.partition(b"\n")
    if done.returncode != 0:
        reasons = {-24: "its decoding takes far longer than that of files of its size should"}
        reason = reasons.get(done.returncode, f"its decoder ended with status {done.returncode}")
        raise UnsupportedFormatError(f"{path}: damaged DICOM: {reason}; copy or export it again")
    answer = json.loads(found)
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["message"])
    return answer, content


# The work of the process.


@dataclass(frozen=True)
class _Plane:
    """A slice: a file, or a frame of one."""

    name: str  # for people
    series: str  # UID
    shape: tuple[int, int]  # (rows, columns)
    position: NDArray[np.float64]  # (3,) center of the first voxel in LPS, mm
    axes: NDArray[np.float64]  # (2, 3) directions along a row and along a column in LPS
    spacing: tuple[float, float]  # mm between rows, between columns
    thickness: float  # mm; 0 if the file does not say it


def serve() -> None:
    """Answer the request on the standard input."""
    request = json.loads(sys.stdin.buffer.readline())
    path = Path(request["path"])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # Decoders may print.
    warnings.simplefilter("ignore")
    content: Any = b""
    try:
        import highdicom.seg  # noqa: F401 - its memory is not part of the limit
        import pydicom

        pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
        request["addresses"] = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
        answer, content = (_write if request["task"] == "write" else _read)(path, request)
    except CrfRefineError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    except ImportError as error:
        message = f"DICOM needs a package that is not installed ({error}); {INSTALL}"
        answer = {"error": "InputError", "message": f"{path}: {message}"}
    except MemoryError:
        message = "its decoding takes more memory than that of files of its size should; damaged?"
        answer = {"error": "CapacityError", "message": f"{path}: {message}"}
    except Exception as error:  # Damage shows as an exception of any kind.
        message = f"damaged DICOM, or a value that is needed is missing ({shorten(f'{type(error).__name__}: {error}', 300)})"
        answer = {"error": "UnsupportedFormatError", "message": f"{path}: {message}"}
    answers.write(json.dumps(answer).encode() + b"\n")
    answers.write(content)
    answers.flush()
    os._exit(0)


def _limit(path: Path, request: Mapping[str, Any], files: Iterable[Path], num_voxels: int = 0, bits: int = 0) -> None:
    """Limit memory and processor time from now on; raise an error if the files are too small for so many voxels."""
    import resource

    num_bytes, promised = sum(file.stat().st_size for file in files), num_voxels * bits // 8
    if promised > max(num_bytes * MAX_RATIO, _SMALL):
        raise cut_off(path, f"{promised} bytes of voxels", f"it holds {num_bytes}")
    seconds, memory = request["limits"]
    limits = {
        resource.RLIMIT_CPU: seconds + num_bytes // 1_000_000,
        resource.RLIMIT_AS: request["addresses"] + memory + 32 * num_voxels + 4 * num_bytes,
    }
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]  # RLIM_INFINITY is -1.
        resource.setrlimit(kind, (most if hard < 0 else min(most, hard), hard))


def _datasets(path: Path, request: Mapping[str, Any], notes: list[str]) -> dict[Path, Any]:
    """Return the headers of a series' files, or of the one file."""
    import pydicom

    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")) if path.is_dir() else [path]
    _limit(path, request, files)
    found, others = {}, []
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
            found[file] = dataset
        else:
            others.append(file.name)
    if not found:
        raise InputError(f"{path}: expected the slices of a DICOM series or a segmentation, found none; name the folder of the series")
    if others:
        notes.append(f"{counted(len(others), 'file')} without slices, such as {others[0]}, left aside")
    return found


def _planes(file: Path, dataset: Any) -> list[_Plane]:
    """Return the slices of a file."""
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [{}])[0]
    frames = dataset.get("PerFrameFunctionalGroupsSequence") or [{}]
    if len(frames) != int(dataset.get("NumberOfFrames") or 1):
        raise UnsupportedFormatError(f"{file}: several frames that do not say where they are; convert the file with dcm2niix")
    if dataset.get("SamplesPerPixel", 1) != 1:
        raise UnsupportedFormatError(f"{file}: expected one number per voxel, found colors")
    planes = []
    for number, frame in enumerate(frames, 1):
        name = file.name if len(frames) == 1 else f"frame {number} of {file.name}"

        def value(group: str, keyword: str, frame: Any = frame) -> Any:
            items = frame.get(group) or shared.get(group)
            return (items[0] if items else dataset).get(keyword)

        position = value("PlanePositionSequence", "ImagePositionPatient")
        axes = value("PlaneOrientationSequence", "ImageOrientationPatient")
        spacing = value("PixelMeasuresSequence", "PixelSpacing")
        if not position or not axes or not spacing:
            raise UnsupportedFormatError(f"{file}: {name} has no place in the world; expected slices such as of CT, MR or PET")
        thickness = (value("PixelMeasuresSequence", keyword) for keyword in ("SpacingBetweenSlices", "SliceThickness"))
        plane = _Plane(
            name=name,
            series=str(dataset.get("SeriesInstanceUID") or ""),
            shape=(int(dataset.Rows), int(dataset.Columns)),
            position=np.array(position, float),
            axes=np.array(axes, float).reshape(2, 3),
            spacing=(float(spacing[0]), float(spacing[1])),
            thickness=next((abs(float(mm)) for mm in thickness if mm), 0.0),
        )
        values = [*plane.position, *plane.axes.flat, *plane.spacing]
        if not np.isfinite(values).all() or min(plane.spacing) <= 0 or np.abs(plane.axes @ plane.axes.T - np.eye(2)).max() > 0.02:
            raise UnsupportedFormatError(f"{file}: damaged DICOM: orientation, position or spacing of {name} is no geometry")
        planes.append(plane)
    return planes


@dataclass(frozen=True)
class _Series:
    """The files of a series, and its grid."""

    datasets: dict[Path, Any]  # by file, without pixels
    order: NDArray[np.intp]  # numbers of the slices along their normal
    shape: tuple[int, int, int]  # (slices, rows, columns)
    affine: NDArray[np.float64]  # (4, 4) voxel (column, row, slice) to RAS, mm
    thickness: float  # mm; 0 if unknown

    @property
    def first(self) -> Any:
        """The header of a file."""
        return next(iter(self.datasets.values()))


def _series(path: Path, request: Mapping[str, Any], notes: list[str]) -> _Series:
    """Read the headers of a series; raise InputError if its slices are not one volume."""
    datasets = _datasets(path, request, notes)
    planes = [plane for file, dataset in datasets.items() for plane in _planes(file, dataset)]
    by_series = {plane.series: plane for plane in planes}
    if len(by_series) > 1:
        examples = listed([plane.name for plane in by_series.values()])
        raise InputError(f"{path}: expected one series, found {len(by_series)}: {examples}; give each a folder of its own")
    first = planes[0]
    for plane in planes[1:]:
        for what, own, expected, tolerance in (
            ("sizes", plane.shape[::-1], first.shape[::-1], 0.0),
            ("orientations", plane.axes, first.axes, 1e-3),
            ("voxel sizes", plane.spacing, first.spacing, 1e-3 * min(first.spacing)),
        ):
            if np.abs(np.subtract(own, expected)).max() > tolerance:
                values = "" if what == "orientations" else f" have {expected} and {own}"
                raise InputError(
                    f"{path}: slices of different {what}: {first.name} and {plane.name}{values}; "
                    "a localizer? Give each volume a folder of its own"
                )
    axes = first.axes / np.linalg.norm(first.axes, axis=1, keepdims=True)
    normal = np.cross(*axes)
    places = np.array([plane.position @ normal for plane in planes])
    order = np.argsort(places, kind="stable")
    positions = np.array([planes[i].position for i in order])
    steps = np.diff(places[order])
    step = normal * (first.thickness or 1.0)
    if not len(steps):
        notes += [] if first.thickness else ["a single slice without thickness; 1 mm is assumed"]
    else:
        usual = float(np.median(steps))
        near, far = (f"{planes[order[i]].name} and {planes[order[i + 1]].name}" for i in (int(steps.argmin()), int(steps.argmax())))
        if steps.min() <= max(_SAME_PLACE * usual, 1e-6):
            raise InputError(
                f"{path}: two slices at one place: {near}; a second echo, time or reconstruction? Give each volume a folder of its own"
            )
        step = (positions[-1] - positions[0]) / len(steps)
        off = np.linalg.norm(positions - positions[0] - np.arange(len(order))[:, np.newaxis] * step, axis=1)
        if off.max() > _UNEVEN * usual:
            raise InputError(
                f"{path}: expected evenly spaced slices, {usual:.4g} mm apart, {far} are {steps.max():.4g} mm apart; "
                "is there a gap in the series? Copy or export it again, or resample it with dcm2niix"
            )
        tilt = np.degrees(np.arccos(min(step @ normal / np.linalg.norm(step), 1.0)))
        if tilt > 2.0:
            raise InputError(
                f"{path}: expected slices above each other, found them shifted by a gantry tilt of {tilt:.1f} degrees; "
                "dcm2niix straightens such a series"
            )
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = axes[0] * first.spacing[1], axes[1] * first.spacing[0]
    affine[:3, 2], affine[:3, 3] = step, positions[0]
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine + 0.0
    return _Series(datasets, order, (len(planes), *first.shape), affine, first.thickness)


def _read(path: Path, request: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
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
    return answer, b"" if request["grid_only"] else as_bytes(np.ascontiguousarray(stored))


def _voxels(path: Path, series: _Series, request: Mapping[str, Any]) -> NDArray[Any]:
    """Return the scaled values of a series, (slices along the normal, rows, columns), as integers if they are whole."""
    import highdicom
    import pydicom

    first, num_voxels, datasets = series.first, math.prod(series.shape), series.datasets
    _limit(path, request, datasets, num_voxels, int(first.BitsAllocated))
    # Series with 32 bits need float64 before they are written.
    transforms = ("real_world_transform", "presentation_lut", "palette_color_lut", "icc_profile")
    options: dict[str, Any] = {f"apply_{name}": False for name in transforms}
    options |= {"dtype": np.float32 if int(first.BitsStored) <= 16 else np.float64, "rtol": 0.25}
    if "NumberOfFrames" in first:
        if len(datasets) > 1:
            raise InputError(f"{path}: expected one file of several frames, found {len(datasets)}; convert each by itself")
        array = highdicom.imread(path if path.is_file() else next(iter(datasets))).get_volume(**options).array
    else:
        found = [pydicom.dcmread(file) for file in datasets]
        for dataset in found:  # De-identification removes it from some files, or from all.
            dataset.FrameOfReferenceUID, dataset.SOPClassUID = first.get("FrameOfReferenceUID") or "2.25.1", first.SOPClassUID
        array = highdicom.get_volume_from_series(found, orientation_tol=1e-2, **options).array
    array = array[::-1]  # highdicom's slices run against the normal.
    if not np.isfinite(array).all():
        raise InputError(f"{path}: expected finite values, found NaN or infinite ones")
    if not (array == np.rint(array)).all():
        return array.astype("<f4", copy=False)
    low, high = array.min(), array.max()
    dtypes = (dtype for dtype in ("<i2", "<u2", "<i4") if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max)
    return array.astype(next(dtypes, "<f4"))


def _labels_of(path: Path, dataset: Any) -> dict[int, tuple[int, Any]]:
    """Return the label of each segment by its number, and what describes it."""
    found = {}
    for item in dataset.SegmentSequence:
        number = int(item.SegmentNumber)
        written = _LABEL.search(str(item.get("SegmentDescription") or ""))
        if number:  # The segment 0 of a label map is the background.
            found[number] = (int(written[1]) if written else number, item)
    labels = [label for label, _ in found.values()]
    if not labels or len(set(labels)) < len(labels) or not 0 < min(labels) <= max(labels) < 1 << 16:
        raise UnsupportedFormatError(f"{path}: expected segments with different labels from 1 to 65535, found {listed(labels)}")
    return found


def _require_same_identity(path: Path, dataset: Any, like: Path, other: Any) -> None:
    """Raise InputError if two files are of different patients or frames of reference; a missing value is no difference."""
    for keyword, name in _IDENTITY.items():
        values = [str(source.get(keyword) or "").strip() for source in (dataset, other)]
        if all(values) and values[0] != values[1]:
            expected, found = (shorten(value) for value in values[::-1])
            raise InputError(
                f"{path} and {like} are of different {name}\n  {keyword}: expected {expected!r} as in {like}, found {found!r} in {path}\n"
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
        _require_same_identity(path, dataset, like, series.first)
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
        difference = describe_difference(path, shape, affine, like, series.shape[::-1], grid)
        raise GridMismatchError(f"{path}: not on the grid of --like\n{difference}\n  Name the series that it was made on.")
    whole = np.zeros(series.shape, stored.dtype)
    whole[tuple(slice(start, start + size) for start, size in zip(offset[::-1], stored.shape, strict=True))] = stored
    return whole


def _write(path: Path, request: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
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
        written = highdicom.seg.Segmentation(
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
    written.save_as(buffer)
    return {}, buffer.getvalue()


def _complete(file: Path, source: Any, first: Any, thickness: float) -> None:
    """Give a header what highdicom asks for; raise InputError if a segmentation cannot refer to its file."""
    lacking = [keyword for keyword in _REFERENCED if not source.get(keyword)]
    if lacking:
        raise InputError(
            f"{file}: a DICOM segmentation refers to its series, and this file has no {' and no '.join(lacking)}\n"
            "  De-identification may replace these values, but not empty them: set them in the files, or keep the NIfTI file."
        )
    for keyword in _MAY_BE_EMPTY:
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
