"""Which regions a run measures: each label, those named on the command line or in `dataset.json`, and which of them the verdict is on."""

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
    """What is known about regions before any label map is read.

    Attributes:
        labels: foreground labels that `dataset.json` names; those found in label maps come on top.
        named: sets of labels by their name.
        judged: names of the regions whose mean Dice the verdict is on; empty: each label.
        titles: what people call a region, by its name.
        ignore_label: voxels where the reference has it do not count.
        notes: what was left aside, a sentence each.
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
    """Find out which regions are asked for.

    Args:
        texts: each "NAME=1+3+4", or the name of a JSON file.
        labels: the reference; a `dataset.json` is looked for in its folder and in the one above.
        ignore_label: as asked for; None: as `dataset.json` says.

    Raises:
        ConfigError: a region is not written as expected, or has a name that is taken.
        InputError: a file of regions cannot be read as such.
    """
    notes: list[str] = []
    description, described = _describe(labels if labels.is_dir() else labels.parent, notes)
    ignored = ignore_label if ignore_label is not None or description is None else description.ignore_label
    asked = [region for text in texts for region in _parse(text)]
    named: dict[str, tuple[int, ...]] = {}
    for region in asked:
        if named.setdefault(region.name, region.labels) != region.labels:
            raise ConfigError(f"--regions {region.name}: is there twice, with different labels")
    names = tuple(named)
    for region in described:
        named.setdefault(region.name, region.labels)
    for name, members in named.items():
        _check_name(name, members)
        if ignored in members:
            raise ConfigError(f"region {name!r}: label {ignored} marks voxels that are ignored, it cannot belong to a region")
    # A region that is a label, such as "2=2", would be there twice.
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
    """Return what `dataset.json` says, and its regions: all of its labels where some of them are sets, and its entry "regions"."""
    try:
        description = read_dataset_description(folder)
    except InputError as error:
        notes.append(f"{error}; going on without it")
        return None, ()
    if description is None:
        return None, ()
    try:
        found = read_regions(description.path) if description.labels else ()
    except InputError as error:  # What it says of labels, and which one to ignore, holds all the same.
        notes.append(f"{error}; going on without its regions")
        found = ()
    labels = {" ".join(name.split()) for name in description.labels}
    if not description.has_regions:
        return description, tuple(region for region in found if region.name not in labels)
    # A label has a row of its own, whose title says its name: under that name alone it would be there twice.
    named = (
        Region(str(region.labels[0]), region.labels) if len(region.labels) == 1 and region.name in labels else region for region in found
    )
    return description, tuple(dict.fromkeys(named))


def _parse(text: str) -> tuple[Region, ...]:
    path = Path(text)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # Too long for the name of a file: a hundred labels; or it holds the character NUL.
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
        raise ConfigError(f"region {name!r}: is what the calibration of all labels together is called; choose another name")
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
