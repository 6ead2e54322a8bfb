"""A case to refine: its files, and how they are refined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

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
