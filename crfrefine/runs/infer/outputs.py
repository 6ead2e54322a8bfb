"""The outputs of `infer` for a case: their names, writing them, and whether they exist.

The label map is written last, so that its presence means that the case is complete.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from crfrefine.base.text import shorten
from crfrefine.cases.naming import Names
from crfrefine.errors import InputError
from crfrefine.io.atomic import check_replaceable, check_small_file, write_small_file
from crfrefine.io.dicom_identity import differences
from crfrefine.io.parallel import run_all
from crfrefine.io.paths import VOLUME_SUFFIXES, format_of, stem_of, suffix_of
from crfrefine.io.recognition import files_read, files_written, identities, suffix_to_write
from crfrefine.io.segments import Segment, named_segments
from crfrefine.io.special_files import special_kind
from crfrefine.runs.infer.run_record import RECORD_FOLDER
from crfrefine.runs.infer.structure_names import LabelFiles, segments_in

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from crfrefine.cases.case import CaseFiles
    from crfrefine.io.volume import Volume

# Every PNG begins and ends with these bytes: its signature, and an empty chunk IEND with its checksum.
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


@dataclass(frozen=True)
class OutputFiles:
    """The output files of a case; None, or no structures: not requested. Each structure's file has its name.

    Attributes:
        structures: a file for each that the input has.
        labels: the files of labels, if the input has no files of structures.
    """

    label_map: Path
    probabilities: Path | None = None
    logits: Path | None = None
    preview: Path | None = None
    structures: tuple[Path, ...] = ()
    labels: LabelFiles | None = None

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


@dataclass(frozen=True)
class ChannelPlanes:
    """Channels that are made when they are written.

    Attributes:
        num_channels: of the file.
        piece: returns planes of a channel in the order of storage, as `crfrefine.io.write_pieces` asks for them.
    """

    num_channels: int
    piece: Callable[[int, slice], NDArray[np.float32]]


Channels: TypeAlias = "NDArray[np.float32] | ChannelPlanes"
"""(L, *grid) float32, or channels that are made when they are written."""


@dataclass(frozen=True)
class RefinedArrays:
    """The arrays of a refined case to be written; None: not requested.

    Attributes:
        like: the case's first image: grid, format and header of the outputs.
        label_map: (*grid) integer.
        probabilities: the marginals.
        logits: the refined logits.
        structure_numbers: number of each structure by its name.
        image: (M, *grid) the image, for the preview.
        before: (*grid) integer, the network's labels, for the preview.
        title: first line of the preview.
        subtitle: second line of the preview.
        names: of labels and modalities, for the preview and for formats of segmentations.
        segments: what the label map or the structures that were refined say of the labels, if there are any.
    """

    like: Volume
    label_map: NDArray[Any]
    probabilities: Channels | None = None
    logits: Channels | None = None
    structure_numbers: Mapping[str, int] = field(default_factory=dict)
    image: NDArray[np.float32] | None = None
    before: NDArray[Any] | None = None
    title: str = ""
    subtitle: str = ""
    names: Names = field(default_factory=Names)
    segments: tuple[Segment, ...] = ()


def plan_outputs(
    cases: Sequence[CaseFiles],
    output: Path,
    *,
    folder_run: bool,
    probabilities: bool = False,
    logits: bool = False,
    preview: bool = False,
    structures: bool = False,
    label_names: Mapping[int, str] | None = None,
    also_read: Sequence[Path] = (),
    output_format: str | None = None,
) -> list[OutputFiles]:
    """Choose the output files of each case."""
    suffix = suffix_of(output)
    as_file = bool(suffix) and not output.is_dir()
    if output_format is not None and output_format not in VOLUME_SUFFIXES:
        raise InputError(f"--output-format {shorten(output_format)}: expected one of {', '.join(VOLUME_SUFFIXES)}")
    if output_format is not None and as_file:
        raise InputError(f"{output}: names a file, whose suffix is its format; leave --output-format out, or give a folder")
    if as_file and folder_run:
        raise InputError(f"{output}: the images are a folder, so the output must be a folder too, not a file name")
    if not as_file and not output.is_dir() and not folder_run and output.suffix:
        raise InputError(f"{output}: unknown suffix; end the output file's name with one of {', '.join(VOLUME_SUFFIXES)}, or give a folder")
    plans = []
    for files, label_map in zip(cases, label_maps_of(cases, output, output_format).values(), strict=True):
        stem = stem_of(label_map)
        plans.append(
            OutputFiles(
                label_map=label_map,
                probabilities=label_map.with_name(f"{stem}_probabilities.nii.gz") if probabilities else None,
                logits=label_map.with_name(f"{stem}_logits.nii.gz") if logits else None,
                preview=label_map.with_name(f"{stem}_preview.png") if preview else None,
                structures=_structure_files(files, label_map.with_name(stem)) if structures else (),
                labels=LabelFiles(label_map.with_name(stem), suffix_of(label_map), label_names or {})
                if structures and not files.are_structures
                else None,
            )
        )
    if as_file and suffix not in VOLUME_SUFFIXES:
        raise InputError(f"{output}: a label map cannot be written as {suffix}; expected one of {', '.join(VOLUME_SUFFIXES)}")
    _check_images(cases, plans)
    _check_no_input_is_replaced(cases, plans, also_read)
    if folder_run:
        _check_folder_of_its_own(cases, output)
    return plans


def _check_images(cases: Sequence[CaseFiles], plans: Sequence[OutputFiles]) -> None:
    """Raise InputError if the format of a label map or structure cannot be written for its image, or a package is missing."""
    for files, outputs in zip(cases, plans, strict=True):
        for path in (outputs.label_map, *outputs.structures):
            known = format_of(path)
            if known is not None and files.images:
                known.check_image(path, files.images[0])


def label_maps_of(cases: Sequence[CaseFiles], output: Path, output_format: str | None = None) -> dict[str, Path]:
    """Return where the label map of each case goes, by the case's name."""
    if suffix_of(output) and not output.is_dir():
        return {files.case_id: output for files in cases}
    return {files.case_id: output / (files.output or _named_by_case(files, output_format)) for files in cases}


def _named_by_case(files: CaseFiles, output_format: str | None) -> str:
    return f"{files.case_id}{output_format or (suffix_to_write(files.images[0]) if files.images else '')}"


def check_case_outputs(outputs: OutputFiles) -> None:
    """Raise CrfRefineError, before a case is computed, if the path of an output is something that must not be replaced."""
    for path in outputs.volumes():
        check_replaceable(*reversed(files_written(path)))
    if outputs.preview is not None:
        check_small_file(outputs.preview)


def check_summary_path(path: Path, cases: Sequence[CaseFiles], plans: Sequence[OutputFiles], also_read: Sequence[Path] = ()) -> None:
    """Raise InputError if the summary is a folder, would replace an input or an output, or has the suffix of a volume."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file for the summary")
    if path.parent.name == RECORD_FOLDER:
        raise InputError(f"{path}: the folder {RECORD_FOLDER} is for the records that runs keep themselves; choose another folder")
    check_small_file(path)
    if special_kind(path) is not None and not suffix_of(path):
        return  # A device or a pipe replaces no file.
    written = [written for plan in plans for name in plan.all() for written in files_written(name)]
    if suffix_of(path) or identities(path) & _inputs(cases, also_read).union(*map(identities, written)):
        raise InputError(f"{path}: the summary would replace a file of this run, or has a volume's suffix; choose another name in .json")


def is_complete(outputs: OutputFiles, files: CaseFiles) -> bool:
    """Return whether every output of a case exists, can be read to its end, and is on the grid of the case; DICOM also of its patient."""
    from crfrefine.io import is_whole, placed_on, read_header, read_labels

    if not all(path.is_file() for path in outputs.all()):
        return False
    if outputs.preview is not None and not _is_whole_picture(outputs.preview):
        return False
    volumes = outputs.volumes()
    if not all(is_whole(path) for path in volumes):
        return False
    if outputs.labels is not None:
        label_files = tuple(outputs.labels.of(read_labels(outputs.label_map).data, segments_in(files)))
        if not all(is_whole(path) for path in label_files):
            return False
        volumes += label_files
    image = read_header(files.images[0])
    headers = [placed_on(read_header(path), image) for path in volumes]
    return all(image.on_same_grid(header) and not differences(image.identity, header.identity) for header in headers)


def write_outcome(outcome: RefinedArrays, outputs: OutputFiles, *, threads: int = 1) -> None:
    """Write the results of a case, each file atomically, the label map last."""
    from crfrefine.io import write_label_map

    if outputs.probabilities is not None and outcome.probabilities is not None:
        _write_channels(outputs.probabilities, outcome.probabilities, outcome.like, "probabilities", threads)
    if outputs.logits is not None and outcome.logits is not None:
        _write_channels(outputs.logits, outcome.logits, outcome.like, "logits", threads)
    if outputs.preview is not None and outcome.image is not None and outcome.before is not None:
        _write_preview(outputs.preview, outcome, outcome.image, outcome.before)
    written = {path: outcome.structure_numbers[stem_of(path)] for path in outputs.structures}
    if outputs.labels is not None:
        written = {path: segment.label for path, segment in outputs.labels.of(outcome.label_map, outcome.segments).items()}
    run_all([partial(_write_structure, path, number, outcome) for path, number in written.items()], threads)
    segments = outcome.segments or named_segments(outcome.names.plain_labels)
    write_label_map(outputs.label_map, outcome.label_map, outcome.like, segments=segments)


def _write_channels(path: Path, channels: Channels, like: Volume, kind: str, threads: int) -> None:
    from crfrefine.io import write_channels, write_pieces

    if isinstance(channels, ChannelPlanes):
        write_pieces(path, like, channels.num_channels, channels.piece, kind=kind, threads=threads)
    else:
        write_channels(path, channels, like, kind=kind, threads=threads)


def _structure_files(files: CaseFiles, folder: Path) -> tuple[Path, ...]:
    """Return the files of the structures that the input of a case has, with the same names, in its folder."""
    if not files.are_structures:
        return ()
    return tuple(folder / f"{stem_of(path)}{suffix_to_write(path)}" for path in files.logits)


def _write_structure(path: Path, number: int, outcome: RefinedArrays) -> None:
    from crfrefine.io import write_label_map

    mask = (outcome.label_map == number).view("u1")
    segments = [replace(segment, label=1) for segment in outcome.segments if segment.label == number]
    write_label_map(path, mask, outcome.like, segments=segments)


def _is_whole_picture(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return content.startswith(_PNG_START) and content.endswith(_PNG_END)


def _write_preview(path: Path, outcome: RefinedArrays, image: NDArray[np.float32], before: NDArray[Any]) -> None:
    from crfrefine.pages.pictures.preview import draw_preview

    like = outcome.like
    picture = draw_preview(
        image,
        before,
        outcome.label_map,
        like.spacing,
        affine=like.affine,
        title=outcome.title,
        subtitle=outcome.subtitle,
        label_names=outcome.names.labels,
        modality_names=outcome.names.modalities,
    )
    write_small_file(path, picture)


def _inputs(cases: Sequence[CaseFiles], also_read: Sequence[Path]) -> set[Path | tuple[int, int]]:
    """Return the identities of all files that a run reads."""
    named = [path for files in cases for path in (*files.images, *files.logits, files.mask) if path is not None]
    read = [path for name in named for path in files_read(name)]
    return set().union(*map(identities, [*read, *also_read]))


def _check_no_input_is_replaced(cases: Sequence[CaseFiles], plans: Sequence[OutputFiles], also_read: Sequence[Path]) -> None:
    inputs = _inputs(cases, also_read)
    used = {path.parent.resolve() for path in inputs if isinstance(path, Path)} | {outputs.label_map.parent.resolve() for outputs in plans}
    for files, outputs in zip(cases, plans, strict=True):
        if outputs.labels is not None and outputs.labels.folder.resolve() in used:
            raise InputError(
                f"case {files.case_id!r}: --save-structures writes into the folder {outputs.labels.folder}, "
                "which holds inputs or other outputs; choose another output folder"
            )
        for path in (path for name in outputs.all() for path in files_written(name)):
            if identities(path) & inputs:
                raise InputError(f"case {files.case_id!r}: the output {path} would replace an input file; choose another output folder")


def _check_folder_of_its_own(cases: Sequence[CaseFiles], output: Path) -> None:
    """Raise if the outputs would be among the inputs, where the next run would take them as images or logits."""
    inputs = {path.parent.resolve() for files in cases for path in (*files.images, *files.logits)}
    # Structures are in a folder per case.
    of_structures = {(files.case_id, path.parent) for files in cases if files.are_structures for path in files.logits}
    inputs |= {folder.parent.resolve() for case_id, folder in of_structures if folder.name == case_id}
    if output.resolve() in inputs:
        raise InputError(f"{output}: holds the images or logits of this run; choose another folder for the results")
