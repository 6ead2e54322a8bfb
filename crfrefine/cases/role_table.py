"""The roles of a case's files as a table: what each one is taken for, where it lies, and why."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from crfrefine.base.label_options import REFERENCE
from crfrefine.base.notes import Note
from crfrefine.base.observer import AnyObserver
from crfrefine.base.text import counted
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.case_headers import CaseHeaders, read_case_headers
from crfrefine.cases.label_input import CUT_REFERENCE, require_labels
from crfrefine.cases.other_grid import WorkGrid
from crfrefine.cases.reading_options import ReadingOptions
from crfrefine.cases.roles import (
    modalities_of,
    require_images,
    require_no_scores,
    require_other_labels,
)
from crfrefine.errors import CrfRefineError
from crfrefine.io.reading import read_array, read_whole_numbers
from crfrefine.io.volume import VolumeHeader


class FileRole(NamedTuple):
    """The role of a file of a case."""

    name: str  # "image", "network's output", "mask", "reference" or "strokes"
    kind: str  # its content
    frame: str  # its grid
    path: Path
    evidence: str  # why, in words

    @property
    def words(self) -> str:
        """The role and the kind, in a few words."""
        return f"{self.name}: {self.kind}"

    @property
    def reasons(self) -> str:
        """The file, its grid and the evidence."""
        return f"{self.path}, {self.frame}; {self.evidence}"


def roles_of(headers: CaseHeaders) -> list[FileRole]:
    """Return the roles of a case's files by their headers, the images first."""
    files = headers.files
    first = headers.image
    roles = []
    for place, header in enumerate(headers.images):
        kind = "image"
        if files.modalities:
            kind = f"modality {files.modalities[place]}"
        if header.num_channels > 1:
            kind = f"{header.num_channels} modalities"
        evidence = "named by the user"
        if header.path in files.unnamed:
            evidence = "by its place and name"
        frame = f"{header.describe_grid()}, {header.orientation}"
        roles.append(FileRole("image", kind, frame, header.path, evidence))
    network = headers.network
    if network.files:
        kind, evidence = _kind_of_network(headers)
        frame = _frame(first, network.first, "label map")
        roles.append(FileRole("network's output", kind, frame, network.path, evidence))
    others = [("mask", "mask", "where it is not 0", headers.mask)]
    others.append((REFERENCE, "labels", "label map", headers.labels))
    others += [("strokes", "strokes", "label map", header) for header in headers.strokes]
    for name, what, kind, other in others:
        if other is not None:
            frame = _frame(first, other, what)
            roles.append(FileRole(name, kind, frame, other.path, "given as such"))
    return roles


def _kind_of_network(headers: CaseHeaders) -> tuple[str, str]:
    """Return the content of a network's output, by its headers, and the reason."""
    network = headers.network
    structures = headers.files.structures
    if structures:
        return counted(len(structures), "structure"), "one file per structure"
    if network.is_label_map:
        return "label map", "one value per voxel, whole numbers"
    number = counted(network.num_channels, "channel")
    if network.first.kind is not None:
        return f"{number} of {network.first.kind}", "its array has this name"
    if network.lacks_background and network.num_channels == 1:
        return "label 1 alone", "one value per voxel, not all whole"
    if len(network.files) > 1:
        return f"{number}, logits or probabilities", "one file per label; the values tell which"
    return f"{number}, logits or probabilities", "several values per voxel; they tell which"


def _frame(image: VolumeHeader, other: VolumeHeader, what: str) -> str:
    """Return where a file lies, by its header."""
    if other.affine is None:
        return "no grid of its own: that of the image"
    if image.on_same_grid(other):
        return "the grid of the image"
    if WorkGrid(image).part(other, what) is not None:
        return "a part of the image's grid"
    return f"another grid, {other.describe_grid()}"


def summarize(roles: Sequence[FileRole]) -> str:
    """Return the roles of a case in a line, the images together.

    Modalities with names are left out: the line on their pattern has them.
    """
    kinds = [role.kind for role in roles if role.name == "image"]
    parts = [role.words for role in roles if role.name != "image"]
    if len(kinds) > 1 and kinds[0] == "image":
        parts.insert(0, f"images: {len(kinds)} modalities")
    elif kinds[0] == "image":
        parts.insert(0, "images: one modality")
    elif len(kinds) == 1 and kinds[0].endswith("modalities"):
        parts.insert(0, f"images: {kinds[0]}")
    return "; ".join(parts)


def tell_roles(cases: Sequence[CaseFiles], reading: ReadingOptions, observer: AnyObserver) -> None:
    """Tell the roles of the first case, unless its headers cannot be read."""
    complete = next((files for files in cases if not files.problem), None)
    if complete is None:
        return
    with suppress(CrfRefineError, OSError):  # Reading the case reports it.
        roles = roles_of(read_case_headers(complete, reading))
        observer.roles_found(summarize(roles), [(role.words, role.reasons) for role in roles])


def check_roles(headers: CaseHeaders, roles: list[FileRole], notes: list[Note]) -> None:
    """Read the images and the reference of a case, and raise InputError if one is another thing.

    `roles` get the evidence of the voxels, `notes` those on images that are named.
    """
    files = headers.files
    modalities = []
    for place, header in enumerate(headers.images):
        values = read_array(header, [])
        require_no_scores(header.path, values, None)
        in_file = modalities_of(files, place, values)
        shown = "voxels of an image"
        for modality in reversed(in_file):
            if modality.evidence:
                shown = f"voxels of a label map, {modality.evidence}"
        if place < len(roles):
            roles[place] = roles[place]._replace(evidence=f"{roles[place].evidence}, {shown}")
        modalities += in_file
    if headers.labels is not None:
        path = headers.labels.path
        labels = read_whole_numbers(headers.labels)
        require_labels(labels, path, CUT_REFERENCE)
        require_other_labels(modalities, labels, REFERENCE, path)
    require_images(files, modalities, notes)


def check_single(headers: CaseHeaders, roles: list[FileRole]) -> None:
    """Read the only file of a case, since only its voxels tell image from label map.

    The only one of the `roles`, if there is one, becomes what they show.
    """
    if not roles:
        return
    (modality, *_) = modalities_of(headers.files, 0, read_array(headers.image, []))
    role = roles[0]
    if modality.evidence:
        shown = f"voxels of a label map, {modality.evidence}"
        roles[0] = role._replace(name="label map", kind="label map", evidence=shown)
    else:
        roles[0] = role._replace(evidence=f"{role.evidence}, voxels of an image")
