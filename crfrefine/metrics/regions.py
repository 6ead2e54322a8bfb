"""Regions: named sets of labels, such as the whole tumor of BraTS."""

from __future__ import annotations

import re
from collections.abc import Iterable

from crfrefine.base.limits import MAX_LABEL
from crfrefine.base.text import shorten_value
from crfrefine.errors import ConfigError

RESERVED = "mean"  # Reports use this name for the mean over regions.
# Tables use this name for the calibration of all labels together. In a table with this row, no
# region may have it.
ALL_LABELS = "all"
MAX_OF_A_NAME = 200  # Most characters of a region's name, which appears in tables.


# The name of a region, as reports show it, and its labels: distinct, 1 or larger, ascending.
Region = tuple[str, tuple[int, ...]]
Regions = dict[str, tuple[int, ...]]  # the labels of each region, by its name


def parse_region(text: str) -> Region:
    """Read a region such as "core=1+3+4" from the command line; raises ConfigError for others."""
    name, _, numbers = text.partition("=")
    labels = []
    for number in numbers.split("+"):
        if not re.fullmatch(r"\s*[0-9]{1,9}\s*", number) or not 1 <= int(number) <= MAX_LABEL:
            raise ConfigError(
                f"region {shorten_value(text)}: expected NAME=LABEL+LABEL+..., "
                f'such as "core=1+3+4", with labels from 1 to {MAX_LABEL}'
            )
        labels.append(int(number))
    return make_region(name, labels)


def make_region(name: str, labels: Iterable[int]) -> Region:
    """Return a region of labels from 1 up; raises ConfigError for a name that it may not have."""
    name = " ".join(name.split())  # no tabs or line breaks in tables
    members = tuple(sorted(set(labels)))
    if not 1 <= len(name) <= MAX_OF_A_NAME or name == RESERVED:
        raise ConfigError(
            f"region {shorten_value(name)}: expected a name of 1 to {MAX_OF_A_NAME} characters "
            f'that is not "{RESERVED}", the mean over regions'
        )
    if name == ALL_LABELS or (name.isdigit() and name != "+".join(map(str, members))):
        raise ConfigError(
            f"region {shorten_value(name)}: is the name of a label, or of all labels together; "
            "choose another one"
        )
    return name, members
