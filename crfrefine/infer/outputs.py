"""The output files of `infer`.

Their names, what they must not replace, which earlier ones they do, and whether they are whole.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from crfrefine.base.array_types import Labels, NamesOfLabels
from crfrefine.base.inputs import check_no_input
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import shorten
from crfrefine.cases.case_files import CaseFiles, CaseList
from crfrefine.cases.frame import grid_of_archive
from crfrefine.cases.label_input import segments_of_label_map
from crfrefine.cases.reading_options import RESERVED_NAMES, ReadingOptions
from crfrefine.errors import InputError
from crfrefine.infer.options import InferenceOptions
from crfrefine.io import is_intact, placed_on, read_header, read_labels
from crfrefine.io.formats import WRITTEN_SUFFIXES
from crfrefine.io.paths import files_written, require_suffix, stem_of, suffix_of, suffix_to_write
from crfrefine.io.volume import Segment, named_segments, segment_files, segments_of
from crfrefine.io.writing import check_replaceable
from crfrefine.records.contents import Contents, checksums_of_inputs, content_of, contents_of_inputs
from crfrefine.records.records import FileBefore

_ONE_OF_SUFFIXES = f"one of {', '.join(WRITTEN_SUFFIXES)}"
# After the name of the case: of probabilities, logits and the preview.
_ENDINGS = ("_probabilities.nii.gz", "_logits.nii.gz", "_preview.png")

# The first and the last bytes of a PNG file.
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


def optional_files(label_map: Path) -> list[Path]:
    """Return the names beside a label map: of probabilities, logits and the preview."""
    stem = stem_of(label_map)
    return [label_map.with_name(stem + ending) for ending in _ENDINGS]


@dataclass(frozen=True)
class OutputFiles:
    """The output files of a case; None, or no structures: not requested.

    Each structure's file has its name.
    """

    label_map: Path
    probabilities: Path | None = None
    logits: Path | None = None
    preview: Path | None = None
    # the probabilities again, as `nnUNetv2_ensemble` takes them, and the file beside the input that
    # it needs beside them, if there is one
    archive: Path | None = None
    properties: Path | None = None
    # the number of each structure of the input, by its file
    structures: Mapping[Path, int] = field(default_factory=dict)
    # of one binary file per label, where the input has no structures; it holds nothing else
    folder: Path | None = None
    # Files that earlier runs wrote for the case, and this run does not.
    before: Mapping[Path, FileBefore] = field(default_factory=dict)
    # Files without a record that are there under the names of options which are not given now.
    unknown: Collection[Path] = ()

    @classmethod
    def of_case(
        cls,
        files: CaseFiles,
        options: InferenceOptions,
        numbers: Mapping[str, int],
        is_nnunet: Callable[[Path], bool] | None,
    ) -> OutputFiles:
        """Return the output files of a case, by its name or as the manifest says.

        `numbers` are those of the structures, by name.

        There is an archive if the logits are one in a folder that `is_nnunet` says is nnU-Net's.
        None means that no probabilities are saved.
        """
        label_map = options.output
        if not options.writes_file:
            suffix = options.output_format or ""
            if files.images and not suffix:
                suffix = suffix_to_write(files.images[0])
            label_map /= files.output or f"{files.case_id}{suffix}"
        stem = stem_of(label_map)
        are_wanted = (options.save_probabilities, options.save_logits, options.preview)
        pairs = zip(optional_files(label_map), are_wanted, strict=True)
        probabilities, logits, preview = [path if is_wanted else None for path, is_wanted in pairs]
        outputs = cls(label_map, probabilities, logits, preview)
        scores = [path for path in files.network if suffix_of(path) == ".npz"]
        may_be_nnunet = len(scores) == 1 and not options.writes_file
        if is_nnunet is not None and may_be_nnunet and is_nnunet(scores[0].parent):
            properties = scores[0].with_suffix(".pkl")
            outputs = replace(
                outputs,
                archive=label_map.with_name(f"{stem}.npz"),
                properties=properties if properties.is_file() else None,
            )
        if not options.save_structures:
            return outputs
        folder = label_map.with_name(stem)
        if not files.structures:
            return replace(outputs, folder=folder)
        structures = {}
        for name, path in zip(files.structures, files.network, strict=True):
            structures[folder / f"{name}{suffix_to_write(path)}"] = numbers[name]
        return replace(outputs, structures=structures)

    def all(self) -> tuple[Path, ...]:
        """Return the requested paths that are known from the beginning, the label map last."""
        optional = (self.probabilities, self.logits, self.preview, self.archive)
        requested = [path for path in optional if path is not None]
        return (*requested, *self.structures, self.label_map)

    def files_of_labels(
        self,
        labels: Labels,
        segments: Sequence[Segment],
        label_names: NamesOfLabels,
        vanished: Sequence[int] = (),
    ) -> dict[Path, int]:
        """Return the label of each file in the folder.

        It is of a label that occurs, of one that has vanished, whose file is empty, or of one that
        has a name: that of its segment, or without segments one of `label_names`.
        """
        assert self.folder is not None
        if not segments:
            named = named_segments(label_names)
            segments = [segment for segment in named if segment.name not in RESERVED_NAMES]
        occurring = segments_of(labels, segments, vanished)
        files = segment_files(self.folder, occurring, suffix_of(self.label_map))
        return {path: segment.label for path, segment in files.items()}

    def check_paths(
        self, case_id: str, written_by: dict[str, str], occupied: Collection[str]
    ) -> None:
        """Raise InputError if another case has an output of this one, or one replaces an input.

        `written_by` gets the case of each real path. The folder of labels must be none of those
        `occupied` by label maps.
        """
        for path in (*self.structures, self.label_map):
            require_suffix(path)
        written = [file for path in self.all() for file in files_written(path)]
        places = [*written]
        if self.folder is not None:
            places.append(self.folder)
        for path in places:
            other = written_by.setdefault(os.path.realpath(path), case_id)
            if other != case_id:
                raise InputError(
                    f"{path}: an output of the case {other!r} and of {case_id!r}; "
                    "choose another output for one of them"
                )
        if self.folder is not None:
            if os.path.realpath(self.folder) in occupied:
                where = f"{self.folder}, which holds other files; choose another output"
                raise InputError(f"case {case_id!r}: --save-structures writes into {where}")
            # The names of the labels that a case has are not known yet.
            written += self.folder.glob("*")
        for path in written:
            check_no_input(path)

    def require_no_stale_input(self, files: CaseFiles) -> None:
        """Raise InputError if `remove_stale` would remove an input, before the case is refined."""
        for path, (checksum, inputs) in self.before.items():
            try:
                check_no_input(path)
            except InputError:
                is_as_written = content_of([path])["checksum"] == checksum
                if is_as_written and inputs != checksums_of_inputs(contents_of_inputs(files)):
                    raise

    def remove_stale(self, contents: Contents, kept: Collection[Path]) -> Iterator[Note]:
        """Remove files of the case that are of other parameters, options or inputs; yield notes.

        Such is the file of a label that has vanished; `kept` are the files of the new result, whose
        inputs have these contents. Files that somebody has changed since an earlier run wrote them,
        and files that no record has, are not removed: a note names them.
        """
        made_of = checksums_of_inputs(contents)
        left = {path for path in self.unknown if path.is_file()}
        if self.folder is not None:
            left.update(self.folder.glob(f"*{suffix_of(self.label_map)}"))
        stale = []
        for path, (checksum, inputs) in self.before.items():
            left.discard(path)
            if path in kept or inputs == made_of or not path.is_file():
                continue
            if content_of([path])["checksum"] != checksum:
                left.add(path)
                continue
            check_replaceable(path)
            if not os.access(path.parent, os.W_OK):  # Nothing is removed if a file cannot be.
                raise InputError(
                    f"{path}: is of an earlier result of this case and cannot be removed: no right "
                    f"to write to {path.parent}; remove it, or choose another output folder"
                )
            stale.append(path)
        for path in stale:
            path.unlink(missing_ok=True)
            if path.parent != self.label_map.parent:
                with suppress(OSError):  # The folder may hold other files.
                    path.parent.rmdir()
        if stale:
            yield NoteKind.STALE_REMOVED(names=[path.name for path in stale])
        names = sorted(path.name for path in left.difference(kept))
        if names:
            yield NoteKind.STALE_LEFT(names=names)


def plan_outputs(
    cases: CaseList, options: InferenceOptions, reading: ReadingOptions
) -> list[OutputFiles]:
    """Return the output files of each case.

    Raise InputError for an output with a wrong format, or which would replace an input or another
    output.
    """
    output = options.output
    output_format = options.output_format
    is_single = cases.is_single and options.nnunet is None
    if output_format not in (None, *WRITTEN_SUFFIXES):
        raise InputError(f"--output-format {shorten(output_format)}: expected {_ONE_OF_SUFFIXES}")
    if options.writes_file:
        if output_format is not None:
            raise InputError(
                f"{output}: names a file, whose suffix is its format; "
                "leave --output-format out, or give a folder"
            )
        if not is_single:
            raise InputError(
                f"{output}: the images are a folder or pattern, so the output must be a folder, "
                "not a file name"
            )
    suffix = suffix_of(output)
    ending = suffix or output.suffix
    if ending and suffix not in WRITTEN_SUFFIXES and is_single and not output.is_dir():
        raise InputError(
            f"{output}: a label map cannot be written as {ending}; "
            f"expected {_ONE_OF_SUFFIXES}, or a folder"
        )
    is_nnunet = None
    if options.save_probabilities:
        from crfrefine.cases.nnunet import is_of_nnunet

        is_nnunet = functools.cache(is_of_nnunet)
    numbers = {} if reading.declared is None else reading.declared.structures
    all_outputs = []
    for files in cases:
        all_outputs.append(OutputFiles.of_case(files, options, numbers, is_nnunet))
    occupied = set(map(os.path.realpath, {outputs.label_map.parent for outputs in all_outputs}))
    written_by: dict[str, str] = {}
    for files, outputs in zip(cases, all_outputs, strict=True):
        if not files.problem:
            outputs.check_paths(files.case_id, written_by, occupied)
    # The next run would take results in a folder of images or logits as such.
    folders: set[Path] = set()
    for files in cases:
        folders.update(path.parent for path in (*files.images, *files.network))
        for path in files.network:
            if files.structures and path.parent.name == files.case_id:
                folders.add(path.parent.parent)
    # Real paths have no links; circular ones are no exception.
    if not is_single and os.path.realpath(output) in map(os.path.realpath, folders):
        raise InputError(
            f"{output}: holds the images or logits of this run; "
            "choose another folder for the results"
        )
    return all_outputs


def is_complete(outputs: OutputFiles, files: CaseFiles, reading: ReadingOptions) -> bool:
    """Return whether every output of a case is there and whole, and on the grid of the case."""
    if not all(map(os.path.isfile, outputs.all())):
        return False
    volumes = [path for path in outputs.all() if path != outputs.preview]
    if not all(map(is_intact, volumes)):
        return False
    image = read_header(files.images[0])
    if outputs.archive is not None:
        volumes.remove(outputs.archive)
        grid = grid_of_archive(image, files.network[0].parent, outputs.archive.parent)
        if not grid.on_same_grid(read_header(outputs.archive)):
            return False
        if outputs.properties is not None:
            copy = outputs.archive.with_suffix(".pkl")
            if not copy.is_file() or copy.stat().st_size != outputs.properties.stat().st_size:
                return False
    if outputs.preview is not None:
        content = outputs.preview.read_bytes()
        if not content.startswith(_PNG_START) or not content.endswith(_PNG_END):
            return False
    if outputs.folder is not None:
        segments: Sequence[Segment] = ()
        if len(files.network) == 1:  # Only a label map has any.
            segments = segments_of_label_map(read_header(files.network[0]), reading)
        labels = read_labels(outputs.label_map).data
        label_files = outputs.files_of_labels(labels, segments, reading.label_names)
        if not all(map(is_intact, label_files)):
            return False
        volumes += label_files
    headers = [placed_on(read_header(path), image) for path in volumes]
    return all(image.on_same_grid(header) and header.turned is None for header in headers)
