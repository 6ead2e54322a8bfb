"""The lines about segments in the header of a `.seg.nrrd`: read into segments, and written so that nothing but voxels changes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count
from pathlib import Path

from crfrefine.base.labels import LARGEST_LABEL
from crfrefine.base.text import printable, shorten
from crfrefine.errors import UnsupportedFormatError
from crfrefine.io.segments import MOST_OF_A_NAME, TISSUE, Code, Segment
from crfrefine.io.text_header import finite_number, whole_number

OFFSET_KEY = "Segmentation_ReferenceImageExtentOffset"
"""The place of the first voxel in the reference image: 3D Slicer stores only the part that segments reach."""
NO_OFFSET = "0 0 0"

_KEY = re.compile(r"Segment([0-9]{1,5})_(.+)", re.ASCII)
_DESCRIBING = frozenset(("ID", "Name", "Color", "LabelValue", "Layer", "Tags"))
_ABOUT_VOXELS = frozenset(("LabelValue", "Layer", "Extent"))
_OF_ALL = "Segmentation_"
_NEW = {f"{_OF_ALL}ContainedRepresentationNames": "Binary labelmap|", f"{_OF_ALL}MasterRepresentation": "Binary labelmap"}
_TERMINOLOGY = "TerminologyEntry:"
_CONTEXT = "Segmentation category and type - DICOM master list"
_ANATOMY = "Anatomic codes - DICOM master list"


@dataclass(frozen=True)
class StoredSegment:
    """A segment as it is stored: where a layer has a value."""

    segment: Segment
    layer: int
    value: int


@dataclass(frozen=True)
class _Lines:
    """`Segment.stored` of this format: the lines of a file, without those about voxels."""

    place: int  # of the segment among those of its file, the order in which 3D Slicer lists them
    of_segment: Mapping[str, str]  # by what follows `SegmentN_` in the key
    of_all: Mapping[str, str] = field(repr=False)  # about the whole segmentation, by their keys


def read_segments(path: Path, lines: Mapping[str, str]) -> tuple[StoredSegment, ...]:
    """Return the segments in the order of their numbers, from the lines of a header whose key begins with `Segment`.

    Raises:
        UnsupportedFormatError: a label value or a layer that cannot be.
    """
    by_number: dict[int, dict[str, str]] = {}
    of_all = {key: text for key, text in lines.items() if key.startswith(_OF_ALL) and key != OFFSET_KEY}
    for key, text in lines.items():
        if match := _KEY.fullmatch(key):
            by_number.setdefault(int(match[1]), {})[match[2]] = text
    found = []
    for place, number in enumerate(sorted(number for number, entries in by_number.items() if _DESCRIBING & entries.keys())):
        entries = by_number[number]
        # Before version 4.11, every segment was a binary layer of its own.
        value, layer = whole_number(entries.get("LabelValue", "1")), whole_number(entries.get("Layer", str(place)))
        if value is None or not 1 <= value <= LARGEST_LABEL or layer is None or layer < 0:
            raise UnsupportedFormatError(
                f"{path}: damaged header: Segment{number} has the LabelValue {shorten(entries.get('LabelValue', ''))!r} in layer "
                f"{shorten(entries.get('Layer', ''))!r}; expected a label from 1 to {LARGEST_LABEL} and a layer from 0"
            )
        name = entries.get("Name") or entries.get("ID") or f"Label {value}"
        segment = Segment(value, shorten(printable(_unescaped(name)), MOST_OF_A_NAME), _color(entries.get("Color", "")))
        kept = {key: text for key, text in entries.items() if key not in _ABOUT_VOXELS}
        segment = replace(_with_codes(segment, entries.get("Tags", "")), stored=_Lines(place, kept, of_all))
        found.append(StoredSegment(segment, layer, value))
    return tuple(found)


def lines_to_write(segments: Sequence[Segment], sizes: Sequence[int], offset: str) -> list[str]:
    """Return the lines of segments, in the order of their labels, that have their labels in one layer.

    Segments of a file of this format keep their order and all their lines, except for those about voxels.
    """
    ordered = sorted(segments, key=lambda segment: segment.stored.place if isinstance(segment.stored, _Lines) else len(segments))
    stored = [segment.stored for segment in ordered if isinstance(segment.stored, _Lines)]
    extent = " ".join(f"0 {size - 1}" for size in sizes)
    about_voxels = ({"Extent": extent, "LabelValue": str(segment.label), "Layer": "0"} for segment in ordered)
    of_all = (stored[0].of_all if stored else {}) or _NEW
    return [
        *(
            f"Segment{number}_{key}:={text}"
            for number, (segment, name, more) in enumerate(zip(ordered, _identifiers(ordered), about_voxels, strict=True))
            for key, text in (_entries(segment) | {"ID": name} | more).items()
        ),
        *(f"{key}:={text}" for key, text in of_all.items()),
        f"{OFFSET_KEY}:={offset}",
    ]


def _entries(segment: Segment) -> dict[str, str]:
    """Return the lines of a segment, by what follows `SegmentN_`; those of its file win."""
    defaults = {
        "ID": "",
        "Name": _escaped(segment.name),
        "NameAutoGenerated": "0",
        "Color": " ".join(f"{round(part, 6):g}" for part in segment.shown_color),
        "ColorAutoGenerated": "0",
        "Tags": f"{_TERMINOLOGY}{_terminology(segment)}|",
    }
    return defaults | _own(segment)


def _own(segment: Segment) -> dict[str, str]:
    return dict(segment.stored.of_segment) if isinstance(segment.stored, _Lines) else {}


def _identifiers(segments: Sequence[Segment]) -> list[str]:
    """Return the identifiers of segments, each once: that of the file, else `Segment_3`, `Segment_3_1` and so on."""
    in_files = {_own(segment).get("ID", "") for segment in segments} | {""}
    chosen: dict[str, None] = {}  # In their order.
    for segment in segments:
        own, new = _own(segment).get("ID", ""), f"Segment_{segment.label}"
        free = (name for name in chain([new], map(f"{new}_{{}}".format, count(1))) if name not in chosen and name not in in_files)
        chosen[own if own and own not in chosen else next(free)] = None
    return list(chosen)


def _terminology(segment: Segment) -> str:
    """Return `context~category~type~modifier~context~region~modifier`, each code as `scheme^value^meaning`."""
    what = (segment.category, segment.type, segment.type_modifier)
    where = (segment.region, segment.region_modifier)
    return "~".join((_CONTEXT, *map(_code_text, what), _ANATOMY, *map(_code_text, where)))


def _code_text(code: Code | None) -> str:
    texts = ("", "", "") if code is None else (code.scheme, code.value, code.meaning)
    return "^".join(_escaped(re.sub(r"[~^|]", " ", text)) for text in texts)


def _with_codes(segment: Segment, tags: str) -> Segment:
    """Return the segment with the codes of its terminology entry."""
    entry = next((tag for tag in tags.split("|") if tag.startswith(_TERMINOLOGY)), "")
    parts = [*entry.split("~"), *[""] * 7]
    # The two others name the lists that the codes are from.
    category, kind, modifier, region, region_modifier = (_code(part) for part in (*parts[1:4], *parts[5:7]))
    return replace(
        segment,
        category=category or TISSUE,
        type=kind or TISSUE,
        type_modifier=modifier,
        region=region,
        region_modifier=region_modifier,
    )


def _code(text: str) -> Code | None:
    scheme, value, meaning = (*text.split("^"), "", "", "")[:3]
    return Code.of(value, scheme, meaning)


def _color(text: str) -> tuple[float, float, float] | None:
    """Return red, green, blue from 0 to 1; None if the text is something else: a color changes no result."""
    numbers = [number for word in text.split()[:4] if (number := finite_number(word)) is not None]
    if len(numbers) != 3 or not all(0 <= number <= 1 for number in numbers):
        return None
    return numbers[0], numbers[1], numbers[2]


def _escaped(text: str) -> str:
    return printable(text).replace("\\", "\\\\").replace("\n", "\\n")


def _unescaped(text: str) -> str:
    return re.sub(r"\\([\\n])", lambda match: "\n" if match[1] == "n" else "\\", text)
