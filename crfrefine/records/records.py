"""The records of a run and of its cases, lines of a file per part in the output folder.

docs/reference/summary.md describes them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Self, TypeAlias

from crfrefine.base.failures import Failure
from crfrefine.base.label_options import InputOptions, notes_on_values
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.observer import Observer
from crfrefine.base.plain import Json, fields_from_plain
from crfrefine.base.text import listed
from crfrefine.errors import ConfigError
from crfrefine.io.json import to_json
from crfrefine.io.paths import files_written
from crfrefine.parameters.model import CrfParameters
from crfrefine.records.contents import LABEL_MAP, content_of, time_of_change
from crfrefine.version import __version__

SCHEMA = 2

RECORD_FOLDER = ".crfrefine"

# The checksum of a file that an earlier run has written, and those of the inputs that it was made
# of, or none if the run had other settings.
FileBefore: TypeAlias = tuple[str, Mapping[str, str | None]]

# In the statistics of a label, the volume of the largest component that vanished.
LARGEST_VANISHED = "largest_vanished_ml"

# The mark of fields of a run that results depend on, beside the parameters and the input options:
# what other options and each `dataset.json` say of the mask and of labels, and folds.
SETTING = {"is_setting": True}


@dataclass
class Record:
    """The outcome of a case, common to all commands."""

    case_id: str
    status: str = "failed"  # "failed", or another one of the command
    # seconds of each stage; "stage.part" is a part of a stage
    times: dict[str, float] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)  # assumptions about its files
    failures: list[Failure] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds spent on the case; its stages may have overlapped with other cases."""
        return sum(seconds for stage, seconds in self.times.items() if "." not in stage) + 0.0

    def fail(self, failure: Failure) -> None:
        """Mark the case as failed."""
        self.status = "failed"
        self.failures.append(failure)

    def has_failed_by(self, kind: type[Exception]) -> bool:
        """Return whether one of the failures is of this kind."""
        return any(failure.kind == kind.__name__ for failure in self.failures)


@dataclass
class CaseRecord(Record):
    """The outcome of a case: "done", "skipped" (its output existed) or "failed".

    Fields that it did not reach keep their defaults.
    """

    output: Path | None = None  # the label map
    written: str | None = None  # time of its last change, UTC
    probabilities: Path | None = None
    logits: Path | None = None
    preview: Path | None = None
    structures: Path | None = None
    # the checksum of each file that was written, by its name relative to the label map's folder
    files: dict[str, str] = field(default_factory=dict)
    grid_shape: tuple[int, ...] | None = None  # voxels along each axis
    spacing: tuple[float, ...] | None = None  # mm, one per grid axis
    num_labels: int | None = None  # L, background included
    num_modalities: int | None = None  # channels of the image
    mapped_values: tuple[int, ...] = ()  # of its label map, to which --map gave new labels
    num_voxels_in_mask: int | None = None
    # in the mask, but left out: all labels had the same logit
    num_padding_voxels: int | None = None
    voxels_removed: int | None = None  # of components that the small-object rules removed
    voxels_filled: int | None = None  # of holes that they filled
    input_type: str | None = None  # "logits", "probabilities" or "labels"
    held_out_by: str | None = None  # the fold of `train-crf` with its parameters, if not all cases
    # of the sigmoid channels; None means that channels are labels
    regions: dict[str, Any] | None = None
    # the content of the label map and of each kind of input, by which `--continue` sees changes
    contents: dict[str, dict[str, str]] = field(default_factory=dict)
    # the time of the last change of each file of strokes, by its name
    strokes: dict[str, str | None] = field(default_factory=dict)
    device: str | None = None
    num_iterations: int | None = None
    converged: bool | None = None
    energy: tuple[float, ...] = ()  # free energy per iteration
    filters: tuple[str, ...] = ()  # how each kernel was computed
    voxels_changed: int | None = None
    voxels_before: tuple[int, ...] = ()  # per label, background first
    voxels_after: tuple[int, ...] = ()
    # in the label map of the network, but not in the refined one
    vanished_labels: tuple[int, ...] = ()
    # of each label that occurs, as `label_statistics.measure` returns them; None: not requested
    statistics: list[dict[str, Any]] | None = None
    label_names: dict[str, str] = field(default_factory=dict)  # by number, of labels that occur

    @property
    def largest_vanished_ml(self) -> float:
        """The largest component of any label that vanished; 0 without one, or if unknown."""
        volumes = [row.get(LARGEST_VANISHED, 0.0) for row in self.statistics or ()]
        return max(volumes, default=0.0)

    def describes(self, label_map: Path) -> bool:
        """Return whether a label map is still the one that the case was given."""
        known = self.contents.get(LABEL_MAP)
        if known is None:  # The record is of an older version.
            return self.written == time_of_change(label_map)
        return content_of(files_written(label_map), known)["checksum"] == known.get("checksum")

    def to_dict(self) -> Json:
        """Return the fields of the JSON file."""
        fields = dict(vars(self))
        for name in ("times", "notes"):  # Longer entries go to the end.
            fields[name] = fields.pop(name)
        fields["notes"] = [note.to_dict() for note in self.notes]
        failure = Failure("", "")
        if self.failures:
            failure = self.failures[0]
        del fields["failures"]
        fields["error"] = failure.message or None
        fields["error_kind"] = failure.kind or None
        fields["error_traceback"] = failure.traceback
        return fields

    @classmethod
    def from_dict(cls, values: Json) -> Self:
        """Restore a record from its JSON.

        Raise TypeError or KeyError if a field has a value of another kind or is missing.
        """
        fields = fields_from_plain(cls, {**values, "failures": None})
        fields["status"] = values["status"]
        error = values.get("error")
        if isinstance(error, str):
            fields["failures"] = [Failure(error, str(values.get("error_kind")))]
        return cls(**fields)


@dataclass(kw_only=True)
class RunSummary:
    """A run: its settings, and the outcome of its cases as they end.

    Fields without a default must be in the line of a run, or it is none.
    """

    device: str
    threads: int
    parameters: dict[str, Any]  # as `CrfParameters.to_dict` returns them
    # with the labels of channels by a `dataset.json` if they are not 0, 1, 2, …
    input_options: InputOptions = field(default_factory=InputOptions)
    # "nonzero" by an option or the parameters
    mask_mode: str = field(default="none", metadata=SETTING)
    # of sigmoid channels, by the options or a `dataset.json`; None means that channels are labels
    regions: dict[str, Any] | None = field(default=None, metadata=SETTING)
    # that label maps may hold; empty: any
    declared_labels: tuple[int, ...] = field(default=(), metadata=SETTING)
    # how `-c auto` chose the parameters; None means that they were given
    choice: Mapping[str, Any] | None = None
    version: str = __version__  # of crfrefine
    requested_device: str = "auto"
    max_memory: int | None = None  # bytes that the run could take at its start, if a limit is known
    max_memory_source: str = ""  # what sets this limit, a phrase
    num_parts: int
    part_id: int  # from 0
    # by number, as headers, tables and names of files have them
    label_names: dict[int, str] = field(default_factory=dict, metadata=SETTING)
    # the fold of `train-crf` whose parameters a case gets, if not those of all cases
    held_out: dict[str, str] = field(default_factory=dict, metadata=SETTING)
    # of each such fold by its name, as `parameters`
    parameters_of_folds: dict[str, dict[str, Any]] = field(default_factory=dict, metadata=SETTING)
    num_cases: int = 0  # of this part
    # label map of each case of all parts, in the output folder
    all_cases: dict[str, str]
    output_folder: str = ""  # or for one case a file
    inputs: tuple[str, ...]
    working_folder: str = ""  # where relative paths of this run begin
    command: tuple[str, ...] = ()  # the arguments of the command line, if it was started from there
    resumed: bool  # whether label maps that were there were kept
    started: datetime
    seconds: float = 0.0  # wall time
    interrupted: bool = False  # whether it was stopped before the end
    cases: list[CaseRecord] = field(default_factory=list)  # one per processed case, in order

    def count(self, status: str) -> int:
        """Return the number of cases that are "done", "skipped" or "failed"."""
        return sum(record.status == status for record in self.cases)

    @property
    def component_changes(self) -> str:
        """The changes of components in all cases, as text; empty without statistics."""
        rows = [*chain.from_iterable(record.statistics or () for record in self.cases)]
        if not rows:
            return ""
        from crfrefine.metrics.lesion_matching import COMPONENT_CHANGES, changes_text

        text = changes_text([row.get(change, 0) for change in COMPONENT_CHANGES] for row in rows)
        worst = max(self.cases, key=lambda record: record.largest_vanished_ml)
        if worst.largest_vanished_ml:
            volume = f"{worst.largest_vanished_ml:.3g} ml"
            text += f"; the largest that vanished has {volume} ({worst.case_id})"
        return text

    @cached_property
    def settings(self) -> Json:
        """The settings that the results depend on, as JSON has them.

        Parameters that an older version lacked have their defaults.
        """
        settings = {**_completed(self.parameters), **self.input_options.to_dict()}
        for each in dataclasses.fields(self):
            if each.metadata == SETTING:
                settings[each.name] = getattr(self, each.name)
        folds = {name: _completed(values) for name, values in self.parameters_of_folds.items()}
        settings["parameters_of_folds"] = folds
        return dict(json.loads(to_json(settings)))

    def head(self) -> Json:
        """Return the line of the run in the record, plain values without the cases."""
        head: Json = {"schema": SCHEMA, "version": self.version}
        for each in dataclasses.fields(self):
            if each.name == "input_options":
                head |= self.input_options.to_dict()
            elif each.name != "cases":
                head[each.name] = getattr(self, each.name)
        head["started"] = self.started.isoformat()
        return head

    @classmethod
    def from_dict(cls, values: Json) -> Self:
        """Restore a run from its `head`; one of an older version has fewer fields.

        Raise ValueError, TypeError or KeyError if it is no line of a run.
        """
        if values["schema"] != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}, which this version of crfrefine writes")
        arguments = fields_from_plain(cls, values)
        arguments["input_options"] = InputOptions.from_dict(values)
        part_id = values["part_id"]
        if not 0 <= part_id < values["num_parts"]:
            raise ValueError(f"part {part_id} of {values['num_parts']}: parts are numbered from 0")
        if arguments["started"].tzinfo is None:
            raise ValueError("started: expected a time zone")
        return cls(**arguments)

    def to_json(self) -> str:
        """Return the text of the file of `--summary`."""
        content = self.head()
        for status in ("done", "skipped", "failed"):
            content[f"num_{status}"] = self.count(status)
        content["cases"] = [record.to_dict() for record in self.cases]
        return to_json(content, indent=2)


RunObserver = Observer[RunSummary, CaseRecord]


def path_of_part(path: Path, num_parts: int, part_id: int | None) -> Path:
    """Return the file of a part of a job array, `NAME-K-of-N.json`, so that no two parts share one.

    A run that is no part of several has the file itself.
    """
    if num_parts == 1:
        return path
    return path.with_name(f"{path.stem}-{part_id or 0}-of-{num_parts}{path.suffix}")


def _completed(parameters: Json) -> Json:
    """Return parameters with the defaults of keys that an older version lacked."""
    with suppress(ConfigError):  # A newer version may have more keys.
        return CrfParameters.from_dict(parameters).to_dict()
    return parameters


def notes_on_cases(records: Sequence[CaseRecord], mapping: Mapping[int, int]) -> list[Note]:
    """Return notes on cases with different numbers of labels, and on values that no case has.

    Those are the values of `mapping`, which is that of --map.
    """
    notes = []
    cases: dict[int, list[str]] = {}
    for record in records:
        # Undeclared label maps have as many labels as their largest one says.
        has_channels = record.input_type in ("logits", "probabilities")
        if has_channels and record.num_labels is not None:
            cases.setdefault(record.num_labels, []).append(record.case_id)
    if len(cases) > 1:
        groups = [f"{number} of {listed(case_ids)}" for number, case_ids in sorted(cases.items())]
        notes.append(NoteKind.NUMBERS_OF_LABELS(groups="; ".join(groups)))
    ended = [record for record in records if record.status != "failed"]
    # The content of a case that was done earlier may be unknown.
    if mapping and ended and all(record.input_type is not None for record in ended):
        found = chain.from_iterable(record.mapped_values for record in ended)
        notes += notes_on_values(mapping, found, "no label map")
    return notes
