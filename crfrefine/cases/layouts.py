"""Guesses how the files of a data set are named, from their paths: the parts for case and role.

Each guess, a layout, tells by its own rule where paths have the name of the case. Paths that are
then alike but for the case are a role, such as `{case}/{case}_t1.nii`. Folders that only group
cases, as `HGG` and `LGG` do, are no part of a role: no case has a file in two of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple, TypeAlias

from crfrefine.cases.conventions import OTHER_WORDS

# The names of a path, from the first folder to the file without its suffix, with `{case}`: one
# each, or those of folders that group cases.
Names: TypeAlias = tuple[frozenset[str], ...]

_CASE = "{case}"
_SEPARATOR = re.compile(r"[_.-]+")
# A word and a number, such as volume-12 or img0012, and a word and a name, such as vol_P012.
_NUMBERED = re.compile(r"([A-Za-z]+[_-]?)(\d.*)")
_WORD_FIRST = re.compile(r"([A-Za-z]+[_-])([A-Za-z].*\d.*)")
_SERIAL = re.compile(r"\.\d+$")  # a number that is another one in each file
_MAX_DEPTH = 5
_MAX_LOOKED_AT = 8  # most folders that are looked into before they are taken for groups of cases


class File(NamedTuple):
    """A file of a data set."""

    path: str  # from the folder of the data set
    folders: tuple[str, ...]
    stem: str
    suffix: str


@dataclass
class Role:
    """Files that have the same names but for the case, one of each case."""

    names: Names
    suffix: str
    files: dict[str, File] = field(default_factory=dict)  # by case

    @property
    def text(self) -> str:
        """The names with `/` between them."""
        return "/".join(",".join(sorted(name)) for name in self.names)

    @property
    def last_name(self) -> str:
        """The name of the file, without its suffix."""
        (name,) = self.names[-1]
        return name


Kind: TypeAlias = Callable[[File], str]  # tells what a file holds, such as "image"
_Named: TypeAlias = tuple[str, tuple[str, ...], File]  # case, names with `{case}`, file


def guess_layouts(files: Sequence[File], kind_of: Kind) -> Iterator[list[Role]]:
    """Yield the roles of what the names may mean, by the most usual rules first."""
    deepest = min(max((len(file.folders) for file in files), default=0), _MAX_DEPTH)
    for depth in reversed(range(deepest)):
        yield _roles(_by_folders(files, depth, 1), kind_of)
    stems = {file.stem for file in files}
    for starts in _starts_of(stems):
        yield _roles(_by_start(files, starts), kind_of)
    # The case is the number, or the name, after a word.
    for expression in (_NUMBERED, _WORD_FIRST):
        named: list[_Named] = []
        for file in files:
            found = expression.fullmatch(file.stem)
            if found:
                named.append((found[2], (*file.folders, found[1] + _CASE), file))
        yield _roles(named, kind_of)
    for depth in range(deepest - 1):
        yield _roles(_by_folders(files, depth, 2), kind_of)


def _by_folders(files: Iterable[File], depth: int, number: int) -> Iterator[_Named]:
    """Yield files whose case is named by a folder, or by two, as by patient and week."""
    for file in files:
        folders = file.folders[depth : depth + number]
        if len(folders) == number:
            case = "_".join(folders)
            inside = []
            for name in (*file.folders[depth + number :], file.stem):
                for part in dict.fromkeys((case, folders[0])):
                    name = without_part(name, part)
                inside.append(_SERIAL.sub(".*", name) if number == 1 else name)
            yield case, (*file.folders[:depth], *[_CASE] * number, *inside), file


def _by_start(files: Iterable[File], starts: Collection[str]) -> Iterator[_Named]:
    """Yield files whose case is the start of their name, the longest of some."""
    for file in files:
        ends = [found.start() for found in _SEPARATOR.finditer(file.stem)]
        for end in (len(file.stem), *reversed(ends)):
            case = file.stem[:end]
            if case in starts:
                folders = [_CASE if name == case else name for name in file.folders]
                yield case, (*folders, _CASE + file.stem[end:]), file
                break


def without_part(name: str, part: str, placeholder: str = _CASE) -> str:
    """Return a name with a placeholder for one of its parts, but not for a part of a word."""
    if part not in name:
        return name
    more = r"\d" if part[-1].isdigit() else r"[^\W\d_]"
    return re.sub(rf"(?<![^\W_]){re.escape(part)}(?!{more})", placeholder, name)


def _starts_of(stems: Collection[str]) -> list[set[str]]:
    """Return the starts of names that may be cases, by one rule after the other.

    An ending with letters that several starts have is none of the case: the longest such ending, or
    the shortest. A whole name with which others begin is a case, too, and so may be any whole name.
    """
    owners = Counter[str]()
    splits = {}
    for stem in stems:
        places = [found.start() for found in _SEPARATOR.finditer(stem) if found.start()]
        splits[stem] = [(stem[:place], stem[place:]) for place in places]
        owners.update(ending for _, ending in splits[stem])
    shortest = set()
    longest = set()
    for stem, pairs in splits.items():
        starts = [stem]
        for start, ending in pairs:
            if owners[ending] > 1 and re.search("[A-Za-z]", ending):
                starts.append(start)
        longest.add(max(starts[1:], key=len, default=stem))
        shortest.add(min(starts, key=len))
    of_others = set[str]()
    for pairs in splits.values():
        of_others.update(start for start, _ in pairs if start in stems)
    return [_first_starts(longest), _first_starts(shortest), of_others, {*stems}]


def _first_starts(starts: Collection[str]) -> set[str]:
    """Return the starts without those that begin with another one."""
    kept = set()
    for start in starts:
        shorter = (start[: found.start()] for found in _SEPARATOR.finditer(start))
        if not any(other in starts for other in shorter):
            kept.add(start)
    return kept


def _roles(named: Iterable[_Named], kind_of: Kind) -> list[Role]:
    """Return the roles of files with the names of their cases; grouping folders are merged."""
    roles: dict[tuple[tuple[str, ...], str], Role] = {}
    twice = set()
    for case, names, file in named:
        place = (names, file.suffix)
        role = roles.setdefault(
            place, Role(tuple(frozenset([name]) for name in names), file.suffix)
        )
        if case in role.files:
            twice.add(place)
        role.files[case] = file
    return _merge_folders([role for place, role in roles.items() if place not in twice], kind_of)


def _merge_folders(roles: Sequence[Role], kind_of: Kind) -> list[Role]:
    """Return the roles with those as one that differ in folders, if no case is in two of them."""
    alike: dict[tuple[str, ...], list[Role]] = {}
    for role in roles:
        names = role.text.split("/")
        folders = [name if _CASE in name else "*" for name in names[:-1]]
        alike.setdefault((*folders, names[-1], role.suffix), []).append(role)
    merged = []
    for group in alike.values():
        clusters: list[Role] = []
        for role in sorted(group, key=lambda role: role.text.split("/")):
            for number, cluster in enumerate(clusters):
                if not cluster.files.keys().isdisjoint(role.files):
                    continue
                files = [next(iter(one.files.values())) for one in (cluster, role)]
                if len(group) > _MAX_LOOKED_AT or kind_of(files[0]) == kind_of(files[1]):
                    names_of_both = tuple(map(frozenset.union, cluster.names, role.names))
                    files_of_both = {**cluster.files, **role.files}
                    clusters[number] = Role(names_of_both, role.suffix, files_of_both)
                    break
            else:
                clusters.append(role)
        merged += clusters
    return merged


def have_common_endings(stems: Sequence[str]) -> bool:
    """Return whether names of one folder are those of fewer cases with the same endings each."""
    starts, *_ = _starts_of({*stems})
    return 1 < 2 * len(starts) <= len(stems)


def names_both_kinds(stems: Sequence[str]) -> bool:
    """Return whether names of one folder tell images from label maps, masks or scores beside them.

    Most cases have a file of both, as `volume-1` and `segmentation-1`.
    """
    if not any(_has_other_word(stem) for stem in stems):
        return False
    files = [File(stem, (), stem, "") for stem in stems]
    for roles in guess_layouts(files, lambda _: ""):
        others = [role for role in roles if _has_other_word(role.last_name)]
        images = [role for role in roles if not _has_other_word(role.last_name)]
        for one, other in product(images, others):
            most = max(len(one.files), len(other.files), 2)
            if 2 * len(one.files.keys() & other.files.keys()) > most:
                return True
    return False


def _has_other_word(name: str) -> bool:
    """Return whether one of the words of a name is that of a label map, a mask or scores."""
    return not words_in(name).isdisjoint(OTHER_WORDS)


def words_in(name: str) -> set[str]:
    """Return the words of a file's name in lower case, apart from the case."""
    return {*re.split(r"[^a-z0-9]+", name.replace(_CASE, " ").lower())}
