"""Label maps written as segmentations of DICOM, on the grid of a series."""

from __future__ import annotations

import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import highdicom
import numpy as np

from crfrefine.base.array_types import Labels, NamesOfLabels
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import listed, shorten
from crfrefine.errors import InputError
from crfrefine.io.dicom.files import decoding, limit, require_same_identity
from crfrefine.io.dicom.segmentation import LABEL_ENDING, read_items
from crfrefine.io.dicom.series import Series
from crfrefine.io.volume import MAX_OF_A_NAME, Segment, segments_of
from crfrefine.io.writing import write_small_file
from crfrefine.version import __version__

_CLASSES = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "PT": "1.2.840.10008.5.1.4.1.1.128",
}
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
    "specific_character_set": "ISO_IR 192",  # UTF-8 holds names in any language.
}
# The words in a refined segment, and former words of this kind.
_REFINEMENT = f"refined with crfrefine {__version__}"
_REFINED = re.compile(r"(?:^|; )(?:refined with )?crfrefine \S+$")
_MAX_OF_A_TEXT = 1022  # characters of a description


def write(
    target: Path,
    labels: Labels,
    named: Sequence[Segment],
    like: Series,
    segments: Path | None,
    *,
    series_number: int | None = None,
    series_description: str | None = None,
) -> list[Note]:
    """Write a label map (x, y, z) on the grid of a series, in binary segments; return notes.

    It is the refined one of the segmentation `segments`, if that is given: its segments keep what
    describes them, and say that they were refined. Others get the names of `named`. Raises as
    `read`.
    """
    notes: list[Note] = []
    names = {segment.label: segment.name for segment in named}
    with decoding(like.header.path):
        items = {}
        made = "converted"
        if segments is not None:
            items = _items_of(segments, like, names, notes)
            made = "refined"
        limit(like.header.path, like.datasets, labels.size)  # `read_items` sets that of its file.
        stored = labels.T
        occurring = [segment.label for segment in segments_of(stored, ())]
        written = sorted({*items, *occurring}) or [1]
        numbers = np.zeros(written[-1] + 1, np.uint16)  # of segments, which have no gaps
        described = []
        for number, label in enumerate(written, 1):
            numbers[label] = number
            name = names.get(label, f"Label {label}")
            described.append(_describe(number, label, name, items.get(label)))
        if series_number is None:  # It sorts the segmentation behind its series.
            first = like.first
            series_number = min(100 * int(first.get("SeriesNumber") or 0) + 1, (1 << 31) - 1)
        pixels = numbers[stored]
        sources = list(like.datasets.values())
        for file, source in like.datasets.items():
            _complete(file, source, sources[0], like.slices[0].thickness)
        if len(sources) > 1:
            sources = [sources[number] for number in like.order]
        else:
            pixels = pixels[np.argsort(like.order)]
        try:
            segmentation = highdicom.seg.Segmentation(
                source_images=sources,
                pixel_array=pixels,
                segmentation_type="BINARY",
                segment_descriptions=described,
                series_instance_uid=highdicom.UID(),
                series_number=series_number,
                series_description=series_description or f"Segmentation {made} with crfrefine",
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                **_CONVERTED,
            )
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise InputError(
                f"{like.header.path}: highdicom refuses to write a segmentation of this series: "
                f"{shorten(error, 200)}"
            ) from None
        buffer = BytesIO()
        segmentation.save_as(buffer)
    write_small_file(target, buffer.getvalue())
    return notes


def _items_of(file: Path, like: Series, names: NamesOfLabels, notes: list[Note]) -> dict[int, Any]:
    """Return what describes the labels in another segmentation of a series.

    It is found by their names where numbers and names contradict each other: structures in a folder
    get other numbers than in the segmentation that they came from.
    """
    dataset, items = read_items(file)
    first = like.first
    require_same_identity(file, dataset, like.header.path, first)
    by_name = {_plain(item.get("SegmentLabel")): item for item in items.values()}
    found = {}
    for label, name in names.items():
        if _plain(name) in by_name:
            found[label] = by_name[_plain(name)]
    if all(item is items.get(label) for label, item in found.items()):
        return items
    if len({id(item) for item in found.values()}) < len(found):
        raise InputError(
            f"segments cannot be told by the names of labels, of which two are one: "
            f"{listed(names.values())}; rename them, or leave --segments out"
        )
    notes.append(NoteKind.SEGMENTS_BY_NAME())
    return found


def _plain(name: object) -> str:
    """Return a name as files of structures have it, in lower case."""
    return re.sub(r"[^\w+-]", "_", str(name or "")).casefold()


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
    """Return the description of a segment: the item, changed to that of its refined one, or new.

    Of a new one nothing is known but its name: it is a tissue.
    """
    words = []
    if item is None:
        tissue = highdicom.sr.CodedConcept("85756007", "SCT", "Tissue")
        family = highdicom.sr.CodedConcept("123110", "DCM", "Artificial Intelligence")
        algorithm = highdicom.AlgorithmIdentificationSequence("unknown", family, "unknown")
        rgb = [round(255 * part) for part in Segment(label, name).shown_color]
        color = highdicom.color.CIELabColor.from_rgb(*rgb)
        shown = name[:MAX_OF_A_NAME].replace("\\", "/")
        item = highdicom.seg.SegmentDescription(
            number, shown, tissue, tissue, "AUTOMATIC", algorithm, display_color=color
        )
    else:
        words.append(_REFINEMENT)
        item.decode()  # The file to write has another character set.
        item.SegmentNumber = number
        # It is drawn by hand, or unknown; the refinement is an algorithm.
        if item.get("SegmentAlgorithmType") not in ("AUTOMATIC", "SEMIAUTOMATIC"):
            item.SegmentAlgorithmType = "SEMIAUTOMATIC"
        item.SegmentAlgorithmName = _joined(item.get("SegmentAlgorithmName"), _REFINEMENT)
        if "TrackingUID" in item:
            item.TrackingUID = highdicom.UID()
        algorithms = item.get("SegmentationAlgorithmIdentificationSequence")
        if algorithms:  # highdicom reads a single one.
            first = algorithms[0]
            first.AlgorithmName = _joined(first.get("AlgorithmName"), _REFINEMENT)
            version = f"crfrefine {__version__}"
            first.AlgorithmVersion = _joined(first.get("AlgorithmVersion"), version)
        else:
            family = highdicom.sr.CodedConcept("123101", "DCM", "Neighborhood Analysis")
            item.SegmentationAlgorithmIdentificationSequence = (
                highdicom.AlgorithmIdentificationSequence("crfrefine", family, __version__)
            )
        item = highdicom.seg.SegmentDescription.from_dataset(item, copy=False)
    if label != number:
        words.append(f"label value {label}")
    text = LABEL_ENDING.sub("", str(item.get("SegmentDescription") or ""))
    text = _joined(text, "; ".join(words), _MAX_OF_A_TEXT)
    item.pop("SegmentDescription", None)
    if text:
        item.SegmentDescription = text
    return item


def _joined(text: object, words: str, most: int = MAX_OF_A_NAME) -> str:
    """Return a text with further words at its end, instead of those of an earlier refinement."""
    before = _REFINED.sub("", str(text or ""))[: most - len(words) - 2]
    return "; ".join(filter(None, [before, words]))
