"""A case to refine: its files, how they are refined, and what it waits for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from crfrefine.cases.case import Case
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.dataset_description import Names
from crfrefine.cases.reading_options import ReadingOptions
from crfrefine.runs.contents import FileBefore
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
    # Files that earlier runs wrote for the case, and those of unknown origin under names of its
    # outputs.
    before: Mapping[Path, FileBefore] = field(default_factory=dict)
    unknown: tuple[Path, ...] = ()


class CaseInWork:
    """A case that is read, refined and written: what is known of it, and what it waits for.

    Alone it waits for nothing.
    """

    record: CaseRecord  # since it is read

    def __init__(self, task: Task) -> None:
        self.task = task
        self.case: Case | None = None  # while it is in memory
        self.input_bytes = 0  # that its input takes in memory, by an estimate

    def take_memory(self, num_bytes: int) -> None:
        """Take so much memory in all: wait for it before the voxels are read.

        Later, an error begins the case again if there is less.
        """

    def enter_stage(self, stage: str, step: int = 0, num_steps: int = 0) -> None:
        """The case is in another stage of its refinement, or in the next step of one."""

    def end_computing(self) -> None:
        """The case is refined, and only has to be written."""

    def wait_to_name(self) -> None:
        """Wait until the files of the case, which are whole, may get their names."""
