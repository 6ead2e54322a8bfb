"""Regions: named sets of labels, such as the whole tumor of BraTS, from the command line, a JSON file or nnU-Net's `dataset.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crfrefine.base.inputs import add_inputs
from crfrefine.base.labels import MAX_LABEL
from crfrefine.base.text import shorten, shorten_value
from crfrefine.errors import ConfigError, InputError
from crfrefine.io.json import read_json

RESERVED = "mean"
"""Reserved name: reports use it for the mean over regions."""

ALL_LABELS = "all"
"""Name that tables use for the calibration of all labels together; with this row, no region may have this name."""

MAX_OF_A_NAME = 200
"""Most characters of a region's name, which appears in tables."""

_MAX_DIGITS = 9
_EXAMPLE = 'such as "core=1+3+4"'


@dataclass(frozen=True)
class Region:
    """A named set of labels."""

    name: str  # As reports show it.
    labels: tuple[int, ...]  # Distinct numbers, 1 or larger, ascending.


def parse_region(text: str) -> Region:
    """Read a region from the command line, such as "core=1+3+4".

    Raises:
        ConfigError: the name is missing, or is not followed by labels joined by "+".
    """
    name, equals, labels = text.partition("=")
    if not equals:
        raise ConfigError(f"region {shorten_value(text)}: expected NAME=LABEL+LABEL+..., {_EXAMPLE}")
    try:
        return _region(name, labels)
    except ValueError as error:
        raise ConfigError(f"region {shorten_value(text)}: {error}") from None


def read_regions(path: Path) -> tuple[Region, ...]:
    """Read the regions of a JSON file.

    The file is either a mapping of names to labels, `{"whole": [1, 2, 3, 4], "core": "1+3+4", "enhancing": 4}`, or a `dataset.json` of
    nnU-Net: then each name of "labels" is a region, background and "ignore" aside, followed by those of a "regions" entry, if there is one.

    Raises:
        InputError: the file does not exist, is not JSON, or has an entry that is not a region; the message names the entry.
    """
    add_inputs(path)
    content = read_json(path)
    try:
        if not isinstance(content, Mapping):
            raise ValueError('expected a mapping of names to labels, such as {"core": [1, 3, 4]}')
        if not isinstance(content.get("labels"), Mapping):
            return _regions(content.items())
        regions = _regions_of_labels(content["labels"])
        extra = content.get("regions", {})
        if not isinstance(extra, Mapping):
            raise ValueError('"regions": expected a mapping of names to labels')
        # The same region in both places is not a contradiction.
        return _unique([*regions, *(region for region in _regions(extra.items()) if region not in regions)])
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def _regions_of_labels(labels: Mapping[Any, Any]) -> tuple[Region, ...]:
    if labels and all(str(key).isdigit() and isinstance(value, str) for key, value in labels.items()):
        labels = {name: str(number) for number, name in labels.items()}
    return _regions((name, value) for name, value in labels.items() if value not in (0, "0", [0], (0,)) and name != "ignore")


def _regions(entries: Iterable[tuple[Any, Any]]) -> tuple[Region, ...]:
    regions = []
    for name, labels in entries:
        try:
            regions.append(_region(str(name), labels))
        except ValueError as error:
            raise ValueError(f"region {shorten_value(name)}: {error}") from None
    return _unique(regions)


def _unique(regions: Sequence[Region]) -> tuple[Region, ...]:
    names = [region.name for region in regions]
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"region {shorten_value(twice)} appears twice, with different labels")
    return tuple(regions)


def _region(name: str, labels: Any) -> Region:
    name = " ".join(name.split())  # no tabs or line breaks in tables
    if not name:
        raise ValueError(f"it has no name; expected NAME=LABEL+LABEL+..., {_EXAMPLE}")
    if len(name) > MAX_OF_A_NAME:
        raise ValueError(f"a name of {len(name)} characters; at most {MAX_OF_A_NAME}")
    if name == RESERVED:
        raise ValueError(f'the name "{RESERVED}" is reserved for the mean over regions; choose another one')
    if isinstance(labels, str):
        labels = labels.split("+")
    elif not isinstance(labels, Sequence):
        labels = [labels]
    numbers = [_label(label) for label in labels]
    if not numbers:
        raise ValueError("it has no labels")
    return Region(name, tuple(sorted(set(numbers))))


def _label(value: Any) -> int:
    text = value.strip() if isinstance(value, str) else shorten_value(value)
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{shorten_value(value)} is not the number of a label; expected numbers of at least 1, {_EXAMPLE}")
    if not text.strip("0"):
        raise ValueError("label 0 is the background; regions hold labels of at least 1")
    if len(text) > _MAX_DIGITS or int(text) > MAX_LABEL:
        raise ValueError(f"label {shorten(text, 20)}: label maps hold labels up to {MAX_LABEL}")
    return int(text)
