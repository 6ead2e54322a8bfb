"""Write DICOM segmentations with highdicom, which is imported only when one is written, and check beforehand that it takes the series."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.text import shorten
from crfrefine.errors import InputError
from crfrefine.io.atomic import atomic_files
from crfrefine.io.dicom_files import INSTALL, has_frames, interpreting, read_dataset, require_pydicom
from crfrefine.io.dicom_identity import KEYWORDS
from crfrefine.io.dicom_segments import CONTENT, describe, sources_of
from crfrefine.io.dicom_slices import Series, Slice
from crfrefine.io.segments import MOST_OF_A_NAME, Segment
from crfrefine.io.streams import read_start

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.io.content import Content
    from crfrefine.io.volume import VolumeHeader

_NUMBERS_PER_SERIES = 100
_LARGEST_NUMBER = (1 << 31) - 1


_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
)
"""Attributes of type 2 of the standard: in every file, but perhaps without a value. De-identification removes them."""

_OTHER_FORMATS = "write another format, such as .nii.gz or .seg.nrrd"


def require_source(path: Path, image: VolumeHeader | None) -> Series:
    """Return the series that a segmentation refers to.

    Raises:
        InputError: the image is no DICOM series, or lacks what a segmentation refers to, or highdicom is not installed.
    """
    template = image.template if image is not None else None
    if not isinstance(template, Series):
        raise _no_series(path, image.format if image is not None else "in memory")
    slices, identity = template.slices, template.identity
    for one in slices:
        given = {
            **{"SOPClassUID": one.sop_class, "SOPInstanceUID": one.instance, "Modality": one.modality, "SeriesInstanceUID": one.series},
            **{"StudyInstanceUID": identity.study, "FrameOfReferenceUID": identity.frame},
        }
        lacking = [keyword for keyword, value in given.items() if not value]
        if lacking:
            raise InputError(
                f"{path}: a DICOM segmentation refers to its series, and {one.path} has no {' and no '.join(lacking)}\n"
                f"  De-identification may replace these values, but not empty them: set them in the files, or {_OTHER_FORMATS}."
            )
    folder = slices[0].path.parent
    if slices[0].frame is not None and len({one.path for one in slices}) > 1:
        raise InputError(f"{path}: a DICOM segmentation of several files with several frames each, in {folder}; {_OTHER_FORMATS}")
    require_highdicom(path)
    return template


def check_image(path: Path, image: Path | VolumeHeader) -> None:
    """Raise InputError, before anything is computed, if a segmentation of an image cannot be written; a header tells more than a path."""
    if isinstance(image, Path):
        if not image.is_dir() and not has_frames(read_start(image)):
            raise _no_series(path, str(image))
        require_highdicom(path)
    else:
        _require_accepted(path, require_source(path, image), require_highdicom(path))


def _require_accepted(path: Path, template: Series, highdicom: Any) -> None:
    """Raise InputError if highdicom does not make a segmentation of the first slice, such as for forbidden values."""
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
        raise _refused(path, template, error) from None


def _no_series(path: Path, image: str) -> InputError:
    return InputError(f"{path}: a DICOM segmentation refers to the DICOM series it was made on; the image is {image}: {_OTHER_FORMATS}")


def require_highdicom(path: Path) -> Any:
    """Return the module highdicom; raise InputError if it is not installed."""
    try:
        import highdicom
        import highdicom.color
        import highdicom.seg
    except ImportError as error:
        raise InputError(
            f"{path}: a DICOM segmentation needs the package highdicom, which is not installed ({error}); {INSTALL}, or {_OTHER_FORMATS}"
        ) from None
    return highdicom


def write_segmentation(content: Content, image: VolumeHeader | None) -> None:
    """Write a label map as one binary segment per label, one empty one if there is none; planes without a segment are left out.

    Raises:
        InputError: as for `require_source`.
    """
    path = content.path
    template = require_source(path, image)
    highdicom = require_highdicom(path)
    labels: NDArray[np.unsignedinteger[Any]] = np.empty(content.grid_shape, content.dtype)
    start = 0
    for block in content.one_after_the_other():
        values = np.frombuffer(block, content.dtype.newbyteorder("<"))
        labels.reshape(-1)[start : start + values.size] = values
        start += values.size
    segments = content.segments or (Segment(1, "Label 1"),)
    # Numbers of segments are 1, 2, 3 ..., whatever the labels are.
    numbers = np.zeros(max(int(segment.label) for segment in segments) + 1, np.uint16)
    numbers[[segment.label for segment in segments]] = np.arange(1, len(segments) + 1)
    sources = _sources(template, template.slices)
    frames = [one.frame for one in template.slices if one.frame is not None]
    labels = labels[np.argsort(frames)] if frames else labels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written = _encoded(highdicom, sources, numbers[labels], content, segments)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise _refused(path, template, error) from None
    with atomic_files(path) as (file,):
        file.write(written)


def _encoded(highdicom: Any, sources: list[Any], numbers: NDArray[np.uint16], content: Content, segments: tuple[Segment, ...]) -> bytes:
    """Return the file: `numbers` are those of the segments, (slices, rows, columns) in the order of the sources."""
    from crfrefine import __version__

    refined = sources_of(segments)
    what = "refined" if content.is_refined else "converted"
    first = refined[0] if refined else {}
    dataset = highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=numbers,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[
            describe(highdicom, number, one, is_refined=content.is_refined, version=__version__) for number, one in enumerate(segments, 1)
        ],
        series_instance_uid=highdicom.UID(),
        series_number=_series_number(sources[0], refined),
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="crfrefine",
        manufacturer_model_name="crfrefine",
        software_versions=__version__,
        device_serial_number="0",
        series_description=_series_description(first, f"{what} with crfrefine"),
        specific_character_set="ISO_IR 192",  # UTF-8 holds the names of segments in any language.
        omit_empty_frames=True,
    )
    for keyword in CONTENT:
        if first.get(keyword):
            setattr(dataset, keyword, first[keyword])
    for one in refined:
        _refer_to(highdicom, require_pydicom(content.path).Dataset, dataset, one)
    buffer = BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def _series_number(image: Any, refined: Sequence[Mapping[str, Any]]) -> int:
    """Return a hundred times the number of the images, so that viewers list it behind them, but more than that of a source."""
    of_image = _whole(image.get("SeriesNumber"))
    behind = _NUMBERS_PER_SERIES * of_image
    after = [_whole(one["SeriesNumber"]) + 1 for one in refined]
    return min(max(behind if behind <= _LARGEST_NUMBER else of_image, *after, 1), _LARGEST_NUMBER)


def _whole(value: Any) -> int:
    """Return a whole number of a data set; 0 if there is none, or something else."""
    text = str(value).strip()
    return int(text) if text.isascii() and text.isdigit() else 0


def _series_description(source: Mapping[str, Any], ending: str) -> str:
    """Return the description of the series, which viewers list: that of the source with an ending."""
    before = str(source.get("SeriesDescription") or "").strip().removesuffix(f", {ending}")
    if not before or before == f"Segmentation {ending}":
        return f"Segmentation {ending}"
    return f"{before[: MOST_OF_A_NAME - len(ending) - 2]}, {ending}"


def _refer_to(highdicom: Any, new: Any, dataset: Any, source: Mapping[str, Any]) -> None:
    """Refer to the segmentation that was the source: as a source image, and in the list of all instances that a file refers to."""
    instance, series, study = new(), new(), new()
    instance.ReferencedSOPClassUID, instance.ReferencedSOPInstanceUID = source["SOPClassUID"], source["SOPInstanceUID"]
    series.SeriesInstanceUID, series.ReferencedInstanceSequence = source["SeriesInstanceUID"], [copy.deepcopy(instance)]
    if source["StudyInstanceUID"] == dataset.StudyInstanceUID:
        dataset.ReferencedSeriesSequence.append(series)
    else:
        study.StudyInstanceUID, study.ReferencedSeriesSequence = source["StudyInstanceUID"], [series]
        others = "StudiesContainingOtherReferencedInstancesSequence"
        setattr(dataset, others, [*dataset.get(others, ()), study])
    instance.PurposeOfReferenceCodeSequence = [highdicom.sr.CodedConcept("121322", "DCM", "Source of Image Processing Operation")]
    dataset.SourceImageSequence = [*dataset.get("SourceImageSequence", ()), instance]


def _refused(path: Path, template: Series, error: Exception) -> InputError:
    """Return the error for a series that highdicom does not accept."""
    return InputError(
        f"{path}: highdicom refuses to write a segmentation of the series in {template.slices[0].path.parent}: {shorten(error, 200)}; "
        f"{_OTHER_FORMATS}"
    )


def _sources(template: Series, slices: tuple[Slice, ...]) -> list[Any]:
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
