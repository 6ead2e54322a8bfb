"""Regions: named sets of labels, such as the whole tumor of BraTS."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from crfrefine.base.limits import MAX_LABEL
from crfrefine.base.text import shorten, shorten_value
from crfrefine.errors import ConfigError

RESERVED = "mean"  # Reports use this name for the mean over regions.
ALL_LABELS = "all"  # Tables use this name for the calibration of all labels together; with this row, no region may have it.
MAX_OF_A_NAME = 200  # Most characters of a region's name, which appears in tables.
_MAX_DIGITS = 9
_EXAMPLE = 'such as "core=1+3+4"'


@dataclass(frozen=True)
class Region:
    """A named set of labels."""

    name: str  # As reports show it.
    labels: tuple[int, ...]  # Distinct numbers, 1 or larger, ascending.


def parse_region(text: str) -> Region:
    """Read a region from the command line, such as "core=1+3+4"; raise ConfigError for another text."""
    name, equals, labels = text.partition("=")
    if not equals:
        raise ConfigError(f"region {shorten_value(text)}: expected NAME=LABEL+LABEL+..., {_EXAMPLE}")
    try:
        return make_region(name, map(_label, labels.split("+")))
    except ValueError as error:
        raise ConfigError(f"region {shorten_value(text)}: {error}") from None


def make_region(name: str, labels: Iterable[int]) -> Region:
    """Return a region of labels of at least 1; raise ValueError for a name that it may not have."""
    name = " ".join(name.split())  # no tabs or line breaks in tables
    if not name:
        raise ValueError(f"it has no name; expected NAME=LABEL+LABEL+..., {_EXAMPLE}")
    if len(name) > MAX_OF_A_NAME:
        raise ValueError(f"a name of {len(name)} characters; at most {MAX_OF_A_NAME}")
    if name == RESERVED:
        raise ValueError(f'the name "{RESERVED}" is reserved for the mean over regions; choose another one')
    return Region(name, tuple(sorted(set(labels))))


def _label(text: str) -> int:
    text = text.strip()
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{shorten_value(text)} is not the number of a label; expected numbers of at least 1, {_EXAMPLE}")
    if not text.strip("0"):
        raise ValueError("label 0 is the background; regions hold labels of at least 1")
    if len(text) > _MAX_DIGITS or int(text) > MAX_LABEL:
        raise ValueError(f"label {shorten(text, 20)}: label maps hold labels up to {MAX_LABEL}")
    return int(text)
