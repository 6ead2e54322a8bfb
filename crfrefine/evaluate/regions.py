"""The regions of a run: each label, those of the command line or of nnU-Net's `dataset.json`, and those that the verdict is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from crfrefine.base.text import shorten
from crfrefine.errors import ConfigError
from crfrefine.metrics.regions import ALL_LABELS, Region, make_region, parse_region
from crfrefine.runs.cases.dataset_description import read_descriptions


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

    The texts are each "NAME=1+3+4"; a `dataset.json` is searched beside the reference and in the folder above.

    Raises:
        ConfigError: a region has wrong syntax, or a name that is taken.
    """
    notes: list[str] = []
    description = next(read_descriptions([labels if labels.is_dir() else labels.parent], notes), None)
    ignored = ignore_label if ignore_label is not None or description is None else description.ignore_label
    titles = {str(label): f"{label} {name}" for label, name in description.label_names.items()} if description else {}
    entries = {name: value if isinstance(value, tuple) else (value,) for name, value in description.labels.items()} if description else {}
    asked = [parse_region(text) for text in texts]
    described: list[Region] = []
    if description is not None and description.has_regions:
        foreground = [(name, members) for name, members in entries.items() if name != "ignore" and 0 not in members]
        try:
            described = [make_region(name, members) for name, members in foreground]
        except ValueError as error:  # Its labels, and the one to ignore, are still valid.
            notes.append(f"{description.path}: {error}; continuing without its regions")
    # A label has its own row, whose title has its name: as a region of that name it would appear twice.
    asked, described = ([_as_label(region, titles) for region in regions] for regions in (asked, described))
    named: dict[str, tuple[int, ...]] = {}
    for region in asked:
        if named.setdefault(region.name, region.labels) != region.labels:
            raise ConfigError(f"--regions {region.name}: appears twice, with different labels")
    judged = tuple(named) or tuple(dict.fromkeys(region.name for region in described))
    for region in described:
        named.setdefault(region.name, region.labels)
    for name, members in named.items():
        if name == ALL_LABELS:
            raise ConfigError(f"region {name!r}: is the name of the calibration of all labels together; choose another one")
        if name.isdigit() and name != "+".join(map(str, members)):
            raise ConfigError(f"region {name!r}: is the name of label {name}; choose another one")
        if ignored in members:
            raise ConfigError(f"region {name!r}: label {ignored} marks voxels that are ignored, it cannot belong to a region")
    # A region that equals a label, such as "2=2", would appear twice.
    plain = {members[0] for name, members in named.items() if name == str(members[0])}
    named = {name: members for name, members in named.items() if name != str(members[0])}
    numbers = {value for members in entries.values() for value in members} - {0, ignored}
    return RegionPlan(tuple(sorted(numbers | plain)), named, judged, titles, ignored, tuple(notes))


def _as_label(region: Region, titles: Mapping[str, str]) -> Region:
    """Return the label that has the name of the region; else the region."""
    number = str(region.labels[0])
    is_label = len(region.labels) == 1 and titles.get(number) == f"{number} {shorten(region.name)}"
    return Region(number, region.labels) if is_label else region
