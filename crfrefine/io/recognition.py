"""What a file is by its content, where its name does not say so or says something else, and what to do with files that are not read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from crfrefine.errors import UnsupportedFormatError
from crfrefine.io.formats import FORMATS, Format
from crfrefine.io.paths import VOLUME_SUFFIXES, format_of, suffix_of
from crfrefine.io.streams import START_BYTES, read_start
from crfrefine.text import shorten

if TYPE_CHECKING:
    from crfrefine.io.foreign import ForeignKind

_MOST_LOOKED_AT = 32


def recognize(path: Path) -> Format | ForeignKind | None:
    """Return what a file is by its first bytes; None where nothing is known that begins so, or it cannot be read.

    Anything but a regular file is not looked at: a pipe would be missing these bytes.
    """
    start = read_start(path, START_BYTES)
    if not start:
        return None
    named = format_of(path)
    # Most files are what their name says, and the code of the other formats need not be loaded.
    for known in sorted(FORMATS, key=lambda known: known is not named):
        if known.load().recognizes(start):
            return known
    from crfrefine.io.foreign import FOREIGN_KINDS

    return next((kind for kind in FOREIGN_KINDS if kind.recognizes(start)), None)


def format_to_read(path: Path, suffixes: tuple[str, ...]) -> Format:
    """Return the format to read a file with: that of its name, or that of its content where no format has such names.

    Args:
        path: the file; it is looked into only if its name has none of the suffixes.
        suffixes: of the formats that may be.

    Raises:
        UnsupportedFormatError: neither name nor content is that of one of these formats; the message names a way out.
    """
    named = format_of(path)
    if named is not None and suffix_of(path) in suffixes:
        return named
    found = recognize(path)
    if isinstance(found, Format) and is_allowed(found, suffixes):
        return found
    message = f"{path}: unknown file type; expected one of {', '.join(suffixes)}"
    hint = way_out(found) or way_out(named or _foreign_by_name(path), "By its name, it")
    raise UnsupportedFormatError(f"{message}\n  {hint}" if hint else message)


def is_allowed(known: Format, suffixes: tuple[str, ...]) -> bool:
    """Return whether a format is one of those with these suffixes."""
    return set(known.suffixes) <= set(suffixes)


def way_out(found: Format | ForeignKind | None, who: str = "It") -> str:
    """Say what a file is that cannot be read in this place, and what to do; "" where nobody knows."""
    if found is None:
        return ""
    if not isinstance(found, Format):
        return f"{who} is {found.name}: {found.way_out}."
    if found.holds_scores_alone:
        return f"{who} is a file of logits or probabilities ({found.name}), which has no geometry: no image, mask or label map."
    return f"{who} is {found.name} by its content: name it {' or '.join(found.suffixes)}."


def suffix_to_write(path: Path) -> str:
    """Return the suffix of files that are written in the format of an image: its own, or its format's first where it has none."""
    suffix = suffix_of(path)
    if suffix in VOLUME_SUFFIXES:
        return suffix
    found = recognize(path)
    return found.suffixes[0] if isinstance(found, Format) else suffix


def describe_others(folder: Path) -> str:
    """Say what the files of a folder are of which none has a known suffix, on a line of its own; "" where nobody knows."""
    others = (path for path in folder.iterdir() if suffix_of(path) not in VOLUME_SUFFIXES and not path.name.startswith("."))
    paths = sorted(path for path in others if path.is_file())[:_MOST_LOOKED_AT]
    kinds = {path: found for path in paths if (found := recognize(path) or _foreign_by_name(path)) is not None}
    if not kinds:
        return ""
    usual = Counter(kinds.values()).most_common(1)[0][0]
    example = next(path for path, kind in kinds.items() if kind == usual)
    return f"\n  {way_out(usual, f'There is {shorten(example.name)}, which')}"


def _foreign_by_name(path: Path) -> ForeignKind | None:
    from crfrefine.io.foreign import FOREIGN_KINDS

    return next((kind for kind in FOREIGN_KINDS if path.name.lower().endswith(kind.suffixes)), None)
