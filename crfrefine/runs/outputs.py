"""The output files of `infer`: their names, what they must not replace, and whether they are there and whole."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from crfrefine.base.array_types import Labels
from crfrefine.base.inputs import check_no_input
from crfrefine.base.text import shorten
from crfrefine.errors import InputError
from crfrefine.io import is_whole, placed_on, read_header, read_labels
from crfrefine.io.atomic import check_replaceable
from crfrefine.io.paths import (
    WRITTEN_SUFFIXES,
    files_read,
    files_written,
    stem_of,
    suffix_of,
    suffix_to_write,
)
from crfrefine.io.volume import Segment, named_segments, segments_of
from crfrefine.runs.cases.case_files import CaseFiles
from crfrefine.runs.cases.dataset_description import read_dataset_description
from crfrefine.runs.cases.reading_options import RESERVED_NAMES
from crfrefine.runs.options import InferenceOptions
from crfrefine.runs.records import RECORD_FOLDER

_MAX_OF_A_STEM = 100

_PNG_ENDS = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"  # the first and the last bytes


@dataclass(frozen=True)
class OutputFiles:
    """The output files of a case; None, or no structures: not requested.

    Each structure's file has its name.
    """

    label_map: Path
    probabilities: Path | None = None
    logits: Path | None = None
    preview: Path | None = None
    # the number of each structure of the input, by its file
    structures: Mapping[Path, int] = field(default_factory=dict)
    # of one binary file per label, where the input has no structures; it holds nothing else
    folder: Path | None = None
    # of labels that no segment describes
    label_names: Mapping[int, str] = field(default_factory=dict)

    def all(self) -> tuple[Path, ...]:
        """Return the requested paths that are known from the beginning, the label map last."""
        return tuple(
            path
            for path in (
                self.probabilities,
                self.logits,
                self.preview,
                *self.structures,
                self.label_map,
            )
            if path is not None
        )

    def files_of_labels(self, labels: Labels, segments: Sequence[Segment]) -> dict[Path, Segment]:
        """Return the segment of each file in the folder: of all labels that occur, and of all that have a name."""
        assert self.folder is not None
        named = {
            label: name for label, name in self.label_names.items() if name not in RESERVED_NAMES
        }
        found: dict[str, tuple[Path, Segment]] = {}
        for segment in segments_of(labels, segments or named_segments(named)):
            # Such as `Niere__linke` for `Niere, linke`.
            stem = (
                re.sub(r"[^\w+-]", "_", segment.name)[:_MAX_OF_A_STEM] or f"Label_{segment.label}"
            )
            while stem.casefold() in found:
                stem = f"{stem}_{segment.label}"
            found[stem.casefold()] = self.folder / f"{stem}{suffix_of(self.label_map)}", segment
        return dict(found.values())


def plan_outputs(
    cases: Sequence[CaseFiles], options: InferenceOptions, label_names: Mapping[int, str]
) -> list[OutputFiles]:
    """Choose the output files of each case.

    `label_names` are of labels whose input does not name them.
    """
    output = options.output
    output_format = options.output_format
    writes_file = options.writes_file
    is_folder_run = (
        options.nnunet is not None or options.manifest is not None or options.images[0].is_dir()
    )
    suffix = suffix_of(output)
    expected = f"one of {', '.join(WRITTEN_SUFFIXES)}"
    if output_format is not None and output_format not in WRITTEN_SUFFIXES:
        raise InputError(f"--output-format {shorten(output_format)}: expected {expected}")
    if output_format is not None and writes_file:
        raise InputError(
            f"{output}: names a file, whose suffix is its format; leave --output-format out, or give a folder"
        )
    if writes_file and is_folder_run:
        raise InputError(
            f"{output}: the images are a folder, so the output must be a folder too, not a file name"
        )
    names_file = bool(output.suffix) and not output.is_dir() and not is_folder_run
    if (writes_file or names_file) and suffix not in WRITTEN_SUFFIXES:
        raise InputError(
            f"{output}: a label map cannot be written as {suffix or output.suffix}; expected {expected}, or a folder"
        )
    plans = []
    numbers = {name: number for number, name in label_names.items()}
    for files in cases:
        ending = output_format or (suffix_to_write(files.images[0]) if files.images else "")
        label_map = output if writes_file else output / (files.output or f"{files.case_id}{ending}")
        own = label_map.with_name(stem_of(label_map))
        outputs = OutputFiles(
            label_map,
            own.with_name(f"{own.name}_probabilities.nii.gz")
            if options.save_probabilities
            else None,
            own.with_name(f"{own.name}_logits.nii.gz") if options.save_logits else None,
            own.with_name(f"{own.name}_preview.png") if options.preview else None,
        )
        if options.save_structures and files.are_structures:
            structures = {
                own / f"{stem_of(path)}{suffix_to_write(path)}": numbers[stem_of(path)]
                for path in files.logits
            }
            outputs = replace(outputs, structures=structures)
        elif options.save_structures:
            outputs = replace(outputs, folder=own, label_names=label_names)
        plans.append(outputs)
    _check_paths(cases, plans, save_structures=options.save_structures)
    places = {path.parent.resolve() for files in cases for path in (*files.images, *files.logits)}
    # Structures are in a folder per case.
    of_structures = {
        (files.case_id, path.parent)
        for files in cases
        if files.are_structures
        for path in files.logits
    }
    places |= {
        folder.parent.resolve() for case_id, folder in of_structures if folder.name == case_id
    }
    if (
        is_folder_run and output.resolve() in places
    ):  # The next run would take results there as images or logits.
        raise InputError(
            f"{output}: holds the images or logits of this run; choose another folder for the results"
        )
    return plans


def _check_paths(
    cases: Sequence[CaseFiles], plans: Sequence[OutputFiles], *, save_structures: bool
) -> None:
    """Raise InputError if two cases have one output, or if an output would replace an input."""
    written_by: dict[str, str] = {}
    used: set[Path] = set()
    if save_structures:
        inputs = [
            path
            for files in cases
            for path in (*files.images, *files.logits, files.mask)
            if path is not None
        ]
        used = {path.resolve().parent for name in inputs for path in files_read(name)}
        used |= {outputs.label_map.parent.resolve() for outputs in plans}
    for files, outputs in zip(cases, plans, strict=True):
        if files.problem:
            continue
        written = [path for name in outputs.all() for path in files_written(name)]
        for path in (*written, outputs.folder):
            if path is None:
                other = files.case_id
            else:
                other = written_by.setdefault(os.path.realpath(path), files.case_id)
            if other != files.case_id:
                raise InputError(
                    f"{path}: an output of the case {other!r} and of {files.case_id!r}; choose another output for one of them"
                )
        if outputs.folder is not None:
            if outputs.folder.resolve() in used:
                where = f"{outputs.folder}, which holds other files; choose another output"
                raise InputError(f"case {files.case_id!r}: --save-structures writes into {where}")
            written += outputs.folder.glob(
                "*"
            )  # The names of the labels that a case has are not known yet.
        for path in written:
            check_no_input(path)


def check_summary_path(path: Path, plans: Sequence[OutputFiles]) -> None:
    """Raise InputError if the summary would be among the records of runs, would replace an output, or has the suffix of a volume."""
    if path.parent.name == RECORD_FOLDER:
        raise InputError(
            f"{path}: the folder {RECORD_FOLDER} is for the records that runs keep themselves; choose another folder"
        )
    check_replaceable(path)
    outputs = {
        os.path.realpath(written)
        for plan in plans
        for name in plan.all()
        for written in files_written(name)
    }
    if suffix_of(path) or os.path.realpath(path) in outputs:
        raise InputError(
            f"{path}: the summary would replace an output of this run, or has a volume's suffix; choose another name in .json"
        )


def is_complete(outputs: OutputFiles, files: CaseFiles) -> bool:
    """Return whether every output of a case exists, can be read to its end, and is on the grid of the case."""
    volumes = [path for path in outputs.all() if path != outputs.preview]
    if not all(path.is_file() for path in outputs.all()) or not all(map(is_whole, volumes)):
        return False
    if outputs.preview is not None:
        content = outputs.preview.read_bytes()
        start, end = _PNG_ENDS
        if not (content.startswith(start) and content.endswith(end)):
            return False
    if outputs.folder is not None:
        # Only a label map has any.
        if len(files.logits) == 1:
            segments = read_header(files.logits[0]).segments
        else:
            segments = ()
        label_files = outputs.files_of_labels(read_labels(outputs.label_map).data, segments)
        if not all(map(is_whole, label_files)):
            return False
        volumes += label_files
    image = read_header(files.images[0])
    headers = [placed_on(read_header(path), image) for path in volumes]
    return all(image.on_same_grid(header) and header.turned is None for header in headers)


def plan_names_file(structures: Mapping[str, int], output: Path) -> tuple[Path, bytes] | None:
    """Return the file for the names of structures in the output folder, and its content.

    None if the same names are there.
    """
    path = output / "dataset.json"
    labels = {"background": 0, **structures}
    if not os.path.lexists(path):
        check_replaceable(path)
        return path, (json.dumps({"labels": labels}, indent=1) + "\n").encode()
    description = read_dataset_description(output)
    expected = {name: (number,) for name, number in labels.items()}
    if description is not None and description.labels == expected:
        return None
    raise InputError(
        f"{path}: has other labels than the {len(structures)} structures of this run, whose names belong into it; choose another "
        "output folder, or remove the file"
    )
