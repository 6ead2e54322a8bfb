"""Options about labels and channels that several commands have, and what their values mean."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from crfrefine.base.limits import MAX_LABEL
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import shorten, shorten_value
from crfrefine.errors import ConfigError, InputError

INTERPOLATIONS = LINEAR, CUBIC = "linear", "cubic"  # values of --resample
# The help of --add-background, for the commands that read a network's output.
ADD_BACKGROUND = (
    "The network's output has no channel for the background: take its probabilities for labels "
    "1, 2 ..., and 1 minus their sum for label 0. One channel needs no option."
)
# The help of --scale, for the same commands.
SCALE = (
    "What the probability 1 is in the network's output, such as 100 or 255: probabilities are "
    "divided by it; 1 says that they are probabilities already."
)
# The help of --channel-labels, for the same commands.
CHANNEL_LABELS = (
    "The label of each channel of the network's output, such as 0,17,53; background first. "
    "Default: as in dataset.json, else 0, 1, 2 ..."
)
# The help of --map, for the commands that read label maps.
MAP = (
    "Take the value OLD of the label maps for the label NEW, as 255=1 or -1=0; repeatable. All "
    "count at once, and before anything else: names, regions and checks are about the new labels."
)
REFERENCE = "reference"  # the name before the colon of `--map reference:4=3`
# What follows it where label maps come from several places.
MAP_OF_REFERENCE = f"{REFERENCE}:OLD=NEW is about the reference."

# Whose label maps, empty for those that are refined or judged; a value there, and its label.
Mapped = tuple[str, int, int]


def parse_mapped(text: str) -> Mapped:
    """Return the parts of a text such as "255=1" or "reference:4=3"; InputError for another one."""
    source, colon, numbers = text.rpartition(":")
    match = re.fullmatch(r"\s*([+-]?[0-9]{1,10})\s*=\s*\+?([0-9]{1,9})\s*", numbers)
    is_named = bool(source.strip()) or not colon
    if match is None or not is_named or int(match[2]) > MAX_LABEL:
        raise InputError(
            f"{shorten_value(text)}: expected OLD=NEW, such as 255=1, with a whole number and a "
            f"label from 0 to {MAX_LABEL}"
        )
    return " ".join(source.split()), int(match[1]), int(match[2])


def parse_own_mapped(text: str) -> Mapped:
    """Return the parts of a text such as "255=1"; InputError for one that names another source."""
    mapped = parse_mapped(text)
    if mapped[0]:
        raise InputError(
            f"{shorten_value(text)}: this command reads no label maps of {shorten(mapped[0])}; "
            "expected OLD=NEW"
        )
    return mapped


def parse_scale(text: str) -> float:
    """Return a positive number; InputError for another text."""
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 0 < scale < math.inf:
        raise InputError(f"{shorten_value(text)}: expected a positive number, such as 100 or 255")
    return scale


def parse_channel_labels(text: str) -> tuple[int, ...]:
    """Return the label of each channel, the background first, of a text such as "0,17,53".

    Raises InputError for another text; the background may be left out.
    """
    parts = [part.strip() for part in text.split(",")]
    are_numbers = all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts)
    numbers = tuple(map(int, parts)) if are_numbers else ()
    if 0 not in numbers:
        numbers = (0, *numbers)
    is_table = are_numbers and len({*numbers}) == len(numbers) > 1
    if not is_table or numbers[0] != 0 or max(numbers) > MAX_LABEL:
        raise InputError(
            f"{shorten_value(text)}: expected the label of each channel, such as 0,17,53: "
            f"different whole numbers from 0 to {MAX_LABEL}, background first"
        )
    return numbers


def mapping_of(all_mapped: Iterable[Mapped], source: str = "") -> dict[int, int]:
    """Return the new label of each value in the label maps of a source, by the options --map.

    Raise ConfigError if a value has two labels.
    """
    mapping: dict[int, int] = {}
    for name, old, new in all_mapped:
        if name == source and mapping.setdefault(old, new) != new:
            raise ConfigError(
                f"--map {old}={new}: the value {old} becomes {mapping[old]} by another --map; "
                "give it one label"
            )
    return mapping


def note_on_values(mapping: Iterable[int], found: Iterable[int], where: str) -> Note | None:
    """Return a note on the values of --map that occur in no label map; None if all do."""
    missing = sorted({*mapping} - {*found})
    if not missing:
        return None
    return Note.of(NoteKind.VALUES_NOT_FOUND, what=where, numbers=missing)
