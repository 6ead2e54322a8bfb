"""The files of one kind in a folder, by the table of `conventions`, or those of a pattern."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from crfrefine.base.text import listed
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.conventions import ALONE, OTHERS, Kind
from crfrefine.cases.patterns import (
    Match,
    check_pattern,
    describe_found,
    find_matches,
    is_pattern,
    list_files,
    names_part,
    nearest_files,
    of_case,
)
from crfrefine.cases.proposals import propose
from crfrefine.errors import InputError
from crfrefine.io.paths import describe_others, stem_of

_ENDS_IN_CASE = re.compile(r"\{case(:[^{}]*)?\}$")


class Files:
    """The files of one kind in a folder, or those of a pattern, by their case."""

    def __init__(self, place: Path, kind: Kind) -> None:
        self.place = place
        self.kind = kind
        self.listings: dict[Path, list[Path]] = {}
        lines = [[place / name for name in line] for line in kind.names]
        others = [place / name for name in OTHERS]
        if is_pattern(place):
            check_pattern(place, kind.parts)
            lines = [[place]]
            stem = stem_of(place).removesuffix(".*")
            others = []
            if _ENDS_IN_CASE.search(stem):  # It fits files with endings, too.
                others = [place.with_name(stem + name.removeprefix("{case}")) for name in OTHERS]
        # the files of each case, for each line of the table
        self._lines: list[dict[str, list[Match]]] = []
        # the names of the case that each file may belong to, the best first
        self._cases_of: dict[Path, list[str]] = {}
        for line in lines:
            by_case: dict[str, list[Match]] = {}
            for pattern in line:
                for match in self._matches(pattern):
                    by_case.setdefault(match.case, []).append(match)
                    cases = self._cases_of.setdefault(match.path, [])
                    # Names with an ending say more than any others.
                    cases.insert(0 if "_" in pattern.name else len(cases), match.case)
            self._lines.append(by_case)
        for pattern in others:
            for match in self._matches(pattern):
                if match.path in self._cases_of:
                    self._cases_of[match.path].append(match.case)

    def _matches(self, pattern: Path) -> list[Match]:
        matches = find_matches(pattern, self.kind.suffixes, self.listings)
        if pattern != self.place / ALONE:
            return matches
        suffixes = self.kind.suffixes
        return [match for match in matches if len(list_files(match.path.parent, suffixes)) == 1]

    @property
    def is_per_label(self) -> bool:
        """Whether a pattern says that a case has a file for each label or structure."""
        return is_pattern(self.place) and names_part(self.place, "label")

    @property
    def paths(self) -> list[Path]:
        """All files."""
        return [*self._cases_of]

    def require_any(self) -> None:
        """Raise InputError for a pattern without any file."""
        if is_pattern(self.place) and not self.paths:
            raise InputError(f"{self.place}: no file by this pattern{nearest_files(self.place)}")

    def of(self, case_id: str, but: Collection[Path] = ()) -> list[Match]:
        """Return the files of a case with its best names, without those in `but`."""
        for line in self._lines:
            matches = [match for match in line.get(case_id, ()) if match.path not in but]
            if matches:
                return matches
        return []

    def cases(self) -> list[str]:
        """Return the names of all cases, sorted; a file of another kind beside one is no case."""
        names = {cases[0] for cases in self._cases_of.values()}
        beside = set[str]()
        for name, *others in self._cases_of.values():
            if not names.isdisjoint({*others} - {name}):
                beside.add(name)
        return sorted(names - beside)

    def strays(self, case_ids: Collection[str]) -> dict[str, list[Path]]:
        """Return the files that belong to none of these cases, by the name of theirs."""
        strays: dict[str, list[Path]] = {}
        names = {cases[0] for cases in self._cases_of.values()}
        for path, cases in self._cases_of.items():
            if not any(case in case_ids for case in cases):
                beside = [case for case in cases[1:] if case in names]
                strays.setdefault([*beside, cases[0]][0], []).append(path)
        return strays

    def described(self, case_ids: Sequence[str]) -> list[str]:
        """Return a line on the cases of a pattern; none of a folder."""
        if not is_pattern(self.place) or not case_ids:
            return []
        return [describe_found(self.place, [self.of(case_id)[0] for case_id in case_ids])]

    def advice(self) -> str:
        """Return a line with what there is in place of the files; "" if nothing is known."""
        if is_pattern(self.place):
            return nearest_files(self.place)
        return propose(self.place, holds_images=False) or describe_others(self.place)

    def add_to(self, case: CaseFiles) -> CaseFiles:
        """Return a case with its file, or with a problem if there are several or none."""
        matches = self.of(case.case_id, case.images)
        if len(matches) == 1:
            return self.kind.added(case, matches[0].path)
        if matches:
            found = file_names([match.path for match in matches])
            return case.lacking(f"expected {self.kind.one}, found {found} in {self.place}")
        what = f"no {self.kind.what} in {self.place}"
        expected = self.kind.expected.replace("CASE", case.case_id)
        if is_pattern(self.place):
            nearest = nearest_files(of_case(self.place, case.case_id))
            expected = f"a file by this pattern{nearest}"
        return case.lacking(f"{what}; expected {expected}", what)


def file_names(paths: Collection[Path]) -> str:
    """Return the names of some files, for messages; with their folders if these differ."""
    if len({path.parent for path in paths}) > 1:
        return listed(sorted(paths))
    return listed([path.name for path in sorted(paths)])
