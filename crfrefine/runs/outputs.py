"""The output files of `infer`: their names, what they must not replace, and whether they are there and whole."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.inputs import check_no_input
from crfrefine.base.text import shorten
from crfrefine.errors import InputError
from crfrefine.io import is_whole, placed_on, read_header, read_labels
from crfrefine.io.atomic import check_replaceable
from crfrefine.io.paths import WRITTEN_SUFFIXES, files_read, files_written, stem_of, suffix_of, suffix_to_write
from crfrefine.io.volume import Segment, named_segments, segments_of
from crfrefine.runs.cases.case_files import CaseFiles
from crfrefine.runs.cases.dataset_description import read_dataset_description
from crfrefine.runs.cases.reading_options import RESERVED_NAMES
from crfrefine.runs.options import InferenceOptions
from crfrefine.runs.records import RECORD_FOLDER

NAMES_FILE = "dataset.json"
_MAX_OF_A_STEM = 100

# The first and the last bytes of every PNG.
_PNG_ENDS = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"


@dataclass(frozen=True)
class LabelFiles:
    """The binary files of the labels of a case, for `--save-structures` of other inputs than structures; the label map decides which."""

    folder: Path  # holds nothing else
    suffix: str
    names: Mapping[int, str] = field(default_factory=dict)  # of labels that no segment describes

    def of(self, labels: NDArray[np.integer[Any]], segments: Sequence[Segment]) -> dict[Path, Segment]:
        """Return the segment of each file: of all labels that occur, and of all that have a name."""
        named = {label: name for label, name in self.names.items() if name not in RESERVED_NAMES}
        found: dict[str, tuple[Path, Segment]] = {}
        for segment in segments_of(labels, segments or named_segments(named)):
            # Such as `Niere__linke` for `Niere, linke`.
            stem = re.sub(r"[^\w+-]", "_", segment.name)[:_MAX_OF_A_STEM] or f"Label_{segment.label}"
            while stem.casefold() in found:
                stem = f"{stem}_{segment.label}"
            found[stem.casefold()] = self.folder / f"{stem}{self.suffix}", segment
        return dict(found.values())


@dataclass(frozen=True)
class OutputFiles:
    """The output files of a case; None, or no structures: not requested. Each structure's file has its name."""

    label_map: Path
    probabilities: Path | None = None
    logits: Path | None = None
    preview: Path | None = None
    structures: tuple[Path, ...] = ()  # a file for each that the input has
    labels: LabelFiles | None = None  # if the input has no files of structures

    def all(self) -> tuple[Path, ...]:
        """Return the requested paths, the label map last."""
        return tuple(path for path in (self.probabilities, self.logits, self.preview, *self.structures, self.label_map) if path is not None)


def plan_outputs(cases: Sequence[CaseFiles], options: InferenceOptions, label_names: Mapping[int, str]) -> list[OutputFiles]:
    """Choose the output files of each case; `label_names` are of labels whose input does not name them."""
    # Raise InputError if the output names a file though there may be several cases, if its format
    # holds no label maps, if two cases have one output, or if an output would replace an input.
    output, output_format, writes_file = options.output, options.output_format, options.writes_file
    suffix, expected = suffix_of(output), f"one of {', '.join(WRITTEN_SUFFIXES)}"
    if output_format is not None and output_format not in WRITTEN_SUFFIXES:
        raise InputError(f"--output-format {shorten(output_format)}: expected {expected}")
    if output_format is not None and writes_file:
        raise InputError(f"{output}: names a file, whose suffix is its format; leave --output-format out, or give a folder")
    if writes_file and options.is_folder_run:
        raise InputError(f"{output}: the images are a folder, so the output must be a folder too, not a file name")
    if not suffix and output.suffix and not output.is_dir() and not options.is_folder_run:
        raise InputError(f"{output}: unknown suffix; end the output file's name with {expected}, or give a folder")
    if writes_file and suffix not in WRITTEN_SUFFIXES:
        raise InputError(f"{output}: a label map cannot be written as {suffix}; expected {expected}")
    plans = []
    for files in cases:
        ending = output_format or (suffix_to_write(files.images[0]) if files.images else "")
        label_map = output if writes_file else output / (files.output or f"{files.case_id}{ending}")
        own = label_map.with_name(stem_of(label_map))
        has_files = options.save_structures and files.are_structures
        plans.append(
            OutputFiles(
                label_map,
                own.with_name(f"{own.name}_probabilities.nii.gz") if options.save_probabilities else None,
                own.with_name(f"{own.name}_logits.nii.gz") if options.save_logits else None,
                own.with_name(f"{own.name}_preview.png") if options.preview else None,
                tuple(own / f"{stem_of(path)}{suffix_to_write(path)}" for path in files.logits) if has_files else (),
                LabelFiles(own, suffix_of(label_map), label_names) if options.save_structures and not has_files else None,
            )
        )
    _check_paths(cases, plans, options)
    return plans


def _check_paths(cases: Sequence[CaseFiles], plans: Sequence[OutputFiles], options: InferenceOptions) -> None:
    """Raise InputError if two cases have one output, or if an output would replace an input."""
    # An output beside inputs is refused too, where the next run would take it as image or logits.
    written_by: dict[str, str] = {}
    used: set[Path] = set()
    if options.save_structures:
        inputs = [path for files in cases for path in (*files.images, *files.logits, files.mask) if path is not None]
        used = {path.resolve().parent for name in inputs for path in files_read(name)}
        used |= {outputs.label_map.parent.resolve() for outputs in plans}
    for files, outputs in zip(cases, plans, strict=True):
        if files.problem:
            continue
        written = [path for name in outputs.all() for path in files_written(name)]
        folders = [] if outputs.labels is None else [outputs.labels.folder]
        for path in (*written, *folders):
            other = written_by.setdefault(os.path.realpath(path), files.case_id)
            if other != files.case_id:
                raise InputError(f"{path}: an output of the case {other!r} and of {files.case_id!r}; choose another output for one of them")
        for folder in folders:
            if folder.resolve() in used:
                raise InputError(
                    f"case {files.case_id!r}: --save-structures writes into {folder}, which holds other files; choose another output"
                )
            written += folder.glob("*")  # The names of the labels that a case has are not known yet.
        for path in written:
            check_no_input(path)
    if not options.is_folder_run:
        return
    places = {path.parent.resolve() for files in cases for path in (*files.images, *files.logits)}
    # Structures are in a folder per case.
    of_structures = {(files.case_id, path.parent) for files in cases if files.are_structures for path in files.logits}
    places |= {folder.parent.resolve() for case_id, folder in of_structures if folder.name == case_id}
    if options.output.resolve() in places:
        raise InputError(f"{options.output}: holds the images or logits of this run; choose another folder for the results")


def check_summary_path(path: Path, plans: Sequence[OutputFiles]) -> None:
    """Raise InputError if the summary is a folder, would replace an output, or has the suffix of a volume."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file for the summary")
    if path.parent.name == RECORD_FOLDER:
        raise InputError(f"{path}: the folder {RECORD_FOLDER} is for the records that runs keep themselves; choose another folder")
    check_replaceable(path)
    outputs = {os.path.realpath(written) for plan in plans for name in plan.all() for written in files_written(name)}
    if suffix_of(path) or os.path.realpath(path) in outputs:
        raise InputError(f"{path}: the summary would replace an output of this run, or has a volume's suffix; choose another name in .json")


def is_complete(outputs: OutputFiles, files: CaseFiles) -> bool:
    """Return whether every output of a case exists, can be read to its end, and is on the grid of the case."""
    volumes = [path for path in outputs.all() if path != outputs.preview]
    if not all(path.is_file() for path in outputs.all()) or not all(map(is_whole, volumes)):
        return False
    if outputs.preview is not None:
        content, (start, end) = outputs.preview.read_bytes(), _PNG_ENDS
        if not (content.startswith(start) and content.endswith(end)):
            return False
    if outputs.labels is not None:
        # Of networks' outputs only a label map has segments.
        segments = read_header(files.logits[0]).segments if len(files.logits) == 1 else ()
        label_files = outputs.labels.of(read_labels(outputs.label_map).data, segments)
        if not all(map(is_whole, label_files)):
            return False
        volumes += label_files
    image = read_header(files.images[0])
    headers = [placed_on(read_header(path), image) for path in volumes]
    return all(image.on_same_grid(header) and header.turned is None for header in headers)


def plan_names_file(structures: Mapping[str, int], output: Path) -> tuple[Path, bytes] | None:
    """Return the file for the names of structures in the output folder, and its content; None if the same names are there."""
    path, labels = output / NAMES_FILE, {"background": 0, **structures}
    if not os.path.lexists(path):
        check_replaceable(path)
        return path, (json.dumps({"labels": labels}, indent=1) + "\n").encode()
    with suppress(InputError):
        description = read_dataset_description(output)
        if description is not None and description.labels == {name: (number,) for name, number in labels.items()}:
            return None
    raise InputError(
        f"{path}: has other labels than the {len(structures)} structures of this run, whose names belong into it; choose another "
        "output folder, or remove the file"
    )
