"""The contents of nnU-Net's `dataset.json`, and the names that it gives to labels and modalities."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crfrefine.base.inputs import add_inputs
from crfrefine.base.limits import MAX_LABEL
from crfrefine.base.text import shorten, shorten_value
from crfrefine.errors import InputError
from crfrefine.io.json import read_json

_MAX_CHANNELS = 10_000
_MAX_DIGITS = 9  # Most digits of a channel or label number.
_EXAMPLE = '{"labels": {"background": 0, "tumor": 1}}'


@dataclass(frozen=True)
class DatasetDescription:
    """The contents of a `dataset.json` of nnU-Net."""

    path: Path  # the file
    channel_names: tuple[str, ...] = ()  # names of the modalities, in order
    # name to its number, or to the numbers of a region
    labels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    # the number of the label named "ignore": voxels without a reference
    ignore_label: int | None = None
    # The label that each region writes into the label map, in the order of the regions, if given.
    regions_class_order: tuple[int, ...] | None = None

    @property
    def label_names(self) -> dict[int, str]:
        """Names to show for the labels that have one, by number."""
        return {
            numbers[0]: shorten(" ".join(name.split()))
            for name, numbers in self.labels.items()
            if len(numbers) == 1
        }

    @property
    def has_regions(self) -> bool:
        """Whether labels are trained as overlapping regions, whose outputs are not a distribution over labels."""
        return any(len(numbers) > 1 for numbers in self.labels.values())

    @property
    def all_numbers(self) -> frozenset[int]:
        """The numbers of all labels, "ignore" aside."""
        return frozenset(
            number
            for name, numbers in self.labels.items()
            if name != "ignore"
            for number in numbers
        )

    @property
    def num_labels(self) -> int | None:
        """Channels of a softmax: one more than the largest label, "ignore" aside.

        None without labels.
        """
        return max((number + 1 for number in self.all_numbers), default=None)


def read_dataset_description(place: Path) -> DatasetDescription | None:
    """Read the `dataset.json` of a place; None without one. Raises like `read_descriptions`."""
    return next(read_descriptions([place]), None)


def read_descriptions(
    places: Iterable[Path], notes: list[str] | None = None
) -> Iterator[DatasetDescription]:
    """Yield the `dataset.json` of each folder, or of a file's, or of its parent, each once.

    One that cannot be used is an InputError, as it may say which labels count and what the channels
    are. Only callers that merely show names give `notes`: it becomes a sentence there.
    """
    known: set[Path] = set()
    for folder in (place if place.is_dir() else place.parent for place in places):
        candidates = (folder / "dataset.json", folder.parent / "dataset.json")
        path = next((candidate for candidate in candidates if os.path.lexists(candidate)), None)
        if path is None or path in known:
            continue
        known.add(path)
        try:
            add_inputs(path)
            yield _description_of(read_json(path), path)
        except (InputError, ValueError) as error:
            text = f"{path}: not a dataset.json as nnU-Net writes it: {str(error).removeprefix(f'{path}: ')}"
            if notes is None:
                advice = "mend it, or move it away if it describes something else"
                raise InputError(f"{text}; {advice}") from None
            notes.append(f"{text}; continuing without it")


def _description_of(content: Any, path: Path) -> DatasetDescription:
    """Return the contents of the entries used here.

    Raise a ValueError that names the key of an unusable one.
    """
    labels = content.get("labels", {}) if isinstance(content, Mapping) else None
    if not isinstance(labels, Mapping):
        raise ValueError(
            f"labels: expected a mapping with names and numbers, such as {_EXAMPLE}; got {shorten_value(labels)}"
        )
    if labels and all(
        _is_number(number) and isinstance(name, str) for number, name in labels.items()
    ):
        labels = _by_name(labels)
    numbers: dict[str, tuple[int, ...]] = {}
    for name, value in labels.items():  # the number of a label, or those of a region
        members = value if isinstance(value, list) else [value]
        numbers[name] = tuple(
            _label_number(number, f"labels.{shorten(name)}") for number in members
        )
    order = content.get("regions_class_order")
    if not isinstance(order, list | None):
        raise ValueError(
            f"regions_class_order: expected a list of labels, one per region, such as [1, 2, 3]; got {shorten_value(order)}"
        )
    if order is None:
        written = None
    else:
        written = tuple(_label_number(number, "regions_class_order") for number in order)
    key = "channel_names" if "channel_names" in content else "modality"
    channels = content.get(key, {})
    if isinstance(channels, Mapping) and all(map(_is_number, channels)):
        channels = [channels[number] for number in sorted(channels, key=int)]
    if not isinstance(channels, list) or not all(isinstance(name, str) for name in channels):
        raise ValueError(
            f'{key}: expected names by number, such as {{"0": "T1", "1": "FLAIR"}}; got {shorten_value(channels)}'
        )
    if len(channels) > _MAX_CHANNELS:
        raise ValueError(
            f"{key}: {len(channels)} channels; files of images are numbered from 0000 to {_MAX_CHANNELS - 1}"
        )
    return DatasetDescription(path, tuple(channels), numbers, _ignore_label(numbers), written)


def _by_name(names: Mapping[str, str]) -> dict[str, str]:
    """Return labels by number, as in older files, by name; ValueError if two have one name."""
    labels: dict[str, str] = {}
    for number, name in names.items():
        if name in labels:
            raise ValueError(
                f"labels: {labels[name]} and {number} are both named {shorten_value(name)}"
            )
        labels[name] = number
    return labels


def _ignore_label(numbers: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return the number of the label "ignore", if there is one; ValueError if it has several."""
    if "ignore" not in numbers:
        return None
    members = numbers["ignore"]
    if len(members) != 1:
        raise ValueError(f"labels.ignore: expected one label, got {shorten_value(list(members))}")
    return members[0]


def _label_number(value: Any, key: str) -> int:
    number = int(value) if isinstance(value, str) and _is_number(value) else value
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= MAX_LABEL:
        raise ValueError(
            f"{key}: expected a whole number from 0 to {MAX_LABEL}, got {shorten_value(value)}"
        )
    return number


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS


@dataclass(frozen=True)
class Names:
    """Names of labels and modalities, for notes, pictures and files."""

    labels: Mapping[int, str] = field(default_factory=dict)  # by number
    modalities: tuple[str, ...] = ()  # in order; empty if unknown

    @property
    def titles(self) -> dict[int, str]:
        """Names of the labels with their numbers, as pictures show them: "1 anterior" for label 1."""
        return {label: f"{label} {name}" for label, name in self.labels.items()}
