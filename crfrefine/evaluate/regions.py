"""The regions of a run: each label, those named on the command line or in `dataset.json`, and those that the verdict is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from crfrefine.cases.discovery import DatasetDescription, read_dataset_description
from crfrefine.errors import ConfigError, InputError
from crfrefine.metrics.regions import ALL_LABELS, Region, parse_region, read_regions
from crfrefine.text import shorten


@dataclass(frozen=True)
class RegionPlan:
    """The regions as known before any label map is read.

    Attributes:
        labels: foreground labels in `dataset.json`; those found in label maps are added.
        named: sets of labels by their name.
        judged: names of the regions whose mean Dice decides the verdict; empty: each label.
        titles: displayed name of a region, by its name.
        ignore_label: voxels where the reference has this label are ignored.
        notes: what was ignored, one sentence each.
    """

    labels: tuple[int, ...] = ()
    named: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    judged: tuple[str, ...] = ()
    titles: Mapping[str, str] = field(default_factory=dict)
    ignore_label: int | None = None
    notes: tuple[str, ...] = ()

    def all_regions(self, labels: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Return each label as a region, those of `labels` and the planned ones, then the named regions."""
        numbers = sorted({*labels, *self.labels} - {0, self.ignore_label})
        return {**{str(label): (label,) for label in numbers}, **self.named}


def plan_regions(texts: Sequence[str], labels: Path, ignore_label: int | None) -> RegionPlan:
    """Determine the regions of a run.

    Args:
        texts: each "NAME=1+3+4", or the name of a JSON file.
        labels: the reference; a `dataset.json` is searched in its folder and in the parent folder.
        ignore_label: as given by the user; None: as in `dataset.json`.

    Raises:
        ConfigError: a region has wrong syntax, or a name that is taken.
        InputError: a file of regions cannot be read.
    """
    notes: list[str] = []
    description, described = _describe(labels if labels.is_dir() else labels.parent, notes)
    ignored = ignore_label if ignore_label is not None or description is None else description.ignore_label
    asked = [region for text in texts for region in _parse(text)]
    named: dict[str, tuple[int, ...]] = {}
    for region in asked:
        if named.setdefault(region.name, region.labels) != region.labels:
            raise ConfigError(f"--regions {region.name}: appears twice, with different labels")
    names = tuple(named)
    for region in described:
        named.setdefault(region.name, region.labels)
    for name, members in named.items():
        _check_name(name, members)
        if ignored in members:
            raise ConfigError(f"region {name!r}: label {ignored} marks voxels that are ignored, it cannot belong to a region")
    # A region that equals a label, such as "2=2", would appear twice.
    plain = {members[0] for name, members in named.items() if name == str(members[0])}
    named = {name: members for name, members in named.items() if name != str(members[0])}
    numbers = {value for entry in (description.labels.values() if description else ()) for value in _numbers(entry)} - {0, ignored}
    return RegionPlan(
        labels=tuple(sorted(numbers | plain)),
        named=named,
        judged=names or tuple(region.name for region in described),
        titles=_titles(description),
        ignore_label=ignored,
        notes=tuple(notes),
    )


def _describe(folder: Path, notes: list[str]) -> tuple[DatasetDescription | None, tuple[Region, ...]]:
    """Return the contents of `dataset.json` and its regions: all of its labels if some of them are sets, and its entry "regions"."""
    try:
        description = read_dataset_description(folder)
    except InputError as error:
        notes.append(f"{error}; continuing without it")
        return None, ()
    if description is None:
        return None, ()
    try:
        found = read_regions(description.path) if description.labels else ()
    except InputError as error:  # Its labels, and the one to ignore, are still valid.
        notes.append(f"{error}; continuing without its regions")
        found = ()
    labels = {" ".join(name.split()) for name in description.labels}
    if not description.has_regions:
        return description, tuple(region for region in found if region.name not in labels)
    # A label has its own row, whose title has its name: as a region of that name it would appear twice.
    named = (
        Region(str(region.labels[0]), region.labels) if len(region.labels) == 1 and region.name in labels else region for region in found
    )
    return description, tuple(dict.fromkeys(named))


def _parse(text: str) -> tuple[Region, ...]:
    path = Path(text)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # Too long for a file name (a hundred labels), or with the character NUL.
        is_file = False
    if is_file:
        found = read_regions(path)
        if not found:
            raise InputError(f'{path}: holds no region; expected names and labels, such as {{"core": [1, 3, 4]}}')
        return found
    if "=" not in text:
        raise ConfigError(f'--regions {shorten(text)}: no such file, and not a region such as "core=1+3+4"')
    return (parse_region(text),)


def _check_name(name: str, members: Sequence[int]) -> None:
    if name == ALL_LABELS:
        raise ConfigError(f"region {name!r}: is the name of the calibration of all labels together; choose another one")
    if name.isdigit() and name != "+".join(map(str, members)):
        raise ConfigError(f"region {name!r}: is the name of label {name}; choose another one")


def _numbers(entry: int | tuple[int, ...]) -> tuple[int, ...]:
    return entry if isinstance(entry, tuple) else (entry,)


def _titles(description: DatasetDescription | None) -> dict[str, str]:
    """Return "1 anterior" for label 1."""
    titles: dict[str, str] = {}
    for name, entry in description.labels.items() if description else ():
        numbers = _numbers(entry)
        if len(numbers) == 1:
            titles[str(numbers[0])] = f"{numbers[0]} {shorten(' '.join(name.split()))}"
    return titles
