"""A case to refine: its files, how they are refined, and what it waits for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from crfrefine.cases.case import Case
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.dataset_description import Names
from crfrefine.cases.reading_options import ReadingOptions
from crfrefine.runs.contents import Content
from crfrefine.runs.options import InferenceOptions
from crfrefine.runs.outputs import OutputFiles
from crfrefine.runs.records import CaseRecord


@dataclass(frozen=True)
class Task:
    """A case to refine, and how; it can be sent to other machines."""

    files: CaseFiles
    outputs: OutputFiles
    options: InferenceOptions  # with the parameters of this case
    reading: ReadingOptions
    names: Names
    device: str  # as `get_backend` takes it
    held_out_by: str | None = None  # the fold with its parameters, if not those of all cases
    # The record of existing outputs, with --continue; None means that the case is refined.
    earlier: CaseRecord | None = None
    # Files that earlier runs wrote for the case, each with its checksum, and the contents of the
    # inputs that it is of if the settings were those of this run; and files of unknown origin
    # under names of its outputs.
    before: Mapping[Path, tuple[str, Mapping[str, Content]]] = field(default_factory=dict)
    unknown: tuple[Path, ...] = ()


@dataclass
class CaseInWork:
    """A case that was read."""

    task: Task
    record: CaseRecord
    case: Case | None = None  # None means that nothing is left to do, or that it failed
    input_bytes: int = 0  # that its input takes in memory, by an estimate


class Turns:
    """What a case waits for while others are in work; a case alone waits for nothing."""

    def take_memory(self, num_bytes: int) -> None:
        """Wait until the case, whose voxels will now be read, may take so much memory."""

    def take_more(self, num_bytes: int) -> None:
        """Take so much memory in all; an error begins the case again if there is less."""

    def end_computing(self) -> None:
        """The case is refined, and only has to be written."""

    def wait_to_name(self) -> None:
        """Wait until the files of the case, which are whole, may get their names."""


ALONE = Turns()
