"""Propose patterns for a folder whose files have none of the known names."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from crfrefine.cases.conventions import OTHER_WORDS
from crfrefine.cases.patterns import folder_of, nearest_files
from crfrefine.io.paths import VOLUME_SUFFIXES, describe_others, is_folder, suffix_of

_MAX_FILES = 5000  # most that are looked at
_MAX_DEPTH = 4
_MAX_WORDS = 32  # in names of many more words, these are no modalities


def advise(place: Path, *, holds_images: bool = True) -> str:
    """Return lines with what there is in place of files, and with patterns that fit it."""
    proposal = propose(folder_of(place), holds_images=holds_images)
    if not proposal and is_folder(place):
        proposal = describe_others(place)
    return nearest_files(place) + proposal


def propose(folder: Path, *, holds_images: bool = True) -> str:
    """Return a line with patterns that fit the files of a folder; "" without any.

    Several files of a case are its modalities, or, of a network's output, those of its labels.
    """
    names: list[str] = []
    for place, folders, files in os.walk(folder):
        inside = Path(place).relative_to(folder)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if len(inside.parts) >= _MAX_DEPTH or len(names) > _MAX_FILES:
            folders.clear()
        for name in sorted(files):
            if suffix_of(Path(name)) in VOLUME_SUFFIXES and not name.startswith("."):
                names.append((inside / name).as_posix())
    images, labels = find_patterns(names)
    if not holds_images and not labels:
        images = images.replace("{modality}", "{label}")
    return describe_patterns(folder, images, labels)


def describe_patterns(folder: Path, images: str, labels: str) -> str:
    """Return a line with the patterns of images and of label maps; "" without the first."""
    if not images:
        return ""
    line = f"\n  Its files look like '{folder}/{images}'"
    if labels:
        line += f", with label maps '{folder}/{labels}'"
    return f"{line}: give such a pattern in place of a folder."


def find_patterns(names: Sequence[str]) -> tuple[str, str]:
    """Return the patterns of images and of label maps by their paths in a folder.

    They are "" if they are not clear. Images that differ in one word have `{modality}` there.
    """
    templates = _templates(names)
    if len(templates) > _MAX_WORDS:
        return "", ""
    images: list[str] = []
    labels: list[str] = []
    for template in templates:
        (labels if _names_other(template) else images).append(template)
    pattern = images[0] if images else ""
    if len(images) > 1:
        words = [re.split(r"([^A-Za-z0-9]+)", image) for image in images]
        # Of lists, it compares words.
        start = len(os.path.commonprefix(words))  # noqa: RUF071
        end = len(os.path.commonprefix([pieces[::-1] for pieces in words]))  # noqa: RUF071
        middles = {"".join(pieces[start : len(pieces) - end]) for pieces in words}
        if all(re.fullmatch(r"[^/{}]+", middle) for middle in middles):
            before = "".join(words[0][:start])
            after = "".join(words[0][len(words[0]) - end :])
            pattern = f"{before}{{modality}}{after}"
    return pattern, labels[0] if labels else ""


def _names_other(name: str) -> bool:
    """Return whether one of the words of a name is that of a label map, a mask or scores."""
    return not {*OTHER_WORDS}.isdisjoint(re.split(r"[^a-z0-9]+", name.lower()))


def _templates(names: Sequence[str]) -> list[str]:
    """Return the names that cases have in common.

    In a folder per case they are all but those of a single case; else they are such as
    `{case}_t1.nii`, or else such as `volume-{case}.nii`. There, a case has a digit, and as many
    cases as have the most frequent name must have each of them, or nearly.
    """
    cases = set[str]()
    nested = Counter[str]()
    before = Counter[str]()
    after = Counter[str]()
    for name in names:
        case_id, slash, _ = name.partition("/")
        if slash:
            cases.add(case_id)
            nested[name.replace(case_id, "{case}")] += 1
        suffix = suffix_of(Path(name))
        stem = name[: len(name) - len(suffix)]
        begins = re.fullmatch(r"(\D*\d[^_-]*(?:[_-]\d+(?=[_-]))*)([_-].*[A-Za-z].*)", stem)
        if begins:
            before[f"{{case}}{begins[2]}{suffix}"] += 1
        ends = re.fullmatch(r"([A-Za-z]+[_-])(.*\d.*)", stem)
        if ends and not _names_other(ends[2]):
            after[f"{ends[1]}{{case}}{suffix}"] += 1
    likely = sorted(name for name, count in nested.items() if count > 1 or len(cases) == 1)
    for found in (before, after):
        most = max(found.values(), default=0)
        enough = [name for name, count in found.items() if 2 * count > most and count > 1]
        likely = likely or sorted(enough)
    return likely
