"""The contents of nnU-Net's `dataset.json`: labels, regions, and names of labels and modalities."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from crfrefine.base.array_types import NamesOfLabels
from crfrefine.base.inputs import add_inputs
from crfrefine.base.limits import MAX_LABEL
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import shorten, shorten_value
from crfrefine.cases.patterns import folder_of
from crfrefine.errors import InputError
from crfrefine.io.json import read_json
from crfrefine.io.paths import holds_many

_MAX_CHANNELS = 10_000
_NUMBER = re.compile("[0-9]{1,9}")  # of a channel or label
_EXAMPLE = '{"labels": {"background": 0, "tumor": 1}}'


@dataclass(frozen=True)
class DatasetDescription:
    """The contents of a `dataset.json` of nnU-Net."""

    path: Path  # the file
    channel_names: tuple[str, ...] = ()  # names of the modalities, in order
    # name to its number, or to the numbers of a region
    labels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    # names to show for the labels that have one, by number
    label_names: NamesOfLabels = field(default_factory=dict)
    # The label that each region writes into the label map, in the order of the regions, if given.
    regions_class_order: tuple[int, ...] | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a `dataset.json`; InputError or ValueError unless it is as nnU-Net writes it."""
        add_inputs(path)
        content = read_json(path)
        labels = content.get("labels", {}) if isinstance(content, Mapping) else None
        if not isinstance(labels, Mapping):
            what = f"a mapping with names and numbers, such as {_EXAMPLE}"
            raise _unexpected("labels", what, labels)
        pairs = [*labels.items()]
        are_names = all(isinstance(name, str) for name in labels.values())
        if are_names and all(map(_NUMBER.fullmatch, labels)):  # by number, as in older files
            pairs = [(name, number) for number, name in pairs]
        numbers: dict[str, tuple[int, ...]] = {}
        label_names = {}
        for name, value in pairs:
            if name in numbers:
                first = numbers[name][0]
                raise ValueError(
                    f"labels: {first} and {value} are both named {shorten_value(name)}"
                )
            members = value if isinstance(value, list) else [value]
            numbers[name] = _label_numbers(members, f"labels.{shorten(name)}")
            if len(members) == 1:
                label_names[numbers[name][0]] = shorten(" ".join(name.split()))
        if len(numbers.get("ignore", (0,))) != 1:
            raise _unexpected("labels.ignore", "one label", [*numbers["ignore"]])
        order = content.get("regions_class_order")
        if order is not None:
            order = _label_numbers(order, "regions_class_order")

        key = "channel_names" if "channel_names" in content else "modality"
        names = content.get(key, {})
        if isinstance(names, Mapping) and all(map(_NUMBER.fullmatch, names)):
            names = [names[number] for number in sorted(names, key=int)]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise _unexpected(key, 'names by number, such as {"0": "T1", "1": "FLAIR"}', names)
        if len(names) > _MAX_CHANNELS:
            raise ValueError(
                f"{key}: {len(names)} channels; files of images are numbered from 0000 to "
                f"{_MAX_CHANNELS - 1}"
            )
        return cls(path, tuple(map(shorten, names)), numbers, label_names, order)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of all labels, background first, "ignore" aside; () without labels."""
        of_labels = (members for name, members in self.labels.items() if name != "ignore")
        numbers = set[int]().union(*of_labels)
        return tuple(sorted(numbers | {0})) if numbers else ()

    @property
    def numbers_by_name(self) -> dict[str, int]:
        """The number of each label that has a name, background aside."""
        return {name: number for number, name in self.label_names.items() if number}

    @property
    def has_regions(self) -> bool:
        """Whether labels are trained as overlapping regions, whose outputs are no distribution."""
        return any(len(members) > 1 for members in self.labels.values())

    @property
    def ignore_label(self) -> int | None:
        """The number of the label named "ignore": voxels without a reference."""
        return next(iter(self.labels.get("ignore", ())), None)


def read_dataset_description(place: Path) -> DatasetDescription | None:
    """Read the `dataset.json` of a place; None without one. Raises like `read_descriptions`."""
    return next(read_descriptions([place]), None)


def read_descriptions(
    places: Iterable[Path], notes: list[Note] | None = None
) -> Iterator[DatasetDescription]:
    """Yield the `dataset.json` of each folder, or of a file's, or of its parent, each once.

    An unusable one is an InputError, as it may name the labels that count and the channels.
    Only callers that merely show names give `notes`: it becomes one of them.
    """
    done = set()
    for place in places:
        folder = folder_of(place) if holds_many(place) else place.parent
        candidates = (folder / "dataset.json", folder.parent / "dataset.json")
        path = next((path for path in candidates if os.path.lexists(path)), None)
        if path is None or path in done:
            continue
        done.add(path)
        try:
            description = DatasetDescription.read(path)
        except (InputError, ValueError) as error:
            reason = str(error).removeprefix(f"{path}: ")
            problem = f"{path}: not a dataset.json as nnU-Net writes it: {reason}"
            if notes is None:
                advice = "mend it, or move it away if it describes something else"
                raise InputError(f"{problem}; {advice}") from None
            notes.append(NoteKind.BAD_DESCRIPTION(problem=problem))
        else:
            yield description


def _label_numbers(values: Any, key: str) -> tuple[int, ...]:
    """Return the labels of a list, numbers or texts of digits; ValueError for anything else."""
    if not isinstance(values, list):
        raise _unexpected(key, "a list of labels, one per region, such as [1, 2, 3]", values)
    numbers = []
    for value in values:
        number = value
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            number = int(value)
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= MAX_LABEL:
            raise _unexpected(key, f"a whole number from 0 to {MAX_LABEL}", value)
        numbers.append(number)
    return tuple(numbers)


def _unexpected(key: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"{key}: expected {expected}; got {shorten_value(value)}")
