"""The files of a case and the regions that an evaluation measures, before label maps are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from crfrefine.base.array_types import NamesOfLabels
from crfrefine.base.label_options import REFERENCE
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import shorten
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.dataset_description import (
    DatasetDescription,
    read_dataset_description,
    read_descriptions,
)
from crfrefine.cases.label_names import MAP_OPTION, NO_NAMES, LabelNames, names_of, without_mapped
from crfrefine.cases.reading_options import ReadingOptions, find_regions
from crfrefine.errors import ConfigError
from crfrefine.evaluate.options import EvaluationOptions
from crfrefine.io.paths import is_folder, stem_of
from crfrefine.io.volume import VolumeHeader
from crfrefine.metrics.overlap import one_voxel
from crfrefine.metrics.regions import Region, Regions, make_region, parse_region


class CasePair(NamedTuple):
    """A case: its reference with the files of its image, and the files of each method."""

    reference: CaseFiles  # `labels` is the label map, unless there are structures.
    # Those of a method are a label map, or probabilities of all labels as its header says, in
    # `labels`; and logits or probabilities beside it, or alone, in `logits`.
    methods: Mapping[str, CaseFiles]
    # Logits or probabilities that the user named, of the methods that have some.
    named: dict[str, CaseFiles]

    @property
    def case_id(self) -> str:
        """Its name."""
        return self.reference.case_id

    def files_of(self, method: str) -> tuple[Path, ...]:
        """Return the files that are read of a method."""
        files = self.methods[method]
        masks = files.network[:1]
        if files.labels is not None:
            masks = (files.labels,)
        return tuple(dict.fromkeys((*masks, *self.named.get(method, files).network)))

    def label_map_of(self, method: str) -> Path | None:
        """Return the label map of a method, without suffix, or its folder of structures.

        None if it has only logits or probabilities.
        """
        files = self.methods[method]
        path = files.labels
        if files.structures:
            path = files.network[0].parent
        if path is None:
            return None
        path = path.resolve()
        if is_folder(path):
            return path
        return path.with_name(stem_of(path))

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files."""
        paths = [*self.reference.paths]
        for method in self.methods:
            paths += self.files_of(method)
        return tuple(paths)


@dataclass(frozen=True)
class MeasuredRegions:
    """The regions that are measured, as they are known before any label map is read."""

    options: EvaluationOptions
    # Foreground labels in `dataset.json`; those found in label maps are added.
    labels: tuple[int, ...] = ()
    # Sets of labels by their name.
    named: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    # Names of the regions whose mean Dice decides the verdict; empty means each label.
    judged: tuple[str, ...] = ()
    # Names of labels in the `dataset.json` of the reference, or of structures.
    label_names: NamesOfLabels = field(default_factory=dict)
    ignore_label: int | None = None  # Voxels where the reference has this label are ignored.
    # How the files of REFERENCE and of each method are read, with the names of labels in a
    # `dataset.json` beside them; empty for structures.
    readings: Mapping[str, ReadingOptions] = field(default_factory=dict)
    # Number of each structure by its name; empty without structures. Label maps are then folders of
    # structures, or their labels have these names.
    structures: Mapping[str, int] = field(default_factory=dict)
    # The labels of the run by their names, with which those of each file are matched; none if only
    # one side has names.
    names: LabelNames = NO_NAMES

    def tolerance_mm(self, spacing: Sequence[float]) -> float:
        """Return the tolerance of the surface Dice; `spacing` is that of the reference, in mm."""
        if isinstance(self.options.tolerance_mm, str):
            return one_voxel(spacing)
        return self.options.tolerance_mm

    def map_option(self, method: str) -> str:
        """Return the text before OLD=NEW to give values of a method new labels."""
        if method == self.options.name:
            return MAP_OPTION
        return f"{MAP_OPTION}{method}:"

    def names_in_file(self, header: VolumeHeader, method: str) -> dict[int, str]:
        """Return the names that a file itself gives labels, without those that `--map` numbers."""
        return without_mapped(names_of(header.segments), self.readings[method].mapping)

    def names_in(self, header: VolumeHeader, method: str) -> dict[int, str]:
        """Return the names by which the labels of a file are matched, `--map` aside.

        They are its own, or else those of a `dataset.json` beside it.
        """
        return self.names_in_file(header, method) or dict(self.readings[method].label_names)

    def all_regions(self, labels: Iterable[int]) -> Regions:
        """Return each label of `labels` and of these as a region, then the named regions."""
        regions: Regions = {}
        for label in sorted({*labels, *self.labels} - {0, self.ignore_label}):
            regions[str(label)] = (label,)
        regions.update(self.named)
        return regions


def find_measured(
    options: EvaluationOptions, structures: Mapping[str, int], notes: list[Note]
) -> MeasuredRegions:
    """Return the regions of the options and of a `dataset.json`.

    The file is beside the reference or above it; one beside a method says which of its channels are
    regions, and names labels. Neither applies to structures, given by name with their numbers.
    Raise ConfigError for unusable regions.
    """
    ignored = None
    if structures:
        names = {number: shorten(" ".join(name.split())) for name, number in structures.items()}
        description = DatasetDescription(options.labels, label_names=names)
    else:
        place = options.labels
        description = read_dataset_description(place) or DatasetDescription(place)
        ignored = options.ignore_label
        if ignored is None:
            ignored = description.ignore_label
    label_names = description.label_names
    scheme = find_regions(None, [description]).scheme
    if scheme is not None:
        label_names = {**scheme.label_names, **label_names}
    regions, judged = _find_regions(options.regions, description, label_names, ignored, notes)
    # A region that equals a label, such as "2=2", would appear twice.
    numbers = set().union(*description.labels.values())
    named = {}
    for name, labels in regions.items():
        number = structures.get(name, labels[0])
        if len(labels) == 1 and number != labels[0]:
            raise ConfigError(
                f"--regions {shorten(name)}={labels[0]}: the structure of this name has the "
                f"number {number}, as structures are numbered in the order of their names"
            )
        if name == str(labels[0]):
            numbers.add(labels[0])
        else:
            named[name] = labels

    return MeasuredRegions(
        options,
        labels=tuple(sorted(numbers - {0, ignored})),
        named=named,
        judged=judged,
        label_names=label_names,
        ignore_label=ignored,
        readings={} if structures else _find_readings(options),
        structures=structures,
    )


def _find_readings(options: EvaluationOptions) -> dict[str, ReadingOptions]:
    """Return how the files of the reference and of each method are read.

    The options and a `dataset.json` say so.
    """
    readings = {}
    for method, folder in {REFERENCE: options.labels, **options.methods}.items():
        probabilities = dict(options.probabilities).get(method, folder)
        places = (probabilities, folder, options.labels)
        mapping = options.mapping_of(method)
        names: dict[int, str] = {}
        for description in read_descriptions((folder, probabilities), []):
            names = {**description.label_names, **names}
        readings[method] = ReadingOptions(
            regions=find_regions(None, read_descriptions(places), options.channel_labels),
            mapped=tuple(("", old, new) for old, new in mapping.items()),
            add_background=options.add_background,
            scale=options.scale,
            label_names=without_mapped(names, mapping),
        )
    return readings


def _find_regions(
    texts: Sequence[str],
    description: DatasetDescription,
    label_names: NamesOfLabels,
    ignored: int | None,
    notes: list[Note],
) -> tuple[Regions, tuple[str, ...]]:
    """Return the labels of the regions that are asked for or described, and those to judge.

    Regions of a `dataset.json` that cannot be measured do not count, with a note. Raise ConfigError
    for two with one name, and for a name that is not allowed, or the label to ignore.
    """
    regions: Regions = {}
    for text in texts:
        name, labels = _as_label(parse_region(text), label_names)
        if regions.setdefault(name, labels) != labels:
            raise ConfigError(f"--regions {name}: appears twice, with different labels")
    asked = tuple(regions)

    described = {}
    try:
        for name, labels in description.labels.items():
            if description.has_regions and name != "ignore" and 0 not in labels:
                region, members = _as_label(make_region(name, labels), label_names)
                described[region] = members
    except ConfigError as error:  # The file's labels, and the one to ignore, are still valid.
        notes.append(NoteKind.BAD_REGIONS(str(description.path), problem=str(error)))
        described = {}
    for name, labels in described.items():
        regions.setdefault(name, labels)

    for name, labels in regions.items():
        if ignored in labels:
            raise ConfigError(
                f"region {name!r}: label {ignored} marks voxels that are ignored, "
                "it cannot belong to a region"
            )
    return regions, asked or tuple(described)


def _as_label(region: Region, label_names: NamesOfLabels) -> Region:
    """Return a region as its label if it has the label's name: the label already has a row."""
    name, labels = region
    if len(labels) == 1 and label_names.get(labels[0]) == shorten(name):
        return str(labels[0]), labels
    return region
