"""Patterns of roles: how the names of a data set's files are written with `{case}` and the like."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from itertools import product

from crfrefine.cases.layouts import Names, Role
from crfrefine.cases.patterns import expression_of_globs

_MAX_LISTED = 8  # folders or endings
_NO_PATTERN = re.compile(r"[{},*?\[\]]")


def write_patterns(roles: Sequence[Role], part: str, *, is_ordered: bool = False) -> Iterator[str]:
    """Yield patterns of a role, or of roles that differ in one word, the simplest first.

    The word is `{modality}`, or another `part`. With `is_ordered`, it is a list in the order of the
    roles. Nothing is yielded for names that cannot be written so.
    """
    unified = _unify(roles, part)
    if unified is None:
        return
    names, words = unified
    if any(map(_NO_PATTERN.search, words)):
        return
    globs = []
    *folders_of_all, (file_name,) = names
    for folders in folders_of_all:
        if len(folders) == 1:
            globs.append([*folders])
            continue
        # Globs that fit all folders: the widest first.
        of_folders = ["*"]
        start = re.sub(r"\d+$", "", os.path.commonprefix([*folders]))  # noqa: RUF071 - characters
        if start:
            of_folders.append(f"{start}*")
        if len(folders) <= _MAX_LISTED and not any(map(_NO_PATTERN.search, folders)):
            of_folders.append(f"{{{','.join(sorted(folders))}}}")
        globs.append(of_folders)
    if not is_ordered:
        words = sorted(words)
    placeholder = f"{{{part}}}"
    listed = f"{{{part}:{','.join(words)}}}"
    for of_path in product(*globs):
        text = "/".join([*of_path, f"{file_name}{roles[0].suffix}"])
        if not is_ordered:
            yield text
        if len(words) > 1:
            yield text.replace(placeholder, listed)


def words_between(roles: Sequence[Role]) -> list[str]:
    """Return the words in which roles differ, [] if they do not differ in one word."""
    unified = _unify(roles, "modality")
    if unified is None:
        return []
    return unified[1]


def _unify(roles: Sequence[Role], part: str) -> tuple[Names, list[str]] | None:
    """Return the names of all roles with `{part}` where they differ, and the words there."""
    first = roles[0].names
    if len({(len(role.names), role.suffix) for role in roles}) > 1:
        return None
    if len(roles) == 1:
        return first, []
    by_depth = [*zip(*(role.names for role in roles), strict=True)]
    # If file names differ, they tell the roles, and folders may differ as they like.
    *others, place = [depth for depth, of_roles in enumerate(by_depth) if len({*of_roles}) > 1]
    if others and place < len(first) - 1:
        return None
    if any(len(of_role) > 1 for of_role in by_depth[place]):
        return None
    names = [name for of_role in by_depth[place] for name in of_role]
    # The start and the end that the names have in common, character by character, and the word of
    # each between.
    forward = os.path.commonprefix(names)  # noqa: RUF071
    backward = os.path.commonprefix([name[::-1] for name in names])  # noqa: RUF071
    start = re.sub(r"[A-Za-z0-9]*$", "", forward)
    end = re.sub(r"^[A-Za-z0-9]*", "", backward[::-1])
    words = [name[len(start) : len(name) - len(end)] for name in names]
    are_words = all(re.fullmatch(r"[A-Za-z0-9][^{}]*", word) for word in words)
    if not are_words or len({*words}) < len(roles):
        return None
    unified = [frozenset.union(*of_roles) for of_roles in by_depth]
    unified[place] = frozenset([f"{start}{{{part}}}{end}"])
    return tuple(unified), words


def globs_of_cases(cases: Collection[str], others: Collection[str]) -> Iterator[str]:
    """Yield globs that fit the names of some cases, and none of the others."""
    start = re.sub(r"\d+$", "", os.path.commonprefix([*cases]))  # noqa: RUF071 - characters
    candidates = [f"{start}*"]
    for ending in (r"[_-][^_-]*$", r"[_-][^_-]*[_-][^_-]*$"):
        endings = set()
        for case in cases:
            found = re.search(ending, case)
            shape = re.sub(r"\d", "?", found[0] if found else case)
            endings.add(f"*{shape}" if found else shape)
        candidates.append(",".join(sorted(endings)))
    for globs in candidates:
        expression = expression_of_globs(globs)
        is_known = globs != "*" and globs.count(",") < _MAX_LISTED
        if is_known and not any(re.fullmatch(expression, other) for other in others):
            yield globs
