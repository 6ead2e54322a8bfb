"""The slices of a series, and the volume that they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels.processing import apply_modality_lut
from pydicom.pixels.utils import iter_pixels

from crfrefine.base.array_types import Array, Float64
from crfrefine.base.geometry import usable_spacing
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import listed, shorten
from crfrefine.errors import InputError, UnsupportedFormatError
from crfrefine.io.dicom.files import decoding, find_series, groups_in, limit
from crfrefine.io.stored import smallest_integer
from crfrefine.io.text_header import LPS, affine_of
from crfrefine.io.volume import VolumeHeader

# Functional groups with the elements of a slice, and those that tell slices at one place apart.
_GROUPS = (
    *("PixelMeasuresSequence", "PlaneOrientationSequence"),
    *("PlanePositionSequence", "PixelValueTransformationSequence"),
    *("FrameContentSequence", "TemporalPositionSequence", "CardiacSynchronizationSequence"),
    *("MREchoSequence", "MRDiffusionSequence", "MRImageFrameTypeSequence"),
    *("CTReconstructionSequence", "CTImageFrameTypeSequence", "CTXRayDetailsSequence"),
)
# Elements that tell slices at one place apart, the most telling first.
_TELLING = (
    *("EchoNumbers", "EchoTime", "EffectiveEchoTime", "TemporalPositionIdentifier"),
    *("TemporalPositionIndex", "TemporalPositionTimeOffset", "NominalPercentageOfCardiacPhase"),
    *("TriggerTime", "NominalCardiacTriggerDelayTime", "DiffusionBValue", "InversionTime"),
    *("FlipAngle", "KVP", "ConvolutionKernel", "ReconstructionDiameter", "ImageType", "FrameType"),
    *("ComplexImageComponent", "AcquisitionNumber", "AcquisitionTime", "ContentTime"),
    *("SeriesTime", "InstanceNumber", "ImagePositionPatient"),
)
_MAX_TELLING = 3  # are named
# Distances of slices, and deviations from an even row, as parts of the usual step; and an angle.
_SAME_PLACE = 1e-3
_UNEVEN = 0.1
_MAX_TILT = 2.0


def volume_of(
    path: Path, kind: str, shape: Sequence[int], affine: Float64, notes: Sequence[Note]
) -> VolumeHeader:
    """Return the header of voxels, (slices, rows, columns), whose affine has to be usable."""
    spacing = usable_spacing(affine, 3, path)
    grid_shape = tuple(shape)[::-1]
    return VolumeHeader(path, kind, grid_shape, 1, "float32", spacing, affine, notes=tuple(notes))


class _Slice:
    """A slice, by its header."""

    def __init__(self, file: Path, name: str, sources: Sequence[Any]) -> None:
        """Read where a slice is.

        Of the `sources` of its elements, the first that has one counts; the last one is the header
        of its file. `name` is for people. Raise UnsupportedFormatError if it has no place.
        """
        self.name = name
        self._sources = sources
        dataset = sources[-1]
        self.header = dataset  # of its file
        self.size = (int(dataset.Rows), int(dataset.Columns))
        spacing = np.array([*self.element("PixelSpacing")], float)
        axes = np.array([*self.element("ImageOrientationPatient")], float)
        # the center of the first voxel, in LPS
        self.position = np.array([*self.element("ImagePositionPatient")], float)
        slope = float(self.element("RescaleSlope") or 1)
        intercept = float(self.element("RescaleIntercept") or 0)
        self.scaling = (slope, intercept)
        distance = self.element("SpacingBetweenSlices") or self.element("SliceThickness")
        self.thickness = abs(float(distance or 0))  # mm; 0 if unknown

        numbers = [*spacing, *axes, *self.position]
        is_placed = (len(spacing), len(axes), len(self.position)) == (2, 6, 3)
        is_placed = is_placed and bool(np.isfinite(numbers).all())
        if is_placed:
            axes = axes.reshape(2, 3)
            tilt = np.abs(np.inner(axes, axes) - np.eye(2)).max()
            is_placed = bool(spacing.min() > 0 and tilt <= 0.02)
        if not is_placed:
            raise UnsupportedFormatError(
                f"{file}: {name} has no place in the world, or it is damaged: "
                "its orientation, position or spacing is no geometry; "
                "expected slices such as of CT, MR or PET"
            )
        self.spacing = spacing.tolist()  # mm between rows, and between columns
        self.axes = axes  # the directions along a row and along a column, as rows, in LPS

    @classmethod
    def of_file(cls, file: Path, dataset: Any) -> list[Self]:
        """Return the slices of a file by its header: one, or one of each frame."""
        # The functional groups of each frame; a file of one slice has no frames.
        frames = dataset.get("PerFrameFunctionalGroupsSequence") or [()]
        if len(frames) != int(dataset.get("NumberOfFrames") or 1):
            raise UnsupportedFormatError(
                f"{file}: several frames that do not say where they are; convert the file with "
                "dcm2niix"
            )
        if dataset.get("SamplesPerPixel", 1) != 1:
            raise UnsupportedFormatError(f"{file}: expected one number per voxel, found colors")
        shared = (dataset.get("SharedFunctionalGroupsSequence") or [()])[0]
        slices = []
        for number, frame in enumerate(frames, 1):
            name = file.name if len(frames) == 1 else f"frame {number} of {file.name}"
            groups = [*groups_in(frame, _GROUPS), *groups_in(shared, _GROUPS)]
            slices.append(cls(file, name, [*groups, dataset]))
        return slices

    @property
    def plane(self) -> list[float]:
        """Sizes, voxel sizes and directions, which are equal for all slices of a volume."""
        return [*map(float, self.size), *self.spacing, *self.axes.reshape(-1).tolist()]

    def element(self, keyword: str) -> Any:
        """Return the value of an element; () for none, or an empty one."""
        for source in self._sources:
            if keyword in source:
                value = source[keyword].value
                return () if value is None or value == "" else value  # 0 is a value.
        return ()


class Series:
    """The files of a series, and its grid."""

    def __init__(self, path: Path, uid: str | None = None) -> None:
        """Read the headers of a series, which a folder may hold beside others; raise as `read`."""
        with decoding(path):
            notes: list[Note] = []
            self.datasets = find_series(path, uid, notes)  # by file, without pixels
            self.slices: list[_Slice] = []  # in the order of the files
            for file, dataset in self.datasets.items():
                self.slices += _Slice.of_file(file, dataset)
            slices = self.slices
            if len(slices) > len(self.datasets) > 1:
                raise InputError(
                    f"{path}: expected one file of several frames, found {len(self.datasets)}; "
                    "convert each by itself"
                )

            first = slices[0]
            planes = np.array([part.plane for part in slices])
            tolerances = np.repeat([0.0, 1e-3 * min(first.spacing), 1e-3], [2, 2, 6])
            differs = (np.abs(planes - planes[0]) > tolerances).any(axis=1)
            if differs.any():
                other = slices[int(differs.argmax())]
                raise InputError(
                    f"{path}: slices of different sizes, voxel sizes or orientations: "
                    f"{first.name} has {first.plane}, {other.name} has {other.plane}; "
                    "a localizer? Give each volume a folder of its own"
                )
            if len(slices) == 1 and not first.thickness:
                notes.append(NoteKind.NO_THICKNESS())
            axes = first.axes / np.linalg.norm(first.axes, axis=1, keepdims=True)
            # `order` has the numbers of the slices along their normal.
            self.order, step = _stack(path, slices, normal=np.cross(*axes))
            down, right = first.spacing
            vectors = np.column_stack([axes[0] * right, axes[1] * down, step])
            affine = affine_of(vectors, slices[self.order[0]].position, LPS)
            shape = (len(slices), *first.size)
            self.header = volume_of(path, "DICOM series", shape, affine, notes)

    @property
    def first(self) -> Any:
        """The first of the datasets."""
        return next(iter(self.datasets.values()))

    def read_voxels(self) -> Array:
        """Return the scaled values, (slices along the normal, rows, columns)."""
        path = self.header.path
        shape = self.header.stored_grid
        limit(path, self.datasets, math.prod(shape), int(self.first.BitsAllocated))
        # Series with 32 bits need float64 before they are written.
        dtype = np.float32 if int(self.first.BitsStored) <= 16 else np.float64
        array = np.empty(shape, dtype)
        places = np.argsort(self.order)
        frames = chain.from_iterable(iter_pixels(pydicom.dcmread(file)) for file in self.datasets)
        for place, part, frame in zip(places, self.slices, frames, strict=True):
            if "ModalityLUTSequence" in part.header:
                array[place] = apply_modality_lut(frame, part.header)
            else:
                slope, intercept = np.array(part.scaling, array.dtype)
                array[place] = frame * slope + intercept
        if not np.isfinite(array).all():
            raise InputError(f"{path}: expected finite values, found NaN or infinite ones")
        if (array == np.rint(array)).all():
            types = ("int16", "uint16", "int32")
            integer = smallest_integer(types, float(array.min()), float(array.max()))
            if integer is not None:
                return array.astype(integer)
        return array.astype(np.float32, copy=False)


def _stack(
    path: Path, slices: Sequence[_Slice], normal: Float64
) -> tuple[NDArray[np.intp], Float64]:
    """Return the order of evenly spaced slices along their normal, and the step between them."""
    positions = np.array([part.position for part in slices])
    places = positions @ normal
    order = np.argsort(places, kind="stable")
    if len(slices) == 1:
        return order, normal * (slices[0].thickness or 1.0)

    positions = positions[order]
    distances = np.diff(places[order])
    apart = distances[distances > 1e-6]
    usual = float(np.median(apart)) if apart.size else 0.0
    is_same = distances <= max(_SAME_PLACE * usual, 1e-6)
    if is_same.any():
        first = int(is_same.argmax())
        below, above = (slices[number] for number in order[first : first + 2])
        differences = []
        for keyword in _TELLING:
            values = sorted(shorten(part.element(keyword)) for part in (below, above))
            if values[0] != values[1]:
                differences.append(f"{keyword} ({values[0]} and {values[1]})")
        shown = listed(differences[:_MAX_TELLING])
        if not differences:
            shown = "no element that tells echoes, times or reconstructions apart: copies?"
        raise InputError(
            f"{path}: expected one slice at each place, found {len(slices)} slices at "
            f"{len(slices) - int(is_same.sum())} places: {below.name} and {above.name} are at the "
            f"same one\n  They differ in {shown}\n"
            "  Is there a second echo, time or reconstruction? Give each volume a folder of its "
            "own; dcm2niix separates them."
        )
    step = (positions[-1] - positions[0]) / len(distances)
    row = positions[0] + np.arange(len(slices))[:, np.newaxis] * step
    deviation = np.linalg.norm(positions - row, axis=1).max()
    tilt = np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1.0, 1.0)))
    if deviation > _UNEVEN * usual or tilt > _MAX_TILT:
        worst = int(np.abs(distances - usual).argmax())
        below, above = (slices[number] for number in order[worst : worst + 2])
        raise InputError(
            f"{path}: expected slices straight above each other, evenly spaced; "
            f"found most of them {usual:.4g} mm apart, "
            f"{below.name} and {above.name} {distances[worst]:.4g} mm, and a tilt of {tilt:.1f} "
            "degrees\n"
            "  Is there a gap, or are there two volumes? Give each a folder of its own.\n"
            "  dcm2niix resamples uneven slices, and straightens those of a tilted gantry."
        )
    return order, step
