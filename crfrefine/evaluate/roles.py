"""The roles of the inputs of an evaluation, by the headers of its first case."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from crfrefine import io
from crfrefine.base.label_options import REFERENCE
from crfrefine.base.text import counted, listed
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.foreground import holds_labels
from crfrefine.cases.reading_options import ReadingOptions
from crfrefine.cases.role_table import FileRole
from crfrefine.errors import CrfRefineError
from crfrefine.evaluate.evaluation import Evaluation, EvaluationObserver
from crfrefine.io.headers import with_channel_axis
from crfrefine.io.volume import VolumeHeader

_LABEL_MAP = "label map"


def tell_roles(evaluation: Evaluation, observer: EvaluationObserver) -> None:
    """Tell the roles of the first case, unless its headers cannot be read.

    Structures have another note.
    """
    pair = next((pair for pair in evaluation.pairs if not pair.reference.problem), None)
    if pair is None or evaluation.measured.structures:
        return
    assert pair.reference.labels is not None
    with suppress(CrfRefineError, OSError):  # Reading the case reports it.
        reference = io.read_header(pair.reference.labels)
        frame = _grid_of(reference)
        roles = [FileRole(REFERENCE, _LABEL_MAP, frame, reference.path, "given as LABELS")]
        for method, files in pair.methods.items():
            name = method
            if method != evaluation.options.name:
                name = f"baseline {method}"
            kind, path, evidence = _kind_of(files, reference, evaluation.measured.readings[method])
            if files.labels is not None and pair.named.get(method, files).network:
                kind += ", with logits or probabilities"
            frame = _frame(reference, io.read_header(path))
            roles.append(FileRole(name, kind, frame, path, evidence))
        images = pair.reference.images
        if images:
            header = io.read_header(images[0])
            number = max(len(images), header.num_channels)
            kind = "one modality"
            if number > 1:
                kind = f"{number} modalities"
            frame = _frame(reference, header)
            roles.append(FileRole("images", kind, frame, images[0], "given by --images"))
        reasons = [(role.words, role.reasons) for role in roles]
        names = evaluation.measured.names
        if names:
            sources = listed(list(dict.fromkeys(names.sources.values())), 2)
            reasons.append(("labels matched by name", f"those of {sources}"))
        observer.roles_found("; ".join(words for words, _ in reasons), reasons)


def _kind_of(
    files: CaseFiles, reference: VolumeHeader, reading: ReadingOptions
) -> tuple[str, Path, str]:
    """Return the content of the file of a method, its path, and the evidence."""
    paths = files.network
    if files.labels is not None:
        paths = (files.labels,)
    header = with_channel_axis(io.read_header(paths[0]), reference)
    number = counted(max(len(paths), header.num_channels), "channel")
    if header.kind is not None:
        return f"{number} of {header.kind}", header.path, "its array has this name"
    if len(paths) > 1 or header.num_channels > 1 or files.labels is None:
        return f"{number}, logits or probabilities", header.path, "the values tell which"
    if holds_labels(header, of_region=reading.regions.declares(1)):
        return _LABEL_MAP, header.path, "one value per voxel, whole numbers"
    return "label 1 alone", header.path, "one value per voxel, not all whole"


def _grid_of(header: VolumeHeader) -> str:
    return f"{header.describe_grid()}, {header.orientation}"


def _frame(reference: VolumeHeader, header: VolumeHeader) -> str:
    """Return where a file lies."""
    if header.affine is None:
        return "no grid of its own: that of the reference"
    if reference.on_same_grid(header):
        return "the grid of the reference"
    return f"another grid, {_grid_of(header)}"
