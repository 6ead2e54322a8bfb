"""Regions: named sets of labels, such as the whole tumor of BraTS."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from crfrefine.base.limits import MAX_LABEL
from crfrefine.base.text import shorten_value
from crfrefine.errors import ConfigError

RESERVED = "mean"  # Reports use this name for the mean over regions.
ALL_LABELS = "all"  # Tables use this name for the calibration of all labels together; with this row, no region may have it.
MAX_OF_A_NAME = 200  # Most characters of a region's name, which appears in tables.


class Region(NamedTuple):
    """A named set of labels."""

    name: str  # As reports show it.
    labels: tuple[int, ...]  # Distinct numbers, 1 or larger, ascending.


def parse_region(text: str) -> Region:
    """Read a region from the command line, such as "core=1+3+4"; raise ConfigError for another text."""
    name, _, labels = text.partition("=")
    parts = labels.split("+")
    if not all(
        re.fullmatch(r"\s*[0-9]{1,9}\s*", part) and 1 <= int(part) <= MAX_LABEL for part in parts
    ):
        expected = f'NAME=LABEL+LABEL+..., such as "core=1+3+4", with labels from 1 to {MAX_LABEL}'
        raise ConfigError(f"region {shorten_value(text)}: expected {expected}")
    return make_region(name, map(int, parts))


def make_region(name: str, labels: Iterable[int]) -> Region:
    """Return a region of labels of at least 1; raise ConfigError for a name that it may not have."""
    name = " ".join(name.split())  # no tabs or line breaks in tables
    if not 1 <= len(name) <= MAX_OF_A_NAME or name == RESERVED:
        rule = f'expected a name of 1 to {MAX_OF_A_NAME} characters that is not "{RESERVED}", the mean over regions'
        raise ConfigError(f"region {shorten_value(name)}: {rule}")
    return Region(name, tuple(sorted(set(labels))))
