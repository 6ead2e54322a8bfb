"""The files of one kind by their case: in a folder, of a pattern, or those of the only case.

Files are named as in `conventions`, by a pattern, or given one by one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unicodedata import normalize

from crfrefine.base.notes import NoteKind
from crfrefine.cases.case_files import CaseFiles, CaseList
from crfrefine.cases.conventions import (
    ALONE,
    ALONE_NUMBERED,
    IMAGE_WORDS,
    LABEL_MAP,
    LABEL_WORDS,
    MASK_WORDS,
    OF_CASE,
    OTHERS,
    STROKES,
    STRUCTURES,
    Kind,
    without_word,
)
from crfrefine.cases.dataset_description import read_dataset_description
from crfrefine.cases.listing import Listings, find_matches, list_files
from crfrefine.cases.pattern_advice import (
    advise_on_folders,
    advise_on_number,
    describe_found,
    nearest_files,
)
from crfrefine.cases.patterns import Match, check_pattern, names_part, patterns_of
from crfrefine.errors import InputError
from crfrefine.io.paths import file_to_read, is_folder, is_pattern, stem_of

_ENDS_IN_CASE = re.compile(r"\{case(:[^{}]*)?\}$")
_NAME_OF_NUMBERED = Path(ALONE_NUMBERED).name


class Files:
    """The files of one kind by their case: in a folder, of a pattern, or those of the only case."""

    def __init__(self, kind: Kind, *places: Path, cases: Collection[str] = ()) -> None:
        """Find the files in the only place, or take the files that are given.

        `cases` are known names of cases: in names of files per label, they tell where the label
        begins. Raises InputError for a pattern without any file, unless these are optional.
        """
        self.kind = kind
        self.place = places[0]
        self.is_pattern = is_pattern(self.place)
        self.one_file = kind.one_file or f"one file of {kind.what}"  # for messages
        # for each line of names of the kind, the files of each case
        self._lines: list[dict[str, list[Match]]] = []
        # the names of the case that each file may belong to, the best first
        self.cases_of: dict[Path, list[str]] = {}
        self._listings: Listings = {}
        self._known: Collection[str] = ()
        self.given: list[Match] = []  # the files of the only case
        if len(places) > 1 or not (self.is_pattern or is_folder(self.place)):
            # Several files of label maps are structures with the names of the files.
            are_structures = kind is LABEL_MAP and len(places) > 1
            for path in places:
                file_to_read(path, kind.suffixes)
                self.given.append(Match(path, label=stem_of(path) if are_structures else ""))
            return

        stem = "{case}"
        if self.is_pattern:
            check_pattern(self.place, kind.parts)
            stem = stem_of(self.place).removesuffix(".*")
        if names_part(self.place, "label"):
            self._known = cases
        for line in patterns_of(kind.names, self.place):
            by_case: dict[str, list[Match]] = {}
            for pattern in line:
                for match in self._matches(pattern):
                    by_case.setdefault(match.case, []).append(match)
                    names = self.cases_of.setdefault(match.path, [])
                    # Names with an ending say more than any others.
                    has_ending = "_" in pattern.name and pattern.name != _NAME_OF_NUMBERED
                    names.insert(0 if has_ending else len(names), match.case)
            self._lines.append(by_case)
        if self.is_pattern and not self.cases_of and not kind.is_optional:
            from crfrefine.cases.proposals import advise

            hint = advise(self.place, holds_images=False)
            raise InputError(f"{self.place}: no file by this pattern{hint}")
        if _ENDS_IN_CASE.search(stem):  # `{case}` has then taken endings such as `_seg` along.
            folder = self.place.parent if self.is_pattern else self.place
            for name in OTHERS:
                for match in self._matches(folder / (stem + name.removeprefix("{case}"))):
                    if match.path in self.cases_of:
                        self.cases_of[match.path].append(match.case)

    def _matches(self, pattern: Path) -> list[Match]:
        """Return the files of a pattern; some names of the table count for whole folders only."""
        suffixes = self.kind.suffixes
        matches = find_matches(
            pattern, suffixes, self._listings, self._known, may_join=self.is_pattern
        )
        alone = (self.place / ALONE, self.place / ALONE_NUMBERED)
        if pattern not in (*alone, self.place / OF_CASE):
            return matches
        are_alone = pattern in alone
        counts = Counter(match.path.parent for match in matches)
        folders = set()
        for folder, number in counts.items():
            if number == len(list_files(folder, suffixes)) and are_alone == (number == 1):
                folders.add(folder)
        return [match for match in matches if match.path.parent in folders]

    def of(self, case_id: str, others: Collection[Path] = ()) -> list[Match]:
        """Return the files of a case with its best names, without the `others` of it.

        Letters with accents may be stored in two forms, which look alike: macOS takes them apart.
        """
        for line in self._lines:
            found = line.get(case_id, ())
            if not found and not case_id.isascii():
                composed = normalize("NFC", case_id)
                found = next(
                    (line[name] for name in line if normalize("NFC", name) == composed), ()
                )
            matches = [match for match in found if match.path not in others]
            if matches:
                return matches
        return []

    def by_case(self, known: Collection[str] = ()) -> dict[str, list[Path]]:
        """Return the files by the names of their cases, sorted, without those of known cases.

        A file that may belong to several cases belongs to the one that another file names: a_seg
        beside a belongs to a. A single file belongs to the only known case, or else to the case of
        its name, without a word for a label map at the end.
        """
        if self.given:
            name = without_word(stem_of(self.place), LABEL_WORDS)
            return {} if known else {name: [self.place]}
        found: dict[str, list[Path]] = {}
        names = {cases[0] for cases in self.cases_of.values()}
        known_forms = {normalize("NFC", case) for case in known}
        for path, cases in self.cases_of.items():
            if not any(normalize("NFC", case) in known_forms for case in cases):
                beside = [case for case in cases[1:] if case in names]
                found.setdefault([*beside, cases[0]][0], []).append(path)
        return dict(sorted(found.items()))

    def described(self, case_ids: Sequence[str]) -> str:
        """Return a line on how many cases a pattern has; "" for a folder."""
        if not self.is_pattern or not case_ids:
            return ""
        return describe_found(self.place, [self.of(case_id)[0] for case_id in case_ids])

    def add_to(self, cases: CaseList, first_label: int = 0) -> None:
        """Add its files to each case, or the problem of a case without any, or with too many.

        Files per label begin with `first_label`. Raises InputError for the files of one case if
        there are several.
        """
        if self.given and len(cases) != 1:
            raise InputError(
                f"{self.place}: {self.one_file} for {len(cases)} cases; "
                "give a folder, a pattern, or the images of one case"
            )
        for number, case in enumerate(cases):
            matches = self.given or self.of(case.case_id, case.images)
            if not matches and self.kind is LABEL_MAP and cases.is_single and is_folder(self.place):
                matches = structures_inside(self.place, case.images)
            if matches and matches[0].label:
                if self.kind is LABEL_MAP:
                    cases[number] = case.with_structures(matches)
                else:
                    cases[number] = self._with_labels(case, matches, first_label)
                continue
            paths = [match.path for match in matches]
            if len(paths) > 1 and not self.given and self.kind is not STROKES:
                advice = advise_on_folders(self.place, matches) if self.is_pattern else ""
                expected = f"expected {self.one_file}"
                cases[number] = case.with_several(expected, paths, self.place, advice)
            elif paths or self.kind.is_optional:
                files: Any = tuple(paths)
                if self.kind.field in ("mask", "labels"):
                    files = next(iter(files), None)
                cases[number] = replace(case, **{self.kind.field: files})
            else:
                cases[number] = self._without_file(case)

        if self.given or not self.kind.strays:
            return
        strays = set[Path]().union(*self.by_case({case.case_id for case in cases}).values())
        strays.difference_update(*(case.paths for case in cases))
        if strays:
            note = NoteKind.WITHOUT_IMAGES(
                str(self.place),
                files=len(strays),
                what=self.kind.strays,
                first=min(path.name for path in strays),
            )
            cases.notes.append(note)

    def _without_file(self, case: CaseFiles) -> CaseFiles:
        """Return a case with its problem: it has no file, where it may have one by another name."""
        expected = self.kind.expected.replace("CASE", case.case_id)
        if self.is_pattern:
            advice = advise_on_number(self.place, case.case_id)
            advice = advice or nearest_files(self.place, case.case_id)
            expected = f"a file by this pattern{advice}"
        missing = f"no {self.kind.what.replace('CASE', case.case_id)} in {self.place}"
        problem = missing
        for match in self.of(case.case_id):
            problem += f", where {match.path.name} is its image"
        name = case.case_id.removesuffix("_0000")
        if name != case.case_id and self.of(name):
            expected += (
                f"; there is {name}, as the case is called by folders of the other files, or with "
                "{case}_0000 in their patterns"
            )
        return case.with_problem(f"{problem}; expected {expected}", missing)

    def _with_labels(
        self, case: CaseFiles, matches: Sequence[Match], first_label: int
    ) -> CaseFiles:
        """Return a case with its file of each label, in order, or with a problem.

        Labels are numbers, or names in a `dataset.json`; others are -1.
        """
        description = read_dataset_description(self.place)
        numbers = {}
        if description is not None:
            numbers = {name: label for label, name in description.label_names.items()}
        for match in matches:
            if match.label.isdecimal():
                numbers[match.label] = int(match.label)
        by_label = sorted((numbers.get(match.label, -1), match.path) for match in matches)
        labels = [label for label, _ in by_label]
        paths = tuple(path for _, path in by_label)
        declared = []  # numbers that may have gaps
        if description is not None:
            declared = [*description.numbers[first_label:]]
        if labels in ([*range(first_label, first_label + len(paths))], declared):
            return replace(case, network=paths)
        expected = f"expected one file for each label from {first_label}"
        after = ""
        if labels[0] < 0:
            after = "; {label} is a number, or a name in dataset.json, for structures with "
            after += "--input-type labels any name"
        elif labels[0] == 1 and first_label == 0:
            expected = f"the background seems to be missing: {expected}"
            after = "; --add-background computes it from the probabilities of labels 1, 2, …"
        return case.with_several(expected, paths, self.place, after)


def structures_inside(folder: Path, images: Collection[Path] = ()) -> list[Match]:
    """Return the structures in the folder of one case, apart from its images."""
    for name in STRUCTURES:
        found = find_matches(folder / name, LABEL_MAP.suffixes)
        matches = [match for match in found if match.path not in images]
        if matches:
            return matches
    return []


def structures_by_case(folder: Path) -> dict[str, list[Match]]:
    """Return the structures of each case, if the folder of each case holds only structures.

    The result is empty if the files of a case may be its images and label maps.
    """
    files = Files(LABEL_MAP, folder)
    structures = {}
    words = {*IMAGE_WORDS, *LABEL_WORDS, *MASK_WORDS}
    for case_id in files.by_case():
        matches = files.of(case_id)
        for match in matches:
            if match.label.startswith(case_id) or match.label.lower() in words:
                return {}
        if matches[0].label:
            structures[case_id] = matches
    return structures
