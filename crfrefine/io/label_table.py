"""Names and colors of labels in the extension of a NIfTI header: the table of Caret, which TotalSegmentator writes, too."""

from __future__ import annotations

from xml.etree import ElementTree

from crfrefine.base.text import shorten
from crfrefine.io.segments import MOST_OF_A_NAME, Segment
from crfrefine.io.volume import LARGEST_LABEL

MOST_BYTES = 1 << 22
"""Most bytes of a file's extensions that are looked at."""


def labels_in(extensions: bytes, byte_order: str) -> tuple[Segment, ...]:
    """Return the labels of the first table, in their order; none if there is no table that can be used: names change no result.

    Args:
        extensions: what follows the header, from its flag on; it may be cut off.
        byte_order: "<" or ">".
    """
    place = 4
    while extensions[:1] > b"\0" and place + 8 <= len(extensions):
        size = int.from_bytes(extensions[place : place + 4], "little" if byte_order == "<" else "big")
        content = extensions[place + 8 : place + size]
        if size < 8:
            break
        if b"<CaretExtension" in content and b"<!" not in content.replace(b"<![CDATA[", b""):
            return _table(content.strip(b"\0 \r\n\t"))
        place += size
    return ()


def _table(content: bytes) -> tuple[Segment, ...]:
    found: dict[int, Segment] = {}
    try:
        for entry in ElementTree.fromstring(content).iter("Label"):
            label = int(entry.get("Key", ""))
            name = shorten((entry.text or "").strip(), MOST_OF_A_NAME)
            if 1 <= label <= LARGEST_LABEL and name:
                found.setdefault(label, Segment(label, name, _color([entry.get(part) for part in ("Red", "Green", "Blue")])))
    except (ElementTree.ParseError, ValueError):
        return ()
    return tuple(found[label] for label in sorted(found))


def _color(parts: list[str | None]) -> tuple[float, float, float] | None:
    red, green, blue = (float(part) if part is not None else -1.0 for part in parts)
    return (red, green, blue) if all(0 <= part <= 1 for part in (red, green, blue)) else None
