"""The output files of `infer`: their names, what they must not replace, and whether they are there and whole. `writing.py` writes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crfrefine.base.inputs import check_no_input, identities
from crfrefine.base.text import shorten
from crfrefine.errors import InputError
from crfrefine.io.atomic import check_replaceable
from crfrefine.io.paths import WRITTEN_SUFFIXES, stem_of, suffix_of
from crfrefine.io.recognition import files_read, files_written, suffix_to_write
from crfrefine.runs.infer.store import RECORD_FOLDER
from crfrefine.runs.infer.structure_names import LabelFiles

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from crfrefine.cases.case import CaseFiles
    from crfrefine.runs.infer.options import InferenceOptions

# Every PNG begins and ends with these bytes: its signature, and an empty chunk IEND with its checksum.
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


@dataclass(frozen=True)
class OutputFiles:
    """The output files of a case; None, or no structures: not requested. Each structure's file has its name."""

    label_map: Path
    probabilities: Path | None = None
    logits: Path | None = None
    preview: Path | None = None
    structures: tuple[Path, ...] = ()  # a file for each that the input has
    labels: LabelFiles | None = None  # if the input has no files of structures

    @property
    def structures_folder(self) -> Path | None:
        """The folder of the files of structures or labels."""
        if self.labels is not None:
            return self.labels.folder
        return self.structures[0].parent if self.structures else None

    def folders(self) -> set[Path]:
        """Return the folders that are written to."""
        return {path.parent for path in self.all()} | ({self.labels.folder} if self.labels is not None else set())

    def all(self) -> tuple[Path, ...]:
        """Return the requested paths, the label map last."""
        return tuple(path for path in (self.probabilities, self.logits, self.preview, *self.structures, self.label_map) if path is not None)

    def volumes(self) -> tuple[Path, ...]:
        """Return the requested paths except the picture, the label map first."""
        return tuple(path for path in (self.label_map, self.probabilities, self.logits, *self.structures) if path is not None)


def plan_outputs(cases: Sequence[CaseFiles], options: InferenceOptions, label_names: Mapping[int, str]) -> list[OutputFiles]:
    """Choose the output files of each case; `label_names` are of the labels whose input says nothing of them.

    Raise InputError if the output names a file though there may be several cases, if its format holds no label maps, or if an output
    would replace an input.
    """
    output, output_format = options.output, options.output_format
    suffix = suffix_of(output)
    if output_format is not None and output_format not in WRITTEN_SUFFIXES:
        raise InputError(f"--output-format {shorten(output_format)}: expected one of {', '.join(WRITTEN_SUFFIXES)}")
    if output_format is not None and options.writes_file:
        raise InputError(f"{output}: names a file, whose suffix is its format; leave --output-format out, or give a folder")
    if options.writes_file and options.is_folder_run:
        raise InputError(f"{output}: the images are a folder, so the output must be a folder too, not a file name")
    if not suffix and output.suffix and not output.is_dir() and not options.is_folder_run:
        raise InputError(
            f"{output}: unknown suffix; end the output file's name with one of {', '.join(WRITTEN_SUFFIXES)}, or give a folder"
        )
    plans = []
    for files, label_map in zip(cases, label_maps_of(cases, options).values(), strict=True):
        stem = stem_of(label_map)
        own = label_map.with_name(stem)
        written = options.save_structures
        plan = OutputFiles(
            label_map=label_map,
            probabilities=label_map.with_name(f"{stem}_probabilities.nii.gz") if options.save_probabilities else None,
            logits=label_map.with_name(f"{stem}_logits.nii.gz") if options.save_logits else None,
            preview=label_map.with_name(f"{stem}_preview.png") if options.preview else None,
            structures=tuple(own / f"{stem_of(path)}{suffix_to_write(path)}" for path in files.logits)
            if written and files.are_structures
            else (),
            labels=LabelFiles(own, suffix_of(label_map), label_names) if written and not files.are_structures else None,
        )
        plans.append(plan)
    if options.writes_file and suffix not in WRITTEN_SUFFIXES:
        raise InputError(f"{output}: a label map cannot be written as {suffix}; expected one of {', '.join(WRITTEN_SUFFIXES)}")
    _check_no_input_is_replaced(cases, plans, options)
    return plans


def label_maps_of(cases: Sequence[CaseFiles], options: InferenceOptions) -> dict[str, Path]:
    """Return where the label map of each case goes, by the case's name."""
    if options.writes_file:
        return {files.case_id: options.output for files in cases}
    found = {}
    for files in cases:
        name = files.output
        if name is None:
            suffix = options.output_format or (suffix_to_write(files.images[0]) if files.images else "")
            name = Path(f"{files.case_id}{suffix}")
        found[files.case_id] = options.output / name
    return found


def check_case_outputs(outputs: OutputFiles) -> None:
    """Raise CrfRefineError, before a case is computed, if the path of an output is something that must not be replaced."""
    for path in outputs.volumes():
        check_replaceable(*reversed(files_written(path)))
    if outputs.preview is not None:
        check_replaceable(outputs.preview)


def check_summary_path(path: Path, plans: Sequence[OutputFiles]) -> None:
    """Raise InputError if the summary is a folder, would replace an input or an output, or has the suffix of a volume."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file for the summary")
    if path.parent.name == RECORD_FOLDER:
        raise InputError(f"{path}: the folder {RECORD_FOLDER} is for the records that runs keep themselves; choose another folder")
    check_replaceable(path)
    written = [written for plan in plans for name in plan.all() for written in files_written(name)]
    if suffix_of(path) or identities(path) & set().union(*map(identities, written)):
        raise InputError(f"{path}: the summary would replace an output of this run, or has a volume's suffix; choose another name in .json")


def is_complete(outputs: OutputFiles, files: CaseFiles) -> bool:
    """Return whether every output of a case exists, can be read to its end, and is on the grid of the case."""
    from crfrefine.io import is_whole, placed_on, read_header, read_labels

    if not all(path.is_file() for path in outputs.all()):
        return False
    if outputs.preview is not None and not _is_whole_picture(outputs.preview):
        return False
    volumes = outputs.volumes()
    if not all(is_whole(path) for path in volumes):
        return False
    if outputs.labels is not None:
        # Only a label map says something of its labels, and no other output of a network.
        segments = read_header(files.logits[0]).segments if len(files.logits) == 1 else ()
        label_files = tuple(outputs.labels.of(read_labels(outputs.label_map).data, segments))
        if not all(is_whole(path) for path in label_files):
            return False
        volumes += label_files
    image = read_header(files.images[0])
    headers = [placed_on(read_header(path), image) for path in volumes]
    return all(image.on_same_grid(header) and header.turned is None for header in headers)


def _is_whole_picture(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return content.startswith(_PNG_START) and content.endswith(_PNG_END)


def _check_no_input_is_replaced(cases: Sequence[CaseFiles], plans: Sequence[OutputFiles], options: InferenceOptions) -> None:
    """Raise InputError if an output would replace an input, or be among them, where the next run would take it as image or logits."""
    used: set[Path] = set()
    if any(outputs.labels is not None for outputs in plans):
        inputs = [path for files in cases for path in (*files.images, *files.logits, files.mask) if path is not None]
        used = {path.resolve().parent for name in inputs for path in files_read(name)}
        used |= {outputs.label_map.parent.resolve() for outputs in plans}
    for files, outputs in zip(cases, plans, strict=True):
        written = [path for name in outputs.all() for path in files_written(name)]
        if outputs.labels is not None:
            if outputs.labels.folder.resolve() in used:
                raise InputError(
                    f"case {files.case_id!r}: --save-structures writes into the folder {outputs.labels.folder}, "
                    "which holds inputs or other outputs; choose another output folder"
                )
            # The names of the labels that a case has are not known yet.
            written += outputs.labels.folder.glob("*")
        for path in written:
            check_no_input(path)
    if not options.is_folder_run:
        return
    folders = {path.parent.resolve() for files in cases for path in (*files.images, *files.logits)}
    # Structures are in a folder per case.
    of_structures = {(files.case_id, path.parent) for files in cases if files.are_structures for path in files.logits}
    folders |= {folder.parent.resolve() for case_id, folder in of_structures if folder.name == case_id}
    if options.output.resolve() in folders:
        raise InputError(f"{options.output}: holds the images or logits of this run; choose another folder for the results")
