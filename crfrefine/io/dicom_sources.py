"""The files of a series as highdicom needs them for a segmentation that refers to them, and the check that it takes them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.text import shorten
from crfrefine.errors import InputError
from crfrefine.io.dicom_files import interpreting, read_dataset
from crfrefine.io.dicom_identity import KEYWORDS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.io.dicom_series import SeriesTemplate
    from crfrefine.io.dicom_slices import Slice

_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
)
"""Attributes of type 2 of the standard: in every file, but perhaps without a value. De-identification removes them."""

OTHER_FORMATS = "write another format, such as .nii.gz or .seg.nrrd"


def require_references(path: Path, template: SeriesTemplate) -> None:
    """Raise InputError if the files of a series lack what a segmentation refers to.

    Args:
        path: of the segmentation.
        template: the series.
    """
    slices, identity = template.slices, template.identity
    given = {
        "StudyInstanceUID": identity.study,
        "SeriesInstanceUID": slices[0].series,
        "FrameOfReferenceUID": identity.frame,
        "SOPInstanceUID": all(one.instance for one in slices),
    }
    lacking = [keyword for keyword, value in given.items() if not value]
    folder = slices[0].path.parent
    if lacking:
        raise InputError(
            f"{path}: a DICOM segmentation refers to its series, and that in {folder} has no {' and no '.join(lacking)}; {OTHER_FORMATS}"
        )
    if slices[0].frame is not None and len({one.path for one in slices}) > 1:
        raise InputError(f"{path}: a DICOM segmentation of several files with several frames each, in {folder}; {OTHER_FORMATS}")


def require_accepted(path: Path, template: SeriesTemplate, highdicom: Any) -> None:
    """Raise InputError if highdicom does not make a segmentation of the first slice, such as for values that the standard does not allow.

    Args:
        path: of the segmentation.
        template: the series.
        highdicom: the module.
    """
    (source, *_) = _sources(template, template.slices[:1])
    if "PerFrameFunctionalGroupsSequence" in source:
        source.PerFrameFunctionalGroupsSequence, source.NumberOfFrames = source.PerFrameFunctionalGroupsSequence[:1], 1
    pixels = np.zeros((1, *template.slices[0].shape), np.uint8)
    pixels[0, 0, 0] = 1
    tissue = highdicom.sr.CodedConcept("85756007", "SCT", "Tissue")
    segment = highdicom.seg.SegmentDescription(1, "Label 1", tissue, tissue, highdicom.seg.SegmentAlgorithmTypeValues.MANUAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            highdicom.seg.Segmentation(
                *([source], pixels, highdicom.seg.SegmentationTypeValues.BINARY, [segment]),
                *(highdicom.UID(), 1, highdicom.UID(), 1, "crfrefine", "crfrefine", "0", "0"),
            )
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise refused(path, template, error) from None


def refused(path: Path, template: SeriesTemplate, error: Exception) -> InputError:
    """Return the error for a series that highdicom does not accept."""
    return InputError(
        f"{path}: highdicom refuses to write a segmentation of the series in {template.slices[0].path.parent}: {shorten(error, 200)}; "
        f"{OTHER_FORMATS}"
    )


def read_sources(template: SeriesTemplate, labels: NDArray[Any]) -> tuple[list[Any], NDArray[Any]]:
    """Return the data sets of a series, and a label map, (slices, rows, columns), in the order of their frames."""
    sources = _sources(template, template.slices)
    frames = [one.frame for one in template.slices if one.frame is not None]
    return sources, labels[np.argsort(frames)] if frames else labels


def _sources(template: SeriesTemplate, slices: tuple[Slice, ...]) -> list[Any]:
    sources: list[Any] = []
    for path in dict.fromkeys(one.path for one in slices):
        with interpreting(path):
            source = read_dataset(path, None)
            for keyword in _MAY_BE_EMPTY:
                if keyword not in source:
                    setattr(source, keyword, None)
            # One file of a series may lack what the others have, and orientations may differ by rounding; highdicom wants them equal.
            for keyword, value in zip(KEYWORDS, template.identity.values, strict=True):
                setattr(source, keyword, value)
            if "PerFrameFunctionalGroupsSequence" in source:
                _share_groups(source)
            elif sources:
                source.ImageOrientationPatient = sources[0].ImageOrientationPatient
            measures = source if slices[0].frame is None else source.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
            if measures.get("SliceThickness") is None:
                measures.SliceThickness = f"{_step(template.slices):.10g}"
        sources.append(source)
    return sources


def _step(slices: tuple[Slice, ...]) -> float:
    """Return the distance between slices in mm, which replaces a thickness that no file gives."""
    if len(slices) == 1:
        return slices[0].thickness or 1.0
    return float((slices[-1].position - slices[0].position) @ slices[0].normal) / (len(slices) - 1)


def _share_groups(source: Any) -> None:
    """Give a file of several frames its orientation and spacing once for all frames, where highdicom looks; they have been compared."""
    shared, first = source.SharedFunctionalGroupsSequence[0], source.PerFrameFunctionalGroupsSequence[0]
    for name in ("PlaneOrientationSequence", "PixelMeasuresSequence"):
        if name not in shared:
            setattr(shared, name, first[name].value)
