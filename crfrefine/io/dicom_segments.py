"""The descriptions of segments in DICOM: read with all that they say, and written so that nothing but voxels and the algorithm changes."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crfrefine.base.labels import LARGEST_LABEL
from crfrefine.base.text import shorten
from crfrefine.errors import UnsupportedFormatError
from crfrefine.io.segments import MOST_OF_A_NAME, TISSUE, Code, Segment, with_unique_labels

# Numbers of segments have no gaps; where labels have, the end of a segment's description says `label value 52`.
_LABEL_IN_DESCRIPTION = re.compile(r"(?:^|; )label value ([0-9]{1,5})$", re.ASCII)
_MOST_OF_A_DESCRIPTION = 1024
_FAMILY = Code("123110", "DCM", "Artificial Intelligence")
_HERE = "crfrefine"
_REFINED = f", refined with {_HERE}"
_UIDS = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
CONTENT = ("ContentLabel", "ContentDescription", "ContentCreatorName")
"""What a segmentation as a whole is called, and by whom."""


@dataclass(frozen=True)
class StoredItem:
    """`Segment.stored` of this format."""

    item: Any = field(repr=False)  # what describes the segment in its file, a data set of pydicom
    of_file: Mapping[str, Any] = field(repr=False)  # values of the file by their keywords: what it is, and what it is called


def read_segments(path: Path, found: Any) -> tuple[dict[int, Segment], str | None]:
    """Return the segments of a file by their numbers, and a note if their labels had to be numbered anew.

    Raises:
        UnsupportedFormatError: no segment, or one with a number that cannot be.
    """
    of_file = {keyword: found.get(keyword) for keyword in (*_UIDS, "SeriesNumber", "SeriesDescription", *CONTENT)}
    numbers, segments = [], []
    for item in found.SegmentSequence:
        item.decode()  # Its texts are to be written into a file with another character set.
        number = int(item.SegmentNumber)
        written = _LABEL_IN_DESCRIPTION.search(str(item.get("SegmentDescription") or ""))
        label = int(written[1]) if written else number
        if number == 0:
            continue  # The background of a label map.
        if not 1 <= label <= LARGEST_LABEL or number in numbers:
            raise UnsupportedFormatError(f"{path}: damaged DICOM file: segment {number} with the label {label}, or described twice")
        numbers.append(number)
        kind, region = _first(item, "SegmentedPropertyTypeCodeSequence"), _first(item, "AnatomicRegionSequence")
        segments.append(
            Segment(
                label,
                shorten(str(item.get("SegmentLabel") or f"Label {label}").strip(), MOST_OF_A_NAME),
                _color(item),
                _code(_first(item, "SegmentedPropertyCategoryCodeSequence")) or TISSUE,
                _code(kind) or TISSUE,
                _code(_first(kind, "SegmentedPropertyTypeModifierCodeSequence")),
                _code(region),
                _code(_first(region, "AnatomicRegionModifierSequence")),
                StoredItem(item, of_file),
            )
        )
    if not segments:
        raise UnsupportedFormatError(f"{path}: damaged DICOM file: it describes no segment")
    unique, note = with_unique_labels(segments)
    return dict(zip(numbers, unique, strict=True)), note


def describe(highdicom: Any, number: int, segment: Segment, *, is_refined: bool, version: str) -> Any:
    """Return the description of a segment to write; that of its file wins, except for the number, and for the algorithm if refined."""
    stored = segment.stored.item if isinstance(segment.stored, StoredItem) else None
    item = highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=segment.name[:MOST_OF_A_NAME].replace("\\", "/"),
        segmented_property_category=_concept(highdicom, segment.category),
        segmented_property_type=_concept(highdicom, segment.type),
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=_HERE if is_refined else "unknown", version=version if is_refined else "unknown", family=_concept(highdicom, _FAMILY)
        ),
        anatomic_regions=None if segment.region is None else [_concept(highdicom, segment.region)],
        display_color=highdicom.color.CIELabColor.from_rgb(*(round(255 * part) for part in segment.shown_color))
        if stored is None
        else None,
    )
    if segment.type_modifier is not None:
        kind = item.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = [_concept(highdicom, segment.type_modifier)]
    if segment.region_modifier is not None and segment.region is not None:
        item.AnatomicRegionSequence[0].AnatomicRegionModifierSequence = [_concept(highdicom, segment.region_modifier)]
    if stored is not None:
        _keep(item, stored, is_refined=is_refined)
        item.SegmentNumber = number
    elif not is_refined:
        del item.SegmentationAlgorithmIdentificationSequence  # Nothing is known of it; its name says so.
    _put_label(item, number, segment.label)
    return item


def sources_of(segments: Sequence[Segment]) -> list[Mapping[str, Any]]:
    """Return the files that segments are from, each once: their values by keyword."""
    found = [segment.stored.of_file for segment in segments if isinstance(segment.stored, StoredItem)]
    return list({str(values["SOPInstanceUID"]): values for values in found if all(values[uid] for uid in _UIDS)}.values())


def _keep(item: Any, stored: Any, *, is_refined: bool) -> None:
    """Put all that a file says of a segment into a new description, and say that the segment was refined.

    A segment drawn by hand is no longer manual alone; the name of an algorithm gets a suffix.
    """
    item.update(copy.deepcopy(stored))
    name, identified = "SegmentAlgorithmName", "SegmentationAlgorithmIdentificationSequence"
    if not is_refined:
        for keyword in (name, identified):
            if keyword not in stored and "SegmentAlgorithmType" in stored:
                delattr(item, keyword)
        return
    if stored.get("SegmentAlgorithmType") == "MANUAL":
        item.SegmentAlgorithmType = "SEMIAUTOMATIC"
    before = str(stored.get(name) or "").strip().removesuffix(_REFINED)
    item.SegmentAlgorithmName = before[: MOST_OF_A_NAME - len(_REFINED)] + _REFINED if before not in ("", _HERE) else _HERE
    if before not in ("", _HERE) and stored.get(identified):
        item.SegmentationAlgorithmIdentificationSequence[0].AlgorithmName = item.SegmentAlgorithmName


def _put_label(item: Any, number: int, label: int) -> None:
    """Write the label into the description if it is not the number; what was there of a label before goes."""
    text = _LABEL_IN_DESCRIPTION.sub("", str(item.get("SegmentDescription") or ""))
    if number != label:
        ending = f"label value {label}"
        text = f"{text[: _MOST_OF_A_DESCRIPTION - len(ending) - 2]}; {ending}" if text else ending
    if text:
        item.SegmentDescription = text
    elif "SegmentDescription" in item:
        del item.SegmentDescription


def _first(group: Any, keyword: str) -> Any:
    """Return the first item of a sequence; None if there is none."""
    items = None if group is None else group.get(keyword)
    return items[0] if items else None


def _code(item: Any) -> Code | None:
    if item is None:
        return None
    value = next((text for name in ("CodeValue", "LongCodeValue", "URNCodeValue") if (text := item.get(name))), "")
    return Code.of(str(value), *(str(item.get(name) or "") for name in ("CodingSchemeDesignator", "CodeMeaning")))


def _color(item: Any) -> tuple[float, float, float] | None:
    """Return red, green, blue; None if the file has none, or highdicom is not there to convert it: a color changes no result."""
    values = item.get("RecommendedDisplayCIELabValue")
    if not values or len(values) != 3:
        return None
    try:
        from highdicom.color import CIELabColor
    except ImportError:
        return None
    red, green, blue = (float(part) / 255 for part in CIELabColor.from_dicom_value([int(value) for value in values]).to_rgb())
    return red, green, blue


def _concept(highdicom: Any, code: Code) -> Any:
    return highdicom.sr.CodedConcept(value=code.value, scheme_designator=code.scheme, meaning=code.meaning)
