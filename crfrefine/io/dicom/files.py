"""The files of a folder of DICOM: what each is, and which are the slices of a series."""

from __future__ import annotations

import resource
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydicom

from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import counted, listed, shorten
from crfrefine.errors import CapacityError, CrfRefineError, InputError, UnsupportedFormatError
from crfrefine.io.formats import STRUCTURES_ADVICE
from crfrefine.io.streams import MAX_RATIO, cut_off

pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

# Limit of this process's processor time, if it only converts; each million bytes of its files adds
# a second.
seconds: int | None = None
# Limit of its memory in bytes then; 32 for each voxel and 4 for each byte of its files are added.
MEMORY = 1 << 30

STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"
DIRECTORY = "1.2.840.10008.1.3.10"
_SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
# What to do with files that are no slices, by their class; of several classes the first one counts.
_ADVICE = {
    STRUCTURE_SET: STRUCTURES_ADVICE,
    DIRECTORY: "a DICOMDIR lists files in other folders: name the folder of one series",
    **dict.fromkeys(_SEGMENTATIONS, "name the file of the segmentation"),
}
_DOSE = "1.2.840.10008.5.1.4.1.1.481.2"
_SMALL = 1 << 26  # Bytes of voxels that a compressed file of any size may hold.
_IDENTITY = {"PatientID": "patients", "FrameOfReferenceUID": "frames of reference"}
_MAX_SERIES = 20  # are listed


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Turn exceptions into errors that name the file: damage shows as an exception of any kind."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except CrfRefineError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: no such file or folder") from None
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


def limit(path: Path, files: Iterable[Path], num_voxels: int = 0, bits: int = 0) -> None:
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


def text_of(dataset: Any, keyword: str) -> str:
    """Return the text of an element; "" for none, or an empty one."""
    value = dataset.get(keyword)
    return "" if value is None else str(value).strip()


def class_of(dataset: Any) -> str:
    """Return the class of a file, such as 1.2.840.10008.5.1.4.1.1.2 of a slice of CT."""
    meta = getattr(dataset, "file_meta", None) or {}
    return text_of(dataset, "SOPClassUID") or text_of(meta, "MediaStorageSOPClassUID")


def class_name(dataset: Any) -> str:
    """Return the name of a file's kind, such as "CT Image" or "RT Structure Set"."""
    uid = pydicom.uid.UID(class_of(dataset))
    if not uid:
        return "no DICOM"
    return shorten(uid.name).removesuffix(" Storage")


def is_segmentation(dataset: Any) -> bool:
    """Return whether a file is a segmentation."""
    return class_of(dataset) in _SEGMENTATIONS


def read_file(path: Path, *, is_expected: bool = True) -> Any:
    """Return the header of a file; it is empty for another format, which may be an error."""
    try:
        return pydicom.dcmread(path, stop_before_pixels=True)
    except pydicom.errors.InvalidDicomError:
        if is_expected:
            raise UnsupportedFormatError(f"{path}: not a DICOM file") from None
        return pydicom.Dataset()


def read_headers(path: Path) -> dict[Path, Any]:
    """Return the header of a file, or of each file of a folder; empty for other formats there."""
    files = [path]
    if path.is_dir():
        entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        files = sorted(filter(Path.is_file, entries))
    limit(path, files)
    headers = {}
    for file in files:
        headers[file] = read_file(file, is_expected=file.suffix.lower() == ".dcm" or file == path)
    return headers


def group_slices(headers: Mapping[Path, Any]) -> dict[str, dict[Path, Any]]:
    """Return the files with slices of each series; localizers only if there is nothing else."""
    slices = {file: dataset for file, dataset in headers.items() if _may_be_slice(dataset)}
    placed = {}  # Screenshots do not say where they are.
    for file, dataset in slices.items():
        if "ImageOrientationPatient" in dataset or "PerFrameFunctionalGroupsSequence" in dataset:
            placed[file] = dataset
    slices = placed or slices
    wanted = {file: dataset for file, dataset in slices.items() if _is_no_localizer(dataset)}
    slices = wanted or slices
    series: dict[str, dict[Path, Any]] = {}
    for file, dataset in slices.items():
        series.setdefault(text_of(dataset, "SeriesInstanceUID"), {})[file] = dataset
    return series


def _may_be_slice(dataset: Any) -> bool:
    """Return whether a file has pixels that may be an image's."""
    return "Rows" in dataset and class_of(dataset) not in (*_SEGMENTATIONS, _DOSE)


def _is_no_localizer(dataset: Any) -> bool:
    return "LOCALIZER" not in (dataset.get("ImageType") or ())


def find_series(path: Path, uid: str | None, notes: list[Note]) -> dict[Path, Any]:
    """Return the headers of a series' files, or of the one file; notes name the files left out.

    The series is the one with this UID, or the only one. Raise InputError for several, or none.
    """
    headers = read_headers(path)
    series = group_slices(headers)
    if not series:
        classes = {class_of(dataset): class_name(dataset) for dataset in headers.values()}
        advice = [text for kind, text in _ADVICE.items() if kind in classes]
        advice.append("name the folder of the series")
        raise InputError(
            f"{path}: expected the slices of a DICOM series or a segmentation, found "
            f"{listed(classes.values()) or 'no files'}; {advice[0]}"
        )
    if uid is None and len(series) > 1:
        raise InputError(
            f"{path}: expected one series, found {len(series)}; choose one with --series UID"
            f"{describe_all(series)}"
        )
    chosen = series.get(uid or next(iter(series)))
    if chosen is None:
        raise InputError(
            f"{path}: has no series {shorten(uid)}; expected one of{describe_all(series)}"
        )
    left_out: dict[str, list[str]] = {}
    for file, dataset in headers.items():
        if file in chosen:
            continue
        kind = class_name(dataset)
        if not _is_no_localizer(dataset):
            kind = f"localizer, {kind}"
        elif _may_be_slice(dataset):
            kind += f" of series {text_of(dataset, 'SeriesInstanceUID')}"
        left_out.setdefault(kind, []).append(file.name)
    for kind, names in left_out.items():
        notes.append(NoteKind.DICOM_LEFT_OUT(files=len(names), what=kind, first=names[0]))
    return chosen


def describe_all(series: Mapping[str, Mapping[Path, Any]]) -> str:
    """Return an indented line about each series."""
    lines = [f"\n  {describe_series(files)}" for files in series.values()]
    if len(lines) > _MAX_SERIES:
        lines[_MAX_SERIES:] = [f"\n  and {len(lines) - _MAX_SERIES} more"]
    return "".join(lines)


def describe_series(files: Mapping[Path, Any]) -> str:
    """Return UID, modality, number, description and size of a series, and one of its files."""
    file, first = next(iter(files.items()))
    uid = text_of(first, "SeriesInstanceUID") or "no UID"
    num_slices = sum(int(dataset.get("NumberOfFrames") or 1) for dataset in files.values())
    words = [text_of(first, "Modality"), text_of(first, "SeriesNumber")]
    words.append(repr(shorten(text_of(first, "SeriesDescription"))))
    shown = shorten(" ".join(filter(None, words)))
    noun = "slice"
    if is_segmentation(first):
        noun = "frame"
    elif "Rows" not in first:  # contours, a report
        noun = "file"
    return f"{uid}  {shown}, {counted(num_slices, noun)}, such as {shorten(file.name)}"


def require_same_identity(path: Path, dataset: Any, like: Path, other: Any) -> None:
    """Raise InputError if two files state different patients or frames of reference."""
    for keyword, name in _IDENTITY.items():
        found = text_of(dataset, keyword)
        expected = text_of(other, keyword)
        if found and expected and found != expected:
            raise InputError(
                f"{path} and {like} are of different {name}\n"
                f"  {keyword}: expected {shorten(expected)!r} as in {like}, "
                f"found {shorten(found)!r} in {path}\n"
                "  Name the files of one patient, whose segmentation was made on this series."
            )


def groups_in(frame: Any, names: Sequence[str]) -> list[Any]:
    """Return these functional groups of a frame."""
    sequences = [frame[name].value for name in names if name in frame]
    return [sequence[0] for sequence in sequences if sequence]
