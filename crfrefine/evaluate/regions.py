"""The regions of a run: each label, those named on the command line or in `dataset.json`, and those that the verdict is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from crfrefine.base.text import shorten
from crfrefine.cases.dataset_description import DatasetDescription, read_dataset_description, read_descriptions
from crfrefine.errors import ConfigError, InputError
from crfrefine.metrics.regions import ALL_LABELS, Region, parse_region, read_regions


@dataclass(frozen=True)
class RegionPlan:
    """The regions as known before any label map is read."""

    labels: tuple[int, ...] = ()  # Foreground labels in `dataset.json`; those found in label maps are added.
    named: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # Sets of labels by their name.
    judged: tuple[str, ...] = ()  # Names of the regions whose mean Dice decides the verdict; empty: each label.
    titles: Mapping[str, str] = field(default_factory=dict)  # Displayed name of a region, by its name.
    ignore_label: int | None = None  # Voxels where the reference has this label are ignored.
    notes: tuple[str, ...] = ()  # Notes on ignored regions, one sentence each.

    def all_regions(self, labels: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Return each label as a region, those of `labels` and the planned ones, then the named regions."""
        numbers = sorted({*labels, *self.labels} - {0, self.ignore_label})
        return {**{str(label): (label,) for label in numbers}, **self.named}

    def with_structures(self, structures: Mapping[str, int]) -> RegionPlan:
        """Return the plan for label maps of structures (number by name), which have nothing to do with the labels of a `dataset.json`."""
        if not structures:
            return self
        named = {name: self.named[name] for name in self.judged}
        titles = {str(number): f"{number} {shorten(' '.join(name.split()))}" for name, number in structures.items()}
        return replace(self, labels=(), named=named, titles=titles, ignore_label=None)


def plan_regions(texts: Sequence[str], labels: Path, ignore_label: int | None) -> RegionPlan:
    """Determine the regions of a run.

    The texts are each "NAME=1+3+4", or the name of a JSON file; a `dataset.json` is searched beside the reference and in the folder above.

    Raises:
        ConfigError: a region has wrong syntax, or a name that is taken.
        InputError: a file of regions cannot be read.
    """
    notes: list[str] = []
    description, described = _describe(labels if labels.is_dir() else labels.parent, notes)
    ignored = ignore_label if ignore_label is not None or description is None else description.ignore_label
    titles = _titles(description)
    asked = [_as_label(region, titles) for text in texts for region in _parse(text, titles)]
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
    entries = (entry if isinstance(entry, tuple) else (entry,) for entry in (description.labels.values() if description else ()))
    numbers = {value for entry in entries for value in entry} - {0, ignored}
    return RegionPlan(
        labels=tuple(sorted(numbers | plain)),
        named=named,
        judged=names or tuple(region.name for region in described),
        titles=titles,
        ignore_label=ignored,
        notes=tuple(notes),
    )


def _describe(folder: Path, notes: list[str]) -> tuple[DatasetDescription | None, tuple[Region, ...]]:
    """Return the contents of `dataset.json` and its regions: all of its labels if some of them are sets, and its entry "regions"."""
    description = next(read_descriptions([folder], notes), None)
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
    titles = _titles(description)
    return description, tuple(dict.fromkeys(_as_label(region, titles) for region in found))


def _as_label(region: Region, titles: Mapping[str, str]) -> Region:
    """Return a label that has the name of the region; else the region.

    A label has its own row, whose title has its name: as a region of that name it would appear twice.
    """
    number = str(region.labels[0])
    if len(region.labels) == 1 and titles.get(number) == _title(number, region.name):
        return Region(number, region.labels)
    return region


def _parse(text: str, titles: dict[str, str]) -> tuple[Region, ...]:
    """Return the regions that a text or the file of that name has; names of labels in a `dataset.json` are added to the titles."""
    path = Path(text)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # Too long for a file name (a hundred labels), or with the character NUL.
        is_file = False
    if is_file:
        found = read_regions(path)
        if not found:
            raise InputError(f'{path}: holds no region; expected names and labels, such as {{"core": [1, 3, 4]}}')
        if path.name == "dataset.json":
            with suppress(InputError):  # Then its labels stay regions under their names.
                titles.update(
                    {number: title for number, title in _titles(read_dataset_description(path.parent)).items() if number not in titles}
                )
        return found
    if "=" not in text:
        raise ConfigError(f'--regions {shorten(text)}: no such file, and not a region such as "core=1+3+4"')
    return (parse_region(text),)


def _check_name(name: str, members: Sequence[int]) -> None:
    if name == ALL_LABELS:
        raise ConfigError(f"region {name!r}: is the name of the calibration of all labels together; choose another one")
    if name.isdigit() and name != "+".join(map(str, members)):
        raise ConfigError(f"region {name!r}: is the name of label {name}; choose another one")


def _titles(description: DatasetDescription | None) -> dict[str, str]:
    """Return "1 anterior" for label 1."""
    return {str(label): f"{label} {name}" for label, name in description.label_names.items()} if description else {}


def _title(number: str, name: str) -> str:
    return f"{number} {shorten(' '.join(name.split()))}"
