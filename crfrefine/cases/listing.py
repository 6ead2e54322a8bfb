"""The files and folders that patterns match; hidden ones are skipped."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TypeAlias

from crfrefine.cases.patterns import Match, expression_of, split_pattern
from crfrefine.errors import InputError
from crfrefine.io.paths import is_folder, suffix_of

Listings: TypeAlias = dict[Path, list[Path]]  # what is in each folder that was looked into


def find_matches(
    pattern: Path,
    suffixes: Sequence[str],
    listings: Listings | None = None,
    cases: Collection[str] = (),
    *,
    may_join: bool = False,
) -> list[Match]:
    """Return the files of a pattern with one of the suffixes, sorted by path.

    Hidden files and folders are skipped. `listings` keeps the content of the folders. A name that
    can be split in several ways has one of the `cases`, if that fits, or else the longest case. A
    `{case}` that occurs again has the same text; with `may_join`, if no file fits so, the name of
    a case has as few parts as fit.
    """
    if listings is None:
        listings = {}
    most_parts = 1
    if may_join:
        cases_named = re.findall(r"\{case[^{}/]*\}", str(pattern))
        most_parts = sum(name in ("{case}", cases_named[0]) for name in cases_named)
    matches: list[Match] = []
    for num_parts in range(1, most_parts + 1):
        matches = matches or _find(pattern, suffixes, listings, cases, num_parts)
    return matches


def _find(
    pattern: Path,
    suffixes: Sequence[str],
    listings: Listings,
    cases: Collection[str],
    num_parts: int,
) -> list[Match]:
    """Return the files of a pattern whose first `{case}`, so many, are parts of the name."""
    root, names = split_pattern(pattern)
    folders = [root] if is_folder(root) else []
    for depth in range(1, len(names)):
        folders = folders_inside(folders, root, names[:depth], listings, num_parts)

    ending = suffix_of(pattern)
    text = "/".join(names)
    stem = text[: len(text) - len(ending)]
    if not ending:
        stem = stem.removesuffix(".*")
    expression = expression_of(stem, cases, num_parts)
    matches = []
    for folder in folders:
        for path in visible_inside(folder, listings):
            suffix = suffix_of(path)
            if suffix not in suffixes or ending not in ("", suffix) or not _is_file(path):
                continue
            name = path.relative_to(root).as_posix()
            found = expression.fullmatch(name[: len(name) - len(suffix)])
            if found:
                parts: dict[str, list[str]] = {}  # of the name of a case there may be several
                for group, piece in found.groupdict().items():
                    parts.setdefault(group.partition("_")[0], []).append(piece)
                joined = {part: "_".join(pieces) for part, pieces in parts.items()}
                matches.append(Match(path, **joined))
    return matches


def list_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return the folder's files of the given formats, sorted by name, without hidden ones."""
    return [
        path
        for path in visible_inside(folder, {})
        if suffix_of(path) in suffixes and _is_file(path)
    ]


def folders_inside(
    folders: Sequence[Path],
    root: Path,
    names: Sequence[str],
    listings: Listings,
    num_parts: int = 1,
) -> list[Path]:
    """Return the folders in some folders whose paths from the root are those of a pattern."""
    expression = expression_of("/".join(names), (), num_parts)
    inside = []
    for folder in folders:
        for path in visible_inside(folder, listings):
            if expression.fullmatch(path.relative_to(root).as_posix()) and is_folder(path):
                inside.append(path)
    return inside


def visible_inside(folder: Path, listings: Listings) -> list[Path]:
    """Return the entries of a folder by name, without hidden files such as unfinished ones."""
    if folder not in listings:
        try:
            paths = sorted(folder.iterdir())
        except OSError as error:
            raise InputError(f"{folder}: cannot be listed: {error.strerror or error}") from error
        listings[folder] = [path for path in paths if not path.name.startswith(".")]
    return listings[folder]


def _is_file(path: Path) -> bool:
    # A link to nothing, as to data that were not fetched, counts as a file: its case must fail.
    return path.is_file() or (path.is_symlink() and not path.exists())
