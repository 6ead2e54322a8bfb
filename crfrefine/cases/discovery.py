"""Find the cases of images, and the other files of each: in folders, by patterns, or one by one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from os.path import realpath
from pathlib import Path
from typing import NamedTuple

from crfrefine.base.notes import NoteKind
from crfrefine.base.text import listed
from crfrefine.cases.case_files import CaseFiles, CaseList
from crfrefine.cases.conventions import (
    IMAGE,
    IMAGES,
    LABEL_MAP,
    LABELS,
    LOGITS,
    MASK,
    NUMBERED,
)
from crfrefine.cases.dataset_description import read_dataset_description
from crfrefine.cases.files_by_case import Files
from crfrefine.cases.listing import find_matches
from crfrefine.cases.pattern_advice import (
    MAX_MODALITIES,
    advise_on_folders,
    advise_on_splits,
    describe_found,
)
from crfrefine.cases.patterns import (
    Match,
    check_pattern,
    in_listed_order,
    modalities_listed,
    modality_globs,
    patterns_of,
)
from crfrefine.errors import InputError
from crfrefine.io.formats import LOGITS_SUFFIXES, VOLUME_SUFFIXES
from crfrefine.io.paths import file_to_read, holds_many, is_pattern, stem_of

_FOUR_DIGITS = re.compile(r"[0-9]{4}")


class Sources(NamedTuple):
    """Where the files of the cases of a command are, and whether a case needs all of them.

    Each role has a folder or a pattern, or the files of the only case.
    """

    images: Sequence[Path] = ()  # of one case: one file per modality
    # The network's output; of one case: one file with all labels, or one per label in order.
    network: Sequence[Path] = ()
    masks: Path | None = None
    labels: Path | None = None  # the references, by whose names the cases are called without images
    strokes: Sequence[Path] = ()
    # The folder of nnU-Net's predictions, or of a trained network, instead of the network's
    # output. The images, and the references if they are needed, may be those that it has noted.
    nnunet: Path | None = None
    manifest: Path | None = None  # a table with the images and the network's output of each case
    # With "labels", the network's output are label maps, or one file per structure, in a folder per
    # case.
    input_type: str = "auto"
    add_background: bool = False  # whether files per label begin with label 1
    # Whether a case without an image or a reference is incomplete. Else a reference is optional,
    # and other files without an image are left out.
    needs_all: bool = False


def discover_cases(sources: Sources) -> CaseList:
    """Find the cases of folders, patterns and files, by name; incomplete ones have a `problem`.

    Optional references and strokes are not looked for. Raises InputError: a path that does not
    exist, no case, or several where one is expected.
    """
    for path in (*sources.images, *sources.network):
        is_many = holds_many(path)
        if not is_many and not path.exists():
            raise InputError(f"{path}: no such file or folder")
        if is_many and len(sources.images) > 1 and path in sources.images:
            raise InputError(
                f"{path}: give one folder of images, one pattern, or the files of one case"
            )

    place = sources.images[0]
    if holds_many(place):
        output = next(iter(sources.network), None)
        cases = Images(place, output, sources.masks, sources.labels).cases()
    else:
        cases = CaseList([_case_of_files(sources.images)])
        cases.is_single = True
    others = []
    if sources.network:
        kind = LABEL_MAP if sources.input_type == "labels" else LOGITS
        others.append(Files(kind, *sources.network, cases=[case.case_id for case in cases]))
    if sources.masks is not None:
        others.append(Files(MASK, sources.masks))
    if sources.needs_all and sources.labels is not None:
        others.append(Files(LABELS, sources.labels))
    if sources.needs_all and not cases.is_single:
        _add_imageless(cases, others, place)
    for files in others:
        files.add_to(cases, first_label=int(sources.add_background))
    return cases


def _add_imageless(cases: CaseList, others: Sequence[Files], place: Path) -> None:
    """Add the cases that other files name, apart from masks, and that have no image in a place."""
    case_ids = {case.case_id for case in cases}
    names = set[str]()
    for files in others:
        if files.kind is not MASK and files.place != place:
            names.update(files.by_case(case_ids))
    expected = "a file by this pattern" if is_pattern(place) else IMAGES.expected
    missing = f"no image in {place}"
    problem = f"{missing}; expected {expected}"
    for name in names:
        cases.append(CaseFiles(name, ()).with_problem(problem, missing))
    cases.sort(key=lambda case: case.case_id)


def _case_of_files(paths: Sequence[Path]) -> CaseFiles:
    """Return the case of single files, one per modality."""
    for path in paths:
        file_to_read(path, VOLUME_SUFFIXES)
    stems = [stem_of(path) for path in paths]
    # Without other files to compare with, only the number of the first modality, 0000, is certainly
    # not part of the name.
    numbered = {stem.removesuffix("_0000") for stem in stems if stem.endswith("_0000")}
    case_ids = sorted(numbered - {""})
    if len(case_ids) > 1:
        raise InputError(
            f"{paths[0]}: files of {len(case_ids)} cases, {listed(case_ids)}; "
            "give the folder of the images"
        )
    return CaseFiles(stems[0].removesuffix("_0000") or stems[0], tuple(paths))


class Images:
    """The images of many cases: in a folder, or of a pattern.

    Four digits at the end of a name may also belong to the name of the case, unless something shows
    that modalities are numbered: a first one, 0000, or an output of the name without digits.
    """

    def __init__(self, place: Path, output: Path | None, *others: Path | None) -> None:
        """Find the images of a place, without files of the network's output or of other places."""
        self.place = place
        self.by_case: dict[str, list[Match]] = {}
        self.beside: list[str] = []  # names of files of another kind
        numbered = []
        if is_pattern(place):
            check_pattern(place, IMAGES.parts)
        else:
            numbered = find_matches(place / NUMBERED, IMAGES.suffixes)
        found: list[Match] = []
        for (pattern,) in patterns_of(IMAGES.names, place):
            found = found or find_matches(pattern, IMAGES.suffixes, may_join=is_pattern(place))
        # The cases of the network's output, and the files that patterns of other kinds take.
        outputs = set[str]()
        taken = set[Path]()
        for other in (output, *others):
            if other is None or not holds_many(other) or realpath(other) == realpath(place):
                continue
            pattern = other if is_pattern(other) else other / IMAGE
            matches = find_matches(pattern, LOGITS_SUFFIXES, may_join=is_pattern(other))
            if is_pattern(other):
                taken.update(match.path for match in matches)
            if other is output:
                outputs.update(match.case for match in matches)

        # The rest are the images of each case, and files of another kind beside them.
        from crfrefine.cases.proposals import images_among

        names = {match.case for match in (*found, *numbered)}
        by_path = {match.path: match for match in numbered}
        is_numbered = any(match.modality == "0000" for match in numbered)
        images = {match.path for match in images_among(found, str(place), names)}
        self._named = modalities_listed(place) if is_pattern(place) else ()
        for match in found:
            # A file that is listed among the modalities is no other one; its voxels are compared.
            if match.path in taken and match.modality not in self._named:
                continue
            if match.path not in images:
                self.beside.append(match.path.name)
                continue
            modality = by_path.get(match.path, match)
            if match.case not in outputs and (is_numbered or modality.case in outputs):
                match = modality
            self.by_case.setdefault(match.case, []).append(match)

    @cached_property
    def expected(self) -> tuple[tuple[str, ...], str]:
        """The modalities that each case must have, if any, in order, and their source."""
        counts = Counter[tuple[str, ...]]()
        is_listed = len(modality_globs(self.place)) > 1
        for matches in self.by_case.values():
            names = {match.modality for match in matches if match.modality}
            if names and all(map(_FOUR_DIGITS.fullmatch, names)) and not is_listed:
                names = {f"{number:04d}" for number in range(int(max(names)) + 1)}
            if names:
                counts[tuple(in_listed_order(self.place, names))] += 1
        if not counts:
            return (), ""
        # The most frequent ones; of two equally frequent ones the larger, so that missing files are
        # found.
        usual = max(counts, key=lambda names: (counts[names], len(names)))
        if is_listed:
            return usual, "as in the other cases"
        description = read_dataset_description(self.place)
        if description is not None and description.channel_names:
            source = f"as {description.path.name} names"
            channels = [name.casefold() for name in description.channel_names]
            if all(map(_FOUR_DIGITS.fullmatch, usual)):
                return tuple(f"{number:04d}" for number in range(len(channels))), source
            names_there = {name.casefold(): name for names in counts for name in names}
            if names_there.keys() >= {*channels}:
                return tuple(names_there[channel] for channel in channels), source
        return usual, "as in the other cases"

    def of(self, case_id: str, hint: str) -> CaseFiles:
        """Return a case of one file, or of one per modality, or with a problem and a hint."""
        matches = self.by_case[case_id]
        modalities, source = self.expected
        first = {match.modality: match.path for match in reversed(matches)}
        order = sorted(first, key=lambda name: ([*modalities, name].index(name), name))
        if "" in first:
            order = [""]
        names: tuple[str, ...] = ()
        if not all(_FOUR_DIGITS.fullmatch(name) for name in order if name):
            names = tuple(order)
        unnamed = tuple(first[name] for name in order if name not in self._named)
        images = tuple(first[name] for name in order)
        case = CaseFiles(case_id, images, modalities=names, unnamed=unnamed)
        if len(matches) > len(order):
            paths = [match.path for match in matches]
            advice = ""
            if is_pattern(self.place):
                advice = advise_on_folders(self.place, matches)
            return case.with_several(f"expected {IMAGES.one_file}", paths, self.place, advice)
        if "" in first or order == [*modalities]:
            return case
        absent = [name for name in modalities if name not in first]
        return case.with_problem(
            f"expected the modalities {listed(modalities, MAX_MODALITIES)}, {source}; "
            f"found {listed(order, MAX_MODALITIES)} in {self.place}{hint}",
            *(f"no modality {name} in {self.place}" for name in absent),
        )

    def cases(self) -> CaseList:
        """Return the cases, sorted by name.

        Raises InputError without any, or if only a pattern tells images from label maps.
        """
        from crfrefine.cases.layouts import names_both_kinds
        from crfrefine.cases.proposals import advise, propose

        place = self.place
        images = [match for matches in self.by_case.values() for match in matches]
        if not images:
            reason = "no image by this pattern, apart from what other options name"
            if not is_pattern(place):
                suffixes = ", ".join(VOLUME_SUFFIXES)
                reason = f"no case found: no file has one of the suffixes {suffixes}"
            raise InputError(f"{place}: {reason}{advise(place)}")
        if not is_pattern(place) and names_both_kinds([stem_of(match.path) for match in images]):
            raise InputError(
                f"{place}: images and label maps cannot be told apart by name{propose(place)}"
            )

        hint = advise_on_splits(place, images, "modality")
        cases = CaseList([self.of(case_id, hint) for case_id in sorted(self.by_case)])
        first = min(match.path for match in images)
        if is_pattern(place):
            cases.found = describe_found(place, images, self.expected[0])
        elif first.parent != place:
            shown = str(first.relative_to(place))
            cases.notes.append(NoteKind.FOLDER_PER_CASE(str(place), first=shown))
        if self.beside:
            note = NoteKind.NOT_IMAGES(str(place), files=len(self.beside), first=self.beside[0])
            cases.notes.append(note)
        return cases
