"""Find the cases of a BIDS dataset: the segmentations of a network in derivatives, and the images of each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crfrefine.base.text import listed, shorten_value
from crfrefine.errors import InputError
from crfrefine.io.paths import VOLUME_SUFFIXES, stem_of, suffix_of

PROBABILITIES, LABELS = "probseg", "dseg"
DESCRIPTION = "dataset_description.json"
_NO_IMAGES = frozenset({PROBABILITIES, LABELS, "mask"})
_OWN = ("label", "desc", "seg")
"""Entities of a segmentation that its image does not share."""


@dataclass(frozen=True)
class BidsCase:
    """A segmentation with its images."""

    name: str  # The entities that it shares with its images, such as "sub-01_ses-2".
    folder: Path  # Where it lies under its dataset, such as "sub-01/ses-2/anat".
    segmentations: tuple[Path, ...]  # One file, or one per label.
    images: tuple[Path, ...] = ()  # One per modality.


@dataclass(frozen=True)
class Choice:
    """What is taken of a dataset."""

    participants: tuple[str, ...] = ()  # Labels of subjects, without "sub-"; empty: all.
    sessions: tuple[str, ...] = ()  # Labels of sessions, without "ses-"; empty: all.
    modalities: tuple[str, ...] = ()  # Suffixes of the images, in order; empty: the only one that there is.
    # `label` entities of one file per label, in label order, background first; empty: one file with all labels.
    labels: tuple[str, ...] = ()
    suffix: str = PROBABILITIES  # "probseg" or "dseg".


def require_dataset(folder: Path) -> None:
    """Raise InputError unless a folder is a BIDS dataset."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if not (folder / DESCRIPTION).is_file():
        raise InputError(f"{folder}: not a BIDS dataset: expected {folder / DESCRIPTION}")


def locate_derivatives(dataset: Path, given: Path, suffix: str) -> Path:
    """Return the folder of derivatives that a path names, or the name of one under derivatives/ of the dataset."""
    named = dataset / "derivatives" / given
    found = next((folder for folder in (given, named) if folder.is_dir()), None)
    if found is None:
        there = sorted(path.name for path in (dataset / "derivatives").glob("*") if path.is_dir())
        names = f"; {dataset / 'derivatives'} has {listed(there)}" if there else ""
        raise InputError(f"{given}: no such folder, nor {named}; expected segmentations in sub-*/[ses-*/]anat/*_{suffix}.nii.gz{names}")
    return found


def find_derivatives(dataset: Path, given: Path | None, output: Path, suffix: str) -> Path:
    """Return the dataset with the network's segmentations: the given one, or the only one under derivatives/ that has any."""
    if given is not None:
        return locate_derivatives(dataset, given, suffix)
    folders = sorted(path for path in (dataset / "derivatives").glob("*") if path.is_dir() and path.resolve() != output.resolve())
    found = [path for path in folders if any(path.glob(f"sub-*/**/*_{suffix}.*"))]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{dataset}: segmentations in {listed([path.name for path in found])}; choose with --derivatives")
    raise InputError(
        f"{dataset}: no segmentations of a network: expected {dataset / 'derivatives'}/NAME/sub-*/[ses-*/]anat/*_{suffix}.nii.gz, "
        "or another folder with --derivatives; for label maps (*_dseg), give --input-type labels"
    )


def find_subjects(dataset: Path, participants: Sequence[str]) -> list[str]:
    """Return the subjects of a dataset, such as "sub-01"; raise InputError if there are none, or one that was asked for is not there."""
    found = sorted(path.name for path in dataset.glob("sub-*") if path.is_dir())
    if not found:
        raise InputError(f"{dataset}: no subjects: expected folders sub-*")
    wanted = [f"sub-{label.removeprefix('sub-')}" for label in participants]
    missing = [name for name in wanted if name not in found]
    if missing:
        raise InputError(f"{dataset}: no {listed(missing)}; there are {listed(found)}")
    return wanted or found


def find_cases(dataset: Path, derivatives: Path, choice: Choice) -> tuple[list[BidsCase], list[str]]:
    """Return the cases of a dataset, and what is wrong with the others: those without segmentations or images.

    Images are the raw ones, unless there are some on the grid of the segmentations beside them.
    """
    cases: list[BidsCase] = []
    problems: list[str] = []
    for subject in find_subjects(dataset, choice.participants):
        groups = group_segmentations(derivatives, subject, choice)
        if not groups:
            place = derivatives / subject
            problems.append(f"{subject}: no segmentation: expected {place}/[ses-*/]anat/{subject}_*_{choice.suffix}.nii.gz")
        for name, files in groups.items():
            folder = files[0].path.parent.relative_to(derivatives)
            try:
                images = _images_of(files[0], [derivatives / folder, dataset / folder], choice.modalities)
                segmentations = _in_order(files, choice.labels)
            except InputError as error:
                problems.append(f"{name}: {error}")
                continue
            cases.append(BidsCase(name, folder, segmentations, images))
    return cases, problems


def group_segmentations(derivatives: Path, subject: str, choice: Choice) -> dict[str, list[BidsName]]:
    """Return the segmentations of a subject, by what they share with their images."""
    sessions = {label.removeprefix("ses-") for label in choice.sessions}
    found: dict[str, list[BidsName]] = {}
    folders = sorted({path.parent for path in (derivatives / subject).rglob(f"*_{choice.suffix}.*")})
    for name in (name for folder in folders for name in volumes_in(folder)):
        if name.suffix == choice.suffix and (not sessions or name.entities.get("ses") in sessions):
            found.setdefault(joined(name.without(*_OWN)), []).append(name)
    return found


def _in_order(files: Sequence[BidsName], labels: Sequence[str]) -> tuple[Path, ...]:
    """Return the file with all labels, or those of the labels in their order."""
    if not labels:
        if len(files) > 1:
            raise InputError(
                f"{len(files)} segmentations in {files[0].path.parent}: {listed([file.path.name for file in files])}; expected one with "
                "all labels, or --label for each label, in label order, background first"
            )
        return (files[0].path,)
    by_label = {file.entities.get("label", ""): file.path for file in files}
    missing = [label for label in labels if label not in by_label]
    if missing or len(by_label) < len(files):
        raise InputError(f"expected one file for each of the labels {listed(labels)}, found {listed([file.path.name for file in files])}")
    return tuple(by_label[label] for label in labels)


def _images_of(segmentation: BidsName, folders: Sequence[Path], modalities: Sequence[str]) -> tuple[Path, ...]:
    """Return the images of a segmentation: on its grid beside it, else the raw ones."""
    own = segmentation.without(*_OWN)
    found: dict[str, Path] = {}
    for folder in folders:
        fitting = [name for name in volumes_in(folder) if name.suffix not in _NO_IMAGES and _fits(name, own)]
        for suffix in sorted({name.suffix for name in fitting} - set(found)):
            ranked = sorted((name for name in fitting if name.suffix == suffix), key=lambda name: -_shared(name, own))
            if len(ranked) > 1 and _shared(ranked[0], own) == _shared(ranked[1], own) and (suffix in modalities or not modalities):
                raise InputError(f"several images {suffix}: {listed([name.path.name for name in ranked])}; leave one in the folder")
            found[suffix] = ranked[0].path
    missing = [suffix for suffix in modalities if suffix not in found]
    if missing or not found:
        where = " or ".join(str(folder) for folder in folders)
        raise InputError(f"no image for {segmentation.path.name}: expected {joined(own)}_{listed(missing) or '*'}.nii.gz in {where}")
    if not modalities and len(found) > 1:
        raise InputError(f"several modalities: {listed(sorted(found))}; choose with --modality, in the order that the parameters expect")
    return tuple(found[suffix] for suffix in modalities or found)


def _fits(name: BidsName, own: dict[str, str]) -> bool:
    """Return whether an image may belong to a segmentation with these entities: none contradicts, and the space is the same."""
    if name.entities.get("space") != own.get("space"):
        return False
    return all(own.get(key, value) == value for key, value in name.without("desc").items())


def _shared(name: BidsName, own: dict[str, str]) -> int:
    return sum(name.entities.get(key) == value for key, value in own.items())


def check_choice(choice: Choice) -> None:
    """Raise InputError for labels of participants and the like that no name can have."""
    for label in (*choice.participants, *choice.sessions, *choice.labels, *choice.modalities):
        if not label.removeprefix("sub-").removeprefix("ses-").replace("+", "").isalnum():
            raise InputError(f"{shorten_value(label)}: expected letters and digits, as in names of BIDS")


# Names of files in BIDS: entities such as sub-01, a suffix such as T1w, and the extension.

_PART = re.compile(r"(?P<key>[a-zA-Z]+)-(?P<value>[a-zA-Z0-9+]+)")
_SUFFIX = re.compile(r"[a-zA-Z0-9]+")


@dataclass(frozen=True)
class BidsName:
    """A volume of a BIDS dataset."""

    path: Path  # Of the file.
    entities: Mapping[str, str]  # Key to value, in the order of the name.
    suffix: str  # Such as "T1w" or "probseg".

    def without(self, *keys: str) -> dict[str, str]:
        """Return the entities but for some."""
        return {key: value for key, value in self.entities.items() if key not in keys}


def parse_name(path: Path) -> BidsName | None:
    """Return the parts of a volume's name; None if the name is none of BIDS, or the file is no volume."""
    if suffix_of(path) not in VOLUME_SUFFIXES:
        return None
    *parts, suffix = stem_of(path).split("_")
    found = [_PART.fullmatch(part) for part in parts]
    if not parts or not _SUFFIX.fullmatch(suffix) or any(match is None for match in found):
        return None
    entities = {match["key"]: match["value"] for match in found if match is not None}
    return BidsName(path, entities, suffix) if next(iter(entities)) == "sub" else None


def joined(entities: Mapping[str, str]) -> str:
    """Return entities as in a name: "sub-01_ses-2"."""
    return "_".join(f"{key}-{value}" for key, value in entities.items())


def volumes_in(folder: Path) -> list[BidsName]:
    """Return the volumes of a folder whose names are of BIDS, by name."""
    paths = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    return [name for name in map(parse_name, paths) if name is not None]
