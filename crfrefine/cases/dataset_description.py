"""The contents of nnU-Net's `dataset.json`: labels, regions, and names of labels and modalities."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crfrefine.base.inputs import add_inputs
from crfrefine.base.limits import MAX_LABEL
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import shorten, shorten_value
from crfrefine.cases.patterns import folder_of
from crfrefine.errors import InputError
from crfrefine.io.json import read_json
from crfrefine.io.paths import is_folder

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
    label_names: Mapping[int, str] = field(default_factory=dict)
    all_numbers: frozenset[int] = frozenset()  # of all labels, "ignore" aside
    # Whether labels are trained as overlapping regions. The outputs of these are not a distribution
    # over labels.
    has_regions: bool = False
    # the number of the label named "ignore": voxels without a reference
    ignore_label: int | None = None
    # The label that each region writes into the label map, in the order of the regions, if given.
    regions_class_order: tuple[int, ...] | None = None


def read_dataset_description(place: Path) -> DatasetDescription | None:
    """Read the `dataset.json` of a place; None without one. Raises like `read_descriptions`."""
    return next(read_descriptions([place]), None)


def read_descriptions(
    places: Iterable[Path], notes: list[Note] | None = None
) -> Iterator[DatasetDescription]:
    """Yield the `dataset.json` of each folder, or of a file's, or of its parent, each once.

    One that cannot be used is an InputError, as it may say which labels count and what the channels
    are. Only callers that merely show names give `notes`: it becomes one of them.
    """
    done: set[Path] = set()
    for place in places:
        place = folder_of(place)
        folder = place if is_folder(place) else place.parent
        candidates = (folder / "dataset.json", folder.parent / "dataset.json")
        path = next((path for path in candidates if os.path.lexists(path)), None)
        if path is None or path in done:
            continue
        done.add(path)
        try:
            description = _read(path)
        except (InputError, ValueError) as error:
            reason = str(error).removeprefix(f"{path}: ")
            problem = f"{path}: not a dataset.json as nnU-Net writes it: {reason}"
            if notes is None:
                advice = "mend it, or move it away if it describes something else"
                raise InputError(f"{problem}; {advice}") from None
            notes.append(Note.of(NoteKind.BAD_DESCRIPTION, problem=problem))
        else:
            yield description


def _read(path: Path) -> DatasetDescription:
    """Read a `dataset.json`; InputError or ValueError unless it is as nnU-Net writes it."""
    add_inputs(path)
    content = read_json(path)
    description = _describe_labels(path, content)
    order = content.get("regions_class_order")
    if order is not None and not isinstance(order, list):
        raise ValueError(
            "regions_class_order: expected a list of labels, one per region, such as [1, 2, 3]; "
            f"got {shorten_value(order)}"
        )
    if order is not None:
        order = tuple(_label_number(number, "regions_class_order") for number in order)

    key = "channel_names" if "channel_names" in content else "modality"
    names = content.get(key, {})
    if isinstance(names, Mapping) and all(map(_NUMBER.fullmatch, names)):
        names = [names[number] for number in sorted(names, key=int)]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f'{key}: expected names by number, such as {{"0": "T1", "1": "FLAIR"}}; '
            f"got {shorten_value(names)}"
        )
    if len(names) > _MAX_CHANNELS:
        raise ValueError(
            f"{key}: {len(names)} channels; files of images are numbered from 0000 to "
            f"{_MAX_CHANNELS - 1}"
        )
    channel_names = tuple(map(shorten, names))
    return replace(description, channel_names=channel_names, regions_class_order=order)


def _describe_labels(path: Path, content: Any) -> DatasetDescription:
    """Return what a file says of labels: numbers and names of each, and of each region."""
    labels = content.get("labels", {}) if isinstance(content, Mapping) else None
    if not isinstance(labels, Mapping):
        raise ValueError(
            f"labels: expected a mapping with names and numbers, such as {_EXAMPLE}; "
            f"got {shorten_value(labels)}"
        )
    are_names = all(isinstance(name, str) for name in labels.values())
    if are_names and all(map(_NUMBER.fullmatch, labels)):  # by number, as in older files
        by_name: dict[str, str] = {}
        for number, name in labels.items():
            if name in by_name:
                raise ValueError(
                    f"labels: {by_name[name]} and {number} are both named {shorten_value(name)}"
                )
            by_name[name] = number
        labels = by_name
    numbers: dict[str, tuple[int, ...]] = {}
    label_names = {}
    for name, value in labels.items():
        members = value if isinstance(value, list) else [value]
        key = f"labels.{shorten(name)}"
        numbers[name] = tuple(_label_number(member, key) for member in members)
        if len(members) == 1:
            label_names[numbers[name][0]] = shorten(" ".join(name.split()))
    ignored = numbers.get("ignore", ())
    if "ignore" in numbers and len(ignored) != 1:
        raise ValueError(f"labels.ignore: expected one label, got {shorten_value(list(ignored))}")
    of_labels = [members for name, members in numbers.items() if name != "ignore"]
    return DatasetDescription(
        path,
        labels=numbers,
        label_names=label_names,
        all_numbers=frozenset[int]().union(*of_labels),
        has_regions=any(len(members) > 1 for members in numbers.values()),
        ignore_label=next(iter(ignored), None),
    )


def _label_number(value: Any, key: str) -> int:
    number = value
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        number = int(value)
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= MAX_LABEL:
        raise ValueError(
            f"{key}: expected a whole number from 0 to {MAX_LABEL}, got {shorten_value(value)}"
        )
    return number
