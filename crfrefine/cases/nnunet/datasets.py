"""Where the images and labels of a dataset of nnU-Net are: its raw data, beside the results or where nnU-Net's environment says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crfrefine.base.inputs import add_inputs
from crfrefine.base.text import MAX_OF_A_PATH, shorten, shorten_value
from crfrefine.cases.case_files import CaseFiles, CaseList
from crfrefine.cases.dataset_description import DatasetDescription, read_dataset_description
from crfrefine.cases.discovery import discover_cases
from crfrefine.cases.nnunet.layout import TrainedNetwork, folder_of_environment, read_table, require_case_name
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io import read_header
from crfrefine.io.json import read_json
from crfrefine.io.paths import VOLUME_SUFFIXES, is_there

_DATASET = "dataset.json"
_IMAGES = "imagesTr"
_REORIENTING = "NibabelIOWithReorient"
"""The one reader of nnU-Net whose probabilities are not on the image's voxel axes."""


@dataclass(frozen=True)
class Split:
    """The cases of a fold."""

    training: frozenset[str]  # names of the cases that its network is trained on
    held_out: frozenset[str]  # names of those that it validates


def describe_dataset(folder: Path) -> DatasetDescription | None:
    """Read the `dataset.json` that nnU-Net copies to its results and predictions; raise InputError for a format that is not read here."""
    description = read_dataset_description(folder) if (folder / _DATASET).is_file() else None
    ending = None if description is None else description.file_ending
    if description is not None and ending is not None and ending.lower() not in VOLUME_SUFFIXES:
        raise InputError(
            f"{description.path}: the images are {shorten(ending)} files, which are not read here; "
            f"expected one of {', '.join(VOLUME_SUFFIXES)}\n"
            "  Convert the images, give them in a folder with -i, and change file_ending in this file."
        )
    return description


def locate_images(network: TrainedNetwork, given: Path | None) -> Path:
    """Return the folder of the images that a network was trained on, or of the dataset if that lists its files.

    `given` is named by the user; without it, nnU-Net's places are searched, and the error names them.
    """
    if given is not None:
        _require_folder(given, "images")
        return given / _IMAGES if (given / _IMAGES).is_dir() else given
    datasets = _places("nnUNet_raw", network)
    for dataset in datasets:
        if (dataset / _IMAGES).is_dir():
            return dataset / _IMAGES
        if _lists_files(dataset):
            return dataset
    raise InputError(
        f"{network.folder}: the images of {network.dataset} are not found; looked for\n"
        + "".join(f"    {dataset / _IMAGES}\n" for dataset in datasets)
        + "  Set the environment variable nnUNet_raw, or name the folder with --images."
    )


def locate_labels(network: TrainedNetwork, images: Path, given: Path | None) -> Path:
    """Return the folder of the labels, or of the dataset if that lists its files; as `locate_images`, whose result `images` is."""
    if given is not None:
        _require_folder(given, "labels")
        return given
    if _lists_files(images):
        return images
    raw = [images.parent, *_places("nnUNet_raw", network)] if images.name == _IMAGES else _places("nnUNet_raw", network)
    # nnU-Net copies the labels there before it preprocesses them.
    places = [*(place / "labelsTr" for place in raw), *(place / "gt_segmentations" for place in _places("nnUNet_preprocessed", network))]
    places = list(dict.fromkeys(places))
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise InputError(
            f"{network.folder}: the labels of {network.dataset} are not found; looked for\n"
            + "".join(f"    {place}\n" for place in places)
            + "  Set the environment variable nnUNet_raw, or name the folder with --labels."
        )
    return found


def _require_folder(given: Path, what: str) -> None:
    if not given.is_dir():
        raise InputError(f"{given}: no such folder; --{what} names the folder of the {what}")


def training_cases(images: Path, masks: Path | None, labels: Path | None) -> CaseList:
    """Return the cases that a network was trained or validated on, without logits."""
    if not _lists_files(images):
        return discover_cases(images, None, masks, labels, include_imageless=labels is not None)
    cases = listed_cases(images)
    if labels is None:
        cases = CaseList([replace(case, labels=None) for case in cases], cases.notes)
    return cases


def splits_of(network: TrainedNetwork) -> list[Split]:
    """Return the cases of each fold by `splits_final.json`, in order; empty without the file."""
    for place in _places("nnUNet_preprocessed", network):
        path = place / "splits_final.json"
        if path.is_file():
            return _splits_in(path)
    return []


def _splits_in(path: Path) -> list[Split]:
    add_inputs(path)
    content = read_json(path)
    if not isinstance(content, list) or not all(
        isinstance(fold, Mapping) and are_names(fold.get("train")) and are_names(fold.get("val")) for fold in content
    ):
        raise InputError(f'{path}: expected a list with {{"train": [...], "val": [...]}} for each fold, as nnU-Net writes it')
    return [Split(frozenset(fold["train"]), frozenset(fold["val"])) for fold in content]


def listed_cases(dataset: Path) -> CaseList:
    """Return the cases of a `dataset.json` that lists the files of each case, which may lie anywhere."""
    path = dataset / _DATASET
    cases = []
    entries = read_table(path)["dataset"]
    for name, entry in entries.items() if isinstance(entries, Mapping) else ():
        require_case_name(name, f"{path}: dataset")
        if not isinstance(entry, Mapping) or not are_names(entry.get("images")) or not isinstance(entry.get("label"), str):
            raise InputError(
                f'{path}: dataset.{shorten(name)}: expected {{"images": ["FILE", ...], "label": "FILE"}}, got {shorten_value(entry)}'
            )
        images = tuple(_expanded(dataset, file) for file in entry["images"])
        label = _expanded(dataset, entry["label"])
        missing = tuple(f"no file {shorten(file, MAX_OF_A_PATH)}" for file in (*images, label) if not is_there(file))
        problem = f"case {name!r}: {missing[0]}, which {path} names" if missing else None
        cases.append(CaseFiles(name, images, labels=label, problem=problem, missing=missing))
    if not cases:
        raise InputError(f"{path}: dataset: expected the files of each case, by its name; found none")
    return CaseList(sorted(cases, key=lambda case: case.case_id))


def _lists_files(folder: Path) -> bool:
    return (folder / _DATASET).is_file() and "dataset" in read_table(folder / _DATASET)


def _expanded(dataset: Path, file: str) -> Path:
    """Return the path of an entry as nnU-Net reads it: with environment variables, relative to the dataset."""
    return dataset / os.path.expandvars(file)


def are_names(value: Any) -> bool:
    """Return whether an entry is a list of names, with one at least."""
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def _places(variable: str, network: TrainedNetwork) -> list[Path]:
    """Return where nnU-Net's folder of a kind of data has the dataset: by the environment, then beside the results."""
    roots = (folder_of_environment(variable), network.results.parent / variable)
    return list(dict.fromkeys(root / network.dataset for root in roots if root is not None))


def check_orientation(case: CaseFiles, reader: str | None) -> CaseFiles:
    """Return the case, with a `problem` if its probabilities have other voxel axes than its image.

    The reader turns images to RAS+; label maps are turned back when they are written, probabilities are not.
    """
    if reader != _REORIENTING or case.problem or not case.images:
        return case
    try:
        orientation = read_header(case.images[0]).orientation
    except CrfRefineError:
        return case  # reading the case reports it
    if orientation == "RAS":
        return case
    return replace(
        case,
        problem=(
            f"case {case.case_id!r}: {case.logits[0]} has voxel axes toward RAS, but {case.images[0]} toward {orientation}: the plans use "
            f"{_REORIENTING}, which turns images and does not turn probabilities back\n"
            "  Give images turned to RAS with -i, such as those of nibabel.as_closest_canonical."
        ),
    )
