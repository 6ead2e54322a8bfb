"""Read the label map of a case whose labels are structures with names: a folder of binary files, or a label map with a `dataset.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from crfrefine import io
from crfrefine.base.axes import StorageOrder
from crfrefine.cases.dataset_description import read_dataset_description
from crfrefine.cases.discovery import list_files
from crfrefine.cases.label_input import merge_structures
from crfrefine.errors import InputError
from crfrefine.io.dicom_identity import require_same_identity
from crfrefine.io.volume import Volume


def read_structures(path: Path, numbers: Mapping[str, int], told: list[str], *, allow_mismatched_dicom: bool = False) -> Volume:
    """Read a folder of structures, or a label map whose labels have names in a `dataset.json`, with the numbers of a run.

    `told` gets a sentence about structures that lose most of their voxels to smaller ones, as a union of others does.
    """
    if not path.is_dir():
        return _renumbered(io.read_labels(path), path, numbers)
    headers = [io.read_header(file, io.VOLUME_SUFFIXES) for file in list_files(path, io.VOLUME_SUFFIXES)]
    first = headers[0]
    for header in headers:
        if header.num_channels > 1:
            raise InputError(
                f"{header.path}: expected one value per voxel, as in a binary file of one structure; found {header.num_channels}"
            )
    require_same_identity(headers, allow=allow_mismatched_dicom)
    labels, overlap = merge_structures(headers, numbers)
    if overlap.lost:
        told.append(f"{overlap.lost}; to measure a union of others, leave its file out and give its parts with --regions")
    return Volume(StorageOrder.of_files(labels.ndim).to_user(labels), *first.geometry(), first.path, first)


def names_of(path: Path) -> dict[str, int]:
    """Return the number of each label of a label map by its name, background aside; raise InputError if no `dataset.json` has any."""
    description = read_dataset_description(path if path.is_dir() else path.parent)
    labels = description.labels if description is not None else {}
    names = {name: value for name, value in labels.items() if isinstance(value, int) and value != 0}
    if not names:
        raise InputError(
            f"{path}: a label map is compared with structures by the names of its labels, but no dataset.json beside it has them; expected "
            '{"labels": {"background": 0, "liver": 1}}, as `crfrefine infer` writes it'
        )
    return names


def _renumbered(volume: Volume, path: Path, numbers: Mapping[str, int]) -> Volume:
    names = names_of(path)
    table = np.full(int(volume.data.max(initial=0)) + 1, -1)
    table[0] = 0
    for name, own in names.items():
        if own < len(table):
            table[own] = numbers[name]
    found = np.unique(volume.data)
    nameless = [int(label) for label in found if table[label] < 0]
    if nameless:
        raise InputError(f"{path}: label {nameless[0]} has no name in dataset.json; labels are compared with structures by their names")
    data = table.astype(np.min_scalar_type(max(numbers.values())))[volume.data]
    return Volume(data, volume.affine, volume.spacing, volume.path, volume.header)
