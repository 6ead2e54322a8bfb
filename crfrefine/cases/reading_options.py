"""How the files of a case are read: options, and declared labels and regions.

Files are checked against the declarations.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from crfrefine.arrays.probabilities import SUM_TOLERANCE, look_at
from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.base.array_types import NamesOfLabels
from crfrefine.base.label_options import REFERENCE, InputOptions, mapping_of
from crfrefine.base.limits import MAX_LABEL
from crfrefine.base.text import counted, listed, shorten
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.dataset_description import DatasetDescription
from crfrefine.cases.label_names import NO_NAMES, LabelNames
from crfrefine.errors import ConfigError, InputError

if TYPE_CHECKING:
    from crfrefine.base.array_types import Float32
    from crfrefine.io.headers import NetworkHeader
    from crfrefine.io.volume import VolumeHeader
    from crfrefine.parameters.model import CrfParameters

# Names with a meaning in `dataset.json`: no structure may have them.
RESERVED_NAMES = ("background", "ignore")
GIVEN = "--regions"
CHANNEL_LABELS = "--channel-labels"
_WRITTEN_BY_NNUNET = (
    '{"labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}, '
    '"regions_class_order": [1, 2, 3]}'
)
_MAX_OF_A_NAME = 200


class RegionReading(NamedTuple):
    """Which channels of a network's output are overlapping regions, and not labels."""

    scheme: RegionScheme | None = None  # None means that channels are labels
    source: str = ""  # the option or file that declares them; GIVEN if the user named them
    # The number of all labels: so many channels whose sum is 1 are a softmax over labels, in spite
    # of the regions. None if unknown.
    num_labels: int | None = None
    # The declared labels, in the order of their channels, background first; empty if none are.
    numbers: tuple[int, ...] = ()
    # why the declaration cannot be used: files that need it fail with this message
    problem: str = ""

    def declares(self, num_channels: int) -> bool:
        """Return whether so many channels are regions: labels need two, a region needs one."""
        return self.scheme is not None and num_channels == self.scheme.num_regions

    def labels_of_channels(self, num_channels: int) -> tuple[int, ...] | None:
        """Return the labels of so many channels, one each, background first.

        None means that the number of a channel is its label. Channels that are not as many as the
        declared labels have their numbers.
        """
        if num_channels != len(self.numbers) or self.numbers == tuple(range(num_channels)):
            return None
        return self.numbers

    def scheme_of(
        self, values: Float32, header: NetworkHeader | VolumeHeader
    ) -> RegionScheme | None:
        """Return the regions of a file's channels, (channels, [z,] y, x).

        None means that the channels are labels, as where their background was computed.
        """
        if len(values) != header.num_channels:
            return None
        if self.scheme is None or len(values) != self.num_labels:
            return self.scheme
        if len(values) != self.scheme.num_regions:
            return None
        # A softmax sums to 1. Zeros everywhere are no softmax, but regions that are nowhere.
        look = look_at(values)
        sums_to_one = look.outside is None and not look.bad_sums(SUM_TOLERANCE)
        if len(values) > 1 and sums_to_one and values.any():
            return None
        return self.scheme

    def require_number(self, header: NetworkHeader) -> None:
        """Raise InputError unless files have a channel for each declared label or region.

        Labels may lack the channel of the background, which is computed then. A label map has no
        channel, unless the user named regions.
        """
        if header.is_label_map:
            if self.source == GIVEN:
                raise InputError(
                    f"{header.path}: expected channels of the regions of {GIVEN}, found one value "
                    f"per voxel; a label map is refined as it is: leave {GIVEN} out"
                )
            if self.source == CHANNEL_LABELS:
                raise InputError(
                    f"{header.path}: expected channels of the labels of {CHANNEL_LABELS}, found a "
                    f"label map, whose values are labels: leave {CHANNEL_LABELS} out, or give them "
                    "other numbers with --map"
                )
            return
        num_channels = header.num_channels
        if header.num_labels in (self.num_labels, len(self.numbers)):
            return
        if self.declares(num_channels) and not header.lacks_background:
            return
        if self.scheme is None and self.num_labels is None and not self.problem:
            return
        problem = f"{header.path}: the network's output has {counted(num_channels, 'channel')}"
        if header.lacks_background:
            problem += ", without one for the background"
        if self.problem:
            raise InputError(
                f"{problem}, and whether these are regions is not clear\n  {self.problem}"
            )
        numbers = []
        regions = ""
        if self.scheme is not None:
            numbers.append(f"{self.scheme.num_regions}, one per region")
            regions = f"\n  {self.scheme.describe()}"
        labels = self.labels_of_channels(len(self.numbers))
        if labels is not None:
            numbers.append(f"{len(labels)}, one for each of the labels {listed(labels)}")
        if self.num_labels is not None and self.source != CHANNEL_LABELS:
            numbers.append(f"{self.num_labels}, one for each label from 0 to {self.num_labels - 1}")
        advice = (
            "Export all channels of the network, or put its own dataset.json beside its output."
        )
        if self.source == CHANNEL_LABELS:
            advice = "Give the label of each channel, background first"
        raise InputError(
            f"{problem}, expected {', or '.join(numbers)} of {self.source}{regions}\n  {advice}."
        )


NO_REGIONS = RegionReading()


def find_regions(
    requested: RegionScheme | None,
    descriptions: Iterable[DatasetDescription],
    channel_labels: tuple[int, ...] | None = None,
) -> RegionReading:
    """Return the meaning of channels, regions or labels: as the user says, or a `dataset.json`.

    The first `dataset.json` counts. Raises InputError for both regions and labels of channels.
    """
    if channel_labels is not None:
        if requested is not None:
            raise InputError(f"{GIVEN} and {CHANNEL_LABELS}: channels have one of the two")
        return RegionReading(None, CHANNEL_LABELS, len(channel_labels), channel_labels)
    if requested is not None:
        return RegionReading(requested, GIVEN)
    description = next(iter(descriptions), None)
    if description is None:
        return NO_REGIONS

    source = str(description.path)
    numbers = description.numbers
    num_labels = numbers[-1] + 1 if numbers else None
    order = description.regions_class_order
    try:
        if description.has_regions != (order is not None):
            raise ConfigError(
                "it has only one of regions of several labels and regions_class_order, the label "
                "that each region writes"
            )
        if order is None:
            return RegionReading(None, source, num_labels, numbers)
        regions = {}
        for name, labels in description.labels.items():
            # nnU-Net leaves the background out, too.
            if name != "ignore" and labels != (0,):
                regions[" ".join(name.split())] = labels
        return RegionReading(RegionScheme.of(regions, order), source, num_labels)
    except ConfigError as error:  # Files of a softmax over labels do without regions.
        problem = (
            f"{source}: {error}\n"
            f"  Region-based training of nnU-Net is described like this: {_WRITTEN_BY_NNUNET}"
        )
        return RegionReading(None, source, num_labels, problem=problem)


@dataclass(frozen=True)
class DeclaredLabels:
    """The labels that the label maps of a run may hold."""

    numbers: tuple[int, ...]  # ascending, background first
    source: str  # for messages: "study/dataset.json"
    # number of each by its name, if each has its own file
    structures: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_labels(self) -> int:
        """L: one more than the largest label, and at least two."""
        return max(2, self.numbers[-1] + 1)


def declared_labels(
    cases: Sequence[CaseFiles],
    descriptions: Sequence[DatasetDescription],
    parameters: CrfParameters | None,
) -> DeclaredLabels | None:
    """Return the labels that the label maps of a run may hold; None means any.

    Structures declare them, else the first `dataset.json` with labels, else the parameters.
    """
    if any(case.structures for case in cases):
        return number_structures(cases, descriptions)
    for description in descriptions:
        if description.labels:
            return DeclaredLabels(description.numbers or (0,), str(description.path))
    if parameters is None or parameters.num_labels is None:
        return None
    source = "the parameters, which have values per label"
    return DeclaredLabels(tuple(range(parameters.num_labels)), source)


def number_structures(
    cases: Sequence[CaseFiles], descriptions: Sequence[DatasetDescription] = ()
) -> DeclaredLabels:
    """Return the numbers of the structures of all cases.

    They are those of a `dataset.json` that names all of them, or their names if all of these are
    numbers, or else from 1, in the order of the names.
    Raises InputError if one has a reserved name, or if only some cases have a file per structure.
    """
    by_name: dict[str, Path] = {}  # a file of each structure
    for case in cases:
        if case.network and not case.structures:
            raise InputError(
                f"{case.network[0]}: a label map, but other cases have one file per structure; "
                "refine the two in separate runs"
            )
        by_name.update(zip(case.structures, case.network, strict=True))
    if len(by_name) > MAX_LABEL:
        folder = next(iter(by_name.values())).parent
        raise InputError(
            f"{folder}: {len(by_name)} structures; label maps hold at most {MAX_LABEL}"
        )
    for name, path in by_name.items():
        is_reserved = name in RESERVED_NAMES or name == "0"
        if is_reserved or shorten(name, _MAX_OF_A_NAME) != name:
            raise InputError(
                f"{shorten(path, 300)}: cannot name a structure: it must be printable, have at "
                f"most {_MAX_OF_A_NAME} characters, and be none of 0, {', '.join(RESERVED_NAMES)}. "
                "Rename the file or leave it out"
            )
    numbers = {name: number for number, name in enumerate(sorted(by_name), start=1)}
    as_numbers = {}
    for name in by_name:
        if re.fullmatch("[0-9]{1,5}", name) and 0 < int(name) <= MAX_LABEL:
            as_numbers[name] = int(name)
    if len({*as_numbers.values()}) == len(by_name):
        numbers = as_numbers
    for description in descriptions:
        described = description.numbers_by_name
        if described.keys() >= by_name.keys():
            numbers = {name: described[name] for name in by_name}
            break
    return DeclaredLabels((0, *sorted(numbers.values())), "the names of the structures", numbers)


def find_modality_names(
    cases: Iterable[CaseFiles], descriptions: Sequence[DatasetDescription]
) -> tuple[str, ...]:
    """Return the names of the modalities in order: those of a pattern, or of the last description.

    Empty if none has names.
    """
    for case in cases:
        if case.modalities and not case.problem:  # in the order of the files
            return case.modalities
    if not descriptions:
        return ()
    return descriptions[-1].channel_names


@dataclass(frozen=True, kw_only=True)
class ReadingOptions(InputOptions):
    """How the files of a case are read: as the user says, and as files beside them do."""

    mask_mode: str = "none"  # "none" or "nonzero" (any modality is not 0), if there is no mask file
    regions: RegionReading = NO_REGIONS  # which channels are regions, and not labels
    declared: DeclaredLabels | None = None  # the labels that label maps may hold; None means any
    # bytes that the arrays of a case may take; at most, and by default, the system's limit
    max_memory: int | None = None
    # names of labels, by number, and of modalities, in order, for notes, pictures and files
    label_names: NamesOfLabels = field(default_factory=dict)
    modality_names: tuple[str, ...] = ()
    # The labels by whose names those of each file are matched; and names in a `dataset.json` beside
    # references, of files without names.
    names: LabelNames = NO_NAMES
    reference_names: NamesOfLabels = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise InputError or ConfigError for options that exclude each other."""
        mapping_of(self.mapped)  # It raises for a value with two labels.
        if self.input_type in ("labels", "logits"):
            given = f"--input-type {self.input_type}"
            if self.add_background:
                raise InputError(
                    "--add-background: the background is computed from probabilities; "
                    f"leave {given} out"
                )
            if self.scale is not None:
                raise InputError(
                    f"--scale: probabilities are divided by it; leave {given} or --scale out"
                )
        if self.add_background and self.regions.source == GIVEN:
            raise InputError(
                f"--add-background: regions have no background; leave {GIVEN} or "
                "--add-background out"
            )

    @property
    def type_of_scores(self) -> str:
        """What channels are: the input type, or "probabilities" if they have a scale."""
        if self.scale is None:
            return self.input_type
        return "probabilities"

    @property
    def reference_mapping(self) -> dict[int, int]:
        """The new label of values in the reference; ConfigError if one has two."""
        return mapping_of(self.mapped, REFERENCE)

    @property
    def titles(self) -> dict[int, str]:
        """Names of the labels with their numbers: "1 anterior" for label 1, as in pictures."""
        return {label: f"{label} {name}" for label, name in self.label_names.items()}

    @property
    def num_declared(self) -> int:
        """L by the declared labels; 0 if none are declared, so that only voxels tell."""
        if self.declared is None:
            return 0
        return self.declared.num_labels


DEFAULT_READING = ReadingOptions()
