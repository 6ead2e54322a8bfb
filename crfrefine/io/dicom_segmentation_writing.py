"""Write DICOM segmentations with highdicom, which is imported only here and only when one is written."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.errors import InputError
from crfrefine.io.atomic import atomic_file
from crfrefine.io.dicom_files import INSTALL, LABEL_IN_DESCRIPTION, has_frames
from crfrefine.io.dicom_series import SeriesTemplate
from crfrefine.io.dicom_sources import OTHER_FORMATS, read_sources, refused, require_accepted, require_references
from crfrefine.io.segments import MOST_OF_A_NAME, Code, Segment
from crfrefine.io.streams import START_BYTES, read_start

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.io.content import Content
    from crfrefine.io.volume import VolumeHeader

_FAMILY = Code("123110", "DCM", "Artificial Intelligence")
_SERIES_NUMBER = 5000
"""Of the new series: high, so that viewers list it behind the images."""


def require_source(path: Path, image: VolumeHeader | None) -> SeriesTemplate:
    """Return the series that a segmentation refers to.

    Args:
        path: of the segmentation.
        image: header of the image.

    Raises:
        InputError: the image is no DICOM series, or lacks what a segmentation refers to, or highdicom is not installed.
    """
    template = image.template if image is not None else None
    if not isinstance(template, SeriesTemplate):
        raise _no_series(path, image.format if image is not None else "in memory")
    require_references(path, template)
    require_highdicom(path)
    return template


def check_header(path: Path, image: VolumeHeader) -> None:
    """Raise InputError, before anything is computed, if a segmentation of a series cannot be written; see `require_source`."""
    require_accepted(path, require_source(path, image), require_highdicom(path))


def check_image(path: Path, image: Path) -> None:
    """Raise InputError if an image is no DICOM series, that is neither a folder nor a file of frames, or highdicom is not installed."""
    if not image.is_dir() and not has_frames(read_start(image, START_BYTES)):
        raise _no_series(path, str(image))
    require_highdicom(path)


def _no_series(path: Path, image: str) -> InputError:
    return InputError(f"{path}: a DICOM segmentation refers to the DICOM series it was made on; the image is {image}: {OTHER_FORMATS}")


def require_highdicom(path: Path) -> Any:
    """Return the module highdicom.

    Raises:
        InputError: it is not installed.
    """
    try:
        import highdicom
        import highdicom.color
        import highdicom.seg
    except ImportError as error:
        raise InputError(
            f"{path}: a DICOM segmentation needs the package highdicom, which is not installed ({error}); {INSTALL}, or {OTHER_FORMATS}"
        ) from None
    return highdicom


def write_segmentation(path: Path, content: Content, image: VolumeHeader | None) -> None:
    """Write a label map as one binary segment per label; planes without a segment are left out.

    Args:
        path: the file.
        content: labels, with segments; without any, one empty segment is written, since the format asks for one.
        image: header of the series.

    Raises:
        InputError: as for `require_source`.
    """
    template = require_source(path, image)
    highdicom = require_highdicom(path)
    segments = content.segments or (Segment(1, "Label 1"),)
    # Numbers of segments are 1, 2, 3 ..., whatever the labels are.
    numbers = np.zeros(max(int(segment.label) for segment in segments) + 1, np.uint16)
    numbers[[segment.label for segment in segments]] = np.arange(1, len(segments) + 1)
    labels: NDArray[np.unsignedinteger[Any]] = np.empty(content.grid_shape, content.dtype)
    start = 0
    for block in content.one_after_the_other():
        values = np.frombuffer(block, content.dtype.newbyteorder("<"))
        labels.reshape(-1)[start : start + values.size] = values
        start += values.size
    sources, labels = read_sources(template, labels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written = _encoded(highdicom, sources, numbers[labels], segments)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise refused(path, template, error) from None
    with atomic_file(path) as file:
        file.write(written)


def _encoded(highdicom: Any, sources: list[Any], numbers: NDArray[np.uint16], segments: tuple[Segment, ...]) -> bytes:
    """Return the file: `numbers` are those of the segments, (slices, rows, columns) in the order of the sources."""
    from crfrefine import __version__

    algorithm = highdicom.AlgorithmIdentificationSequence(name="crfrefine", version=__version__, family=_concept(highdicom, _FAMILY))
    dataset = highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=numbers,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[_description(highdicom, number, one, algorithm) for number, one in enumerate(segments, 1)],
        series_instance_uid=highdicom.UID(),
        series_number=_SERIES_NUMBER,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="crfrefine",
        manufacturer_model_name="crfrefine",
        software_versions=__version__,
        device_serial_number="0",
        series_description="Segmentation refined with crfrefine",
        omit_empty_frames=True,
    )
    for item, segment in zip(dataset.SegmentSequence, segments, strict=True):
        if item.SegmentNumber != segment.label:
            item.SegmentDescription = f"{LABEL_IN_DESCRIPTION} {segment.label}"
    buffer = BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def _description(highdicom: Any, number: int, segment: Segment, algorithm: Any) -> Any:
    red, green, blue = (round(255 * part) for part in segment.shown_color)
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=segment.name[:MOST_OF_A_NAME].replace("\\", "/"),
        segmented_property_category=_concept(highdicom, segment.category),
        segmented_property_type=_concept(highdicom, segment.type),
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
        display_color=highdicom.color.CIELabColor.from_rgb(red, green, blue),
    )


def _concept(highdicom: Any, code: Code) -> Any:
    return highdicom.sr.CodedConcept(value=code.value, scheme_designator=code.scheme, meaning=code.meaning)
