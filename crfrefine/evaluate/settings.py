"""The settings that the values of a case depend on, with the regions that are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from crfrefine.base.text import shorten
from crfrefine.errors import ConfigError
from crfrefine.evaluate.options import EvaluationOptions
from crfrefine.metrics.regions import ALL_LABELS, Region, make_region, parse_region
from crfrefine.runs.cases.dataset_description import DatasetDescription, read_descriptions
from crfrefine.runs.cases.reading_options import RegionReading


@dataclass(frozen=True)
class Settings:
    """The settings that the values of a case depend on, besides its files.

    The regions are as known before any label map is read.
    """

    # Foreground labels in `dataset.json`; those found in label maps are added.
    labels: tuple[int, ...] = ()
    # Sets of labels by their name.
    named: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    # Names of the regions whose mean Dice decides the verdict; empty: each label.
    judged: tuple[str, ...] = ()
    # Displayed name of a region, by its name.
    titles: Mapping[str, str] = field(default_factory=dict)
    ignore_label: int | None = None  # Voxels where the reference has this label are ignored.
    tolerance_mm: float | str = 1.0  # Tolerance of the surface Dice, as of the options.
    # True if predictions on another grid are interpolated onto that of the reference.
    resample: bool = False
    # By method, which channels of its files are regions.
    channels: Mapping[str, RegionReading] = field(default_factory=dict)
    structures: Mapping[str, int] = field(default_factory=dict)  # As of the `Pairing`.
    add_background: bool = False  # True if files of several channels lack the background.

    def all_regions(self, labels: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Return each label as a region, those of `labels` and the planned ones, then the named regions."""
        numbers = sorted({*labels, *self.labels} - {0, self.ignore_label})
        return {**{str(label): (label,) for label in numbers}, **self.named}

    def with_structures(self, structures: Mapping[str, int]) -> Settings:
        """Return the settings for label maps of structures (number by name), which do not have the labels of a `dataset.json`."""
        if not structures:
            return self
        named = {name: self.named[name] for name in self.judged}
        titles = {
            str(number): f"{number} {shorten(' '.join(name.split()))}"
            for name, number in structures.items()
        }
        return replace(
            self, labels=(), named=named, titles=titles, ignore_label=None, structures=structures
        )


def make_settings(options: EvaluationOptions, notes: list[str]) -> Settings:
    """Return settings with the regions of the options and of a `dataset.json` beside the reference or above; may raise ConfigError."""
    description = next(read_descriptions([options.labels]), DatasetDescription(options.labels))
    ignored = description.ignore_label if options.ignore_label is None else options.ignore_label
    titles = {str(label): f"{label} {name}" for label, name in description.label_names.items()}
    foreground = {
        name: members
        for name, members in description.labels.items()
        if name != "ignore" and 0 not in members
    }
    described: list[Region] = []
    try:
        if description.has_regions:
            described = [_as_label(make_region(*entry), titles) for entry in foreground.items()]
        else:
            described = []
    except ConfigError as error:  # Its labels, and the one to ignore, are still valid.
        notes.append(f"{description.path}: {error}; continuing without its regions")
    named: dict[str, tuple[int, ...]] = {}
    for region in (_as_label(parse_region(text), titles) for text in options.regions):
        if named.setdefault(region.name, region.labels) != region.labels:
            raise ConfigError(f"--regions {region.name}: appears twice, with different labels")
    judged = tuple(named) or tuple(dict.fromkeys(region.name for region in described))
    named |= {region.name: region.labels for region in described if region.name not in named}
    for name, members in named.items():
        if name == ALL_LABELS or (name.isdigit() and name != "+".join(map(str, members))):
            raise ConfigError(
                f"region {name!r}: is the name of a label, or of all labels together; choose another one"
            )
        if ignored in members:
            raise ConfigError(
                f"region {name!r}: label {ignored} marks voxels that are ignored, it cannot belong to a region"
            )
    # A region that equals a label, such as "2=2", would appear twice.
    plain = {members[0] for name, members in named.items() if name == str(members[0])}
    named = {name: members for name, members in named.items() if name != str(members[0])}
    numbers = plain.union(*description.labels.values()) - {0, ignored}
    return Settings(
        tuple(sorted(numbers)),
        named,
        judged,
        titles,
        ignored,
        options.tolerance_mm,
        options.resample,
        add_background=options.add_background,
    )


def _as_label(region: Region, titles: Mapping[str, str]) -> Region:
    """Return the label that has the name of the region, since it has its own row.

    Else the region.
    """
    number = str(region.labels[0])
    is_label = len(region.labels) == 1 and titles.get(number) == f"{number} {shorten(region.name)}"
    if is_label:
        return Region(number, region.labels)
    return region
