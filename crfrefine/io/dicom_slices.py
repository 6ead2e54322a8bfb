"""The slices of a DICOM series, files or frames of a file: which belong to it, in which order, and where they are in the world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.text import counted, listed, printable, shorten
from crfrefine.errors import InputError, UnsupportedFormatError
from crfrefine.io.dicom_files import interpreting, read_dataset
from crfrefine.io.dicom_identity import KEYWORDS, DicomIdentity, differences, identity_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

_KEYWORDS = (
    *KEYWORDS,
    *(
        "SOPClassUID",
        "SOPInstanceUID",
        "Modality",
        "SeriesInstanceUID",
        "SeriesDescription",
        "InstanceNumber",
        "NumberOfSeriesRelatedInstances",
    ),
    *("ImagesInAcquisition", "NumberOfFrames", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("Rows", "Columns", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SpacingBetweenSlices", "SliceThickness"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel", "PhotometricInterpretation"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
)
_GROUPS = {
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "SpacingBetweenSlices": "PixelMeasuresSequence",
    "SliceThickness": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
}
"""The group in which a file of several frames keeps what a file of one slice has at its top level: for each frame, or once for all."""

_SAME_PLACE = 1e-3
"""Slices that are nearer to each other, as a part of the usual step, are at one place."""

_UNEVEN = 0.01
"""Deviation of a slice from its place in an even row, as a part of the step, above which a note is written."""

_TOO_UNEVEN = 0.1
"""The same, above which the series is refused."""

_MOST_SLICES = 1 << 16


@dataclass(frozen=True)
class Slice:
    """A file of a series, or a frame of one."""

    path: Path  # the file
    frame: int | None  # its number in a file of several, from 0; None: the file has one slice
    sop_class: str  # UID of the kind of file; "" if the file has none, and so for the two below
    modality: str  # such as CT
    instance: str  # UID of the file
    series: str  # UID of its series
    title: str  # description of the series
    identity: DicomIdentity  # patient, study and frame of reference
    shape: tuple[int, int]  # (rows, columns)
    position: NDArray[np.float64]  # (3,) center of the first voxel in LPS, mm
    orientation: NDArray[np.float64]  # (2, 3) directions along a row and along a column in LPS, of length 1
    spacing: tuple[float, float]  # mm between rows, between columns
    thickness: float | None  # mm from slice to slice, if the file says so
    stored: np.dtype[Any]  # type of the stored numbers
    bits: tuple[int, int]  # number of bits that count, and the number of the highest one
    slope: float  # value = stored * slope + intercept
    intercept: float  # see `slope`
    syntax: str  # UID of the transfer syntax
    is_compressed: bool  # whether it compresses the pixels
    number: int | None  # of the instance in the series, if given
    promised: int | None  # number of instances of the series, if given
    in_acquisition: int | None  # number of images of the acquisition, if given

    @property
    def name(self) -> str:
        """For people."""
        return self.path.name if self.frame is None else f"frame {self.frame + 1} of {self.path.name}"

    @property
    def normal(self) -> NDArray[np.float64]:
        """The direction across the slice, in LPS."""
        normal: NDArray[np.float64] = np.cross(self.orientation[0], self.orientation[1])
        return normal


@dataclass(frozen=True)
class Series:
    """Slices in the order of their places along the normal."""

    slices: tuple[Slice, ...]  # at least one
    affine: NDArray[np.float64]  # (4, 4) voxel (column, row, slice) to world RAS+ mm
    identity: DicomIdentity  # patient, study and frame of reference, as far as any slice says
    notes: tuple[str, ...]  # facts that users should know


def read_slices(path: Path) -> list[Slice]:
    """Read the header of a file; no slice if it holds no image, such as structures of radiotherapy.

    Raises:
        UnsupportedFormatError: damaged, colors, or a slice without a place in the world.
    """
    with interpreting(path):
        found = read_dataset(path, _KEYWORDS)
        if "Rows" not in found:
            if "SOPClassUID" not in found:
                raise UnsupportedFormatError(f"{path}: damaged DICOM file: it does not say what it is (no SOPClassUID)")
            return []
        if int(found.get("SamplesPerPixel") or 1) != 1 or found.get("ModalityLUTSequence"):
            raise UnsupportedFormatError(f"{path}: colors or a table of values; expected one number per voxel with slope and intercept")
        return [_interpret(path, found, frame, values) for frame, values in _frames(path, found)]


def _frames(path: Path, found: Any) -> list[tuple[int | None, Any]]:
    """Return the frames of a file, each with its number and what has the elements of `_GROUPS`; (None, the file) if it has one slice."""
    count = int(found.get("NumberOfFrames") or 1)
    if "PerFrameFunctionalGroupsSequence" not in found:
        if count > 1:
            raise UnsupportedFormatError(f"{path}: several frames that do not say where they are; convert the file with dcm2niix")
        return [(None, found)]
    frames = found.PerFrameFunctionalGroupsSequence
    if len(frames) != count:
        raise UnsupportedFormatError(f"{path}: damaged DICOM file: {count} frames, of which {len(frames)} are described")
    shared = (found.get("SharedFunctionalGroupsSequence") or [{}])[0]
    return [(number, _values(frame, shared)) for number, frame in enumerate(frames)]


def _values(frame: Any, shared: Any) -> dict[str, Any]:
    """Return the elements of `_GROUPS` that a frame has, or shares with the others."""
    groups = {name: (frame.get(name) or shared.get(name) or [{}])[0] for name in set(_GROUPS.values())}
    return {keyword: groups[name].get(keyword) for keyword, name in _GROUPS.items()}


def _interpret(path: Path, found: Any, frame: int | None, values: Any) -> Slice:
    lacking = [name for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing") if not values.get(name)]
    if lacking:
        raise UnsupportedFormatError(
            f"{path}: no {' and no '.join(lacking)}; expected slices with a place in the world, such as of CT or MR"
        )
    allocated, is_signed = int(found.BitsAllocated), int(found.get("PixelRepresentation") or 0)
    bits = int(found.get("BitsStored") or allocated)
    high = int(bits - 1 if found.get("HighBit") is None else found.HighBit)
    if allocated not in (8, 16, 32) or not 1 <= bits <= allocated or not bits - 1 <= high < allocated:
        raise UnsupportedFormatError(f"{path}: {bits} of {allocated} bits, the highest is number {high}; expected 8, 16 or 32 bits")
    syntax = found.file_meta.TransferSyntaxUID
    order = "<" if syntax.is_little_endian else ">"
    orientation = np.array([float(value) for value in values.get("ImageOrientationPatient")], np.float64).reshape(2, 3)
    position = np.array([float(value) for value in values.get("ImagePositionPatient")], np.float64).reshape(3)
    lengths = np.sqrt((orientation**2).sum(axis=1))
    spacing = tuple(float(value) for value in values.get("PixelSpacing"))
    numbers = [*orientation.flat, *position, *spacing, slope := _number(values, "RescaleSlope", 1.0)]
    numbers += [intercept := _number(values, "RescaleIntercept", 0.0)]
    if not (np.isfinite(numbers).all() and np.abs(lengths - 1).max() < 0.01 and abs(orientation[0] @ orientation[1]) < 0.01):
        raise UnsupportedFormatError(f"{path}: damaged DICOM file: its orientation, position, spacing or scaling is no geometry")
    if len(spacing) != 2 or min(spacing) <= 0 or slope == 0 or min(found.Rows, found.Columns) < 1:
        raise UnsupportedFormatError(f"{path}: damaged DICOM file: expected two spacings, sizes above 0 and a slope other than 0")
    thickness = abs(_number(values, "SpacingBetweenSlices", 0.0)) or _number(values, "SliceThickness", 0.0)
    # A file of several frames has one number for all of them.
    number, in_acquisition = (found.get(keyword) if frame is None else None for keyword in ("InstanceNumber", "ImagesInAcquisition"))
    promised = found.get("NumberOfSeriesRelatedInstances")
    return Slice(
        path=path,
        frame=frame,
        sop_class=str(found.get("SOPClassUID") or ""),
        modality=str(found.get("Modality") or ""),
        instance=str(found.get("SOPInstanceUID") or ""),
        series=str(found.get("SeriesInstanceUID") or ""),
        title=printable(str(found.get("SeriesDescription") or "")),
        identity=identity_of(found),
        shape=(int(found.Rows), int(found.Columns)),
        position=position,
        orientation=orientation / lengths[:, np.newaxis],
        spacing=(spacing[0], spacing[1]),
        thickness=thickness if 0 < thickness < np.inf else None,
        stored=np.dtype(f"{order}{'i' if is_signed else 'u'}{allocated // 8}"),
        bits=(bits, high),
        slope=slope,
        intercept=intercept,
        syntax=str(syntax),
        is_compressed=bool(syntax.is_encapsulated),
        number=None if number is None else int(number),
        promised=None if promised is None else int(promised),
        in_acquisition=None if in_acquisition is None else int(in_acquisition),
    )


def _number(found: Any, keyword: str, default: float) -> float:
    value = found.get(keyword)
    return default if value is None or value == "" else float(value)


def arrange(folder: Path, slices: Sequence[Slice]) -> Series:
    """Check that files are the slices of one volume, and put them in order.

    Args:
        folder: for errors.
        slices: at least one.

    Raises:
        InputError: several series, slices of different sizes or orientations, two slices at one place, gaps, or fewer files than
            the series has.
    """
    if len(slices) > _MOST_SLICES:
        raise InputError(f"{folder}: {len(slices)} slices; at most {_MOST_SLICES} can be read")
    _require_one_series(folder, slices)
    first = slices[0]
    identity = first.identity
    for other in slices[1:]:
        _require_alike(folder, first, other)
        found = differences(identity, other.identity)
        if found:
            raise InputError(f"{folder}: slices that differ in {' and '.join(found)}: {other.path.name} has others than those before it")
        identity = DicomIdentity(*(own or others for own, others in zip(identity.values, other.identity.values, strict=True)))
    notes = []
    numbers = sorted({one.number for one in slices if one.number is not None})
    promised = max((one.promised or 0 for one in slices), default=0)
    num_files = len({one.path for one in slices})
    if promised > num_files:
        raise InputError(
            f"{folder}: incomplete series: its files, such as {first.path.name}, say that it has {promised} images, "
            f"{num_files} are there; copy or export it again"
        )
    # No error: manufacturers also count the images of other series that were made of the same acquisition.
    in_acquisition = max((one.in_acquisition or 0 for one in slices), default=0)
    if in_acquisition > len(slices):
        notes.append(
            f"the files say that their acquisition has {in_acquisition} images, {len(slices)} are here: slices at the ends may be missing, "
            "unless other series were made of it"
        )
    if numbers and not 0 <= numbers[0] <= 1:
        notes.append(f"the series begins with instance {numbers[0]}: slices before it may be missing")
    normal = first.normal
    ordered = sorted(slices, key=lambda one: float(one.position @ normal))
    step, told = _step(folder, ordered)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = first.orientation[0] * first.spacing[1], first.orientation[1] * first.spacing[0]
    affine[:3, 2], affine[:3, 3] = step, ordered[0].position
    return Series(tuple(ordered), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine + 0.0, identity, (*notes, *told))


def _require_one_series(folder: Path, slices: Sequence[Slice]) -> None:
    by_series: dict[str, list[Slice]] = {}
    for one in slices:
        by_series.setdefault(one.series, []).append(one)
    if len(by_series) == 1:
        return
    found = [
        f"{counted(len(several), 'file')} such as {several[0].path.name}" + (f" ({several[0].title})" if several[0].title else "")
        for several in by_series.values()
    ]
    raise InputError(
        f"{folder}: {len(by_series)} series in one folder: {listed([shorten(text, 120) for text in found], 5)}\n"
        "  Give each series a folder of its own: CASE, or CASE_0000, CASE_0001 for modalities."
    )


def _require_alike(folder: Path, first: Slice, other: Slice) -> None:
    pair = f"{first.name} and {other.name}"
    if first.shape != other.shape:
        sizes = " and ".join(f"{one.shape[1]} x {one.shape[0]}" for one in (first, other))
        raise InputError(f"{folder}: slices of different sizes: {pair} have {sizes} voxels")
    if np.abs(first.orientation - other.orientation).max() > 1e-3:
        raise InputError(f"{folder}: two orientations in one series: {pair} are not parallel; give each a folder of its own (a localizer?)")
    if np.abs(np.subtract(first.spacing, other.spacing)).max() > 1e-3 * min(first.spacing):
        raise InputError(f"{folder}: slices with different voxel sizes: {pair} have {first.spacing} and {other.spacing} mm")


def _step(folder: Path, ordered: Sequence[Slice]) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Return the vector from slice to slice, and notes about it."""
    first = ordered[0]
    if len(ordered) == 1:
        if first.thickness is None:
            return first.normal, ("a single slice without thickness; 1 mm is assumed",)
        return first.normal * first.thickness, ()
    positions = np.array([one.position for one in ordered])
    places = positions @ first.normal
    steps = np.diff(places)
    usual = float(np.median(steps))
    nearest = int(steps.argmin())
    if steps[nearest] <= max(_SAME_PLACE * usual, 1e-6):
        pair = f"{ordered[nearest].name} and {ordered[nearest + 1].name}"
        way_out = "Give each volume a folder of its own" if ordered[nearest].frame is None else "dcm2niix takes such files apart"
        raise InputError(f"{folder}: two slices at one place: {pair}; a second echo, time or reconstruction? {way_out}")
    farthest = int(steps.argmax())
    if steps[farthest] > (1 + 5 * _TOO_UNEVEN) * usual:
        pair = f"{ordered[farthest].name} and {ordered[farthest + 1].name}"
        raise InputError(
            f"{folder}: a gap in the series: {pair} are {steps[farthest]:.4g} mm apart, other slices {usual:.4g} mm; "
            "slices are missing between them, copy or export the series again"
        )
    step = (positions[-1] - positions[0]) / (len(ordered) - 1)
    off = np.sqrt(((positions - positions[0] - np.arange(len(ordered))[:, np.newaxis] * step) ** 2).sum(axis=1)) / usual
    worst = int(off.argmax())
    if off[worst] > _TOO_UNEVEN:
        raise InputError(
            f"{folder}: slices are not evenly spaced: {ordered[worst].name} is {off[worst] * usual:.3g} mm away from "
            f"its place in a row of steps of {usual:.4g} mm; resample the series with dcm2niix"
        )
    if off[worst] > _UNEVEN:
        return step, (f"slices are not quite evenly spaced: {ordered[worst].name} is {off[worst] * usual:.2g} mm off",)
    return step, ()
