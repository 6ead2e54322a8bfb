"""Patterns of file names, such as `study/{case}/{case}-{modality}.nii.gz`, and what they match.

`{case}`, `{modality}` and `{label}` stand for a part of a name, the same one wherever they occur
again; `*` for anything. None of them crosses a `/`. `{case:p*,q??}` restricts the part to some
globs, and `{seg,label}` is one of some texts. A pattern without a known suffix has any of them.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from crfrefine.base.text import counted, listed, shorten
from crfrefine.errors import InputError
from crfrefine.io.paths import is_folder, suffix_of

PARTS = ("case", "modality", "label")
_TOKEN = re.compile(r"\{([^{}/]*)\}|(\*)")
_MAX_NEAREST = 3
MAX_MODALITIES = 16  # most modalities that a message lists
_MAX_COMPARED = 1000  # most names that are compared with a pattern


class Match(NamedTuple):
    """A file, and the parts of its path that a pattern names."""

    path: Path
    case: str
    modality: str
    label: str


def is_pattern(path: Path) -> bool:
    """Return whether a path is a pattern: it has `{` or `*`, and nothing has this very name."""
    text = str(path)
    # os.path.lexists raises no exception for odd names.
    return ("{" in text or "*" in text) and not os.path.lexists(text)


def holds_many(path: Path) -> bool:
    """Return whether an argument names the files of many cases: a folder, or a pattern."""
    return is_folder(path) or is_pattern(path)


def names_part(pattern: Path, part: str) -> bool:
    """Return whether a pattern has a placeholder, such as `label`."""
    return re.search(rf"\{{{part}[:}}]", str(pattern)) is not None


def folder_of(place: Path) -> Path:
    """Return the folder in which a pattern begins; any other path as it is."""
    if not is_pattern(place):
        return place
    return _split(place)[0]


def check_pattern(pattern: Path, parts: Collection[str]) -> None:
    """Raise InputError unless a pattern names the case, and nothing but these parts."""
    text = "/".join(_split(pattern)[1])
    for found in _TOKEN.finditer(text):
        name = (found[1] or "*").partition(":")[0]
        if name not in parts and "," not in name and name != "*":
            known = ", ".join(f"{{{part}}}" for part in parts)
            raise InputError(
                f"{pattern}: no such file or folder, and as a pattern it may have {known} and *, "
                f"not {{{shorten(name)}}}"
            )
    beside = re.search(r"\{(case|modality|label)\}(\*|\{(case|modality|label)[:}])", text)
    if beside and text.index(f"{{{beside[1]}}}") == beside.start():
        raise InputError(
            f"{pattern}: nothing says where {{{beside[1]}}} ends; expected a text between it and "
            "the next part"
        )
    try:
        _expression(text)
    except re.error as error:
        raise InputError(f"{pattern}: not a pattern: {error}") from None
    if not names_part(pattern, "case"):
        raise InputError(
            f"{pattern}: no such file or folder; a pattern says with {{case}} which part of a "
            f"path is the name of the case, such as {folder_of(pattern)}/{{case}}.nii.gz"
        )


def fill(pattern: Path, match: Match) -> Path:
    """Return the path that a pattern has with the parts of a file."""
    text = str(pattern)
    for part in PARTS:
        value = getattr(match, part)
        if not value and f"{{{part}}}" in text:
            raise InputError(f"{pattern}: {{{part}}} has no counterpart in {match.path}")
        text = text.replace(f"{{{part}}}", value)
    if _TOKEN.search(text):
        raise InputError(f"{pattern}: the path of an output has {{case}} and the like, and no *")
    return Path(text)


def find_matches(
    pattern: Path, suffixes: Sequence[str], listings: dict[Path, list[Path]] | None = None
) -> list[Match]:
    """Return the files of a pattern with one of the suffixes, sorted by path.

    Hidden files and folders are skipped. `listings` keeps the content of the folders.
    """
    root, names = _split(pattern)
    if listings is None:
        listings = {}
    folders = [root] if is_folder(root) else []
    for depth in range(1, len(names)):
        folders = _folders_inside(folders, root, names[:depth], listings)

    ending = suffix_of(pattern)
    text = "/".join(names)
    expression = _expression(text[: len(text) - len(ending)].removesuffix(".*"))
    matches = []
    for folder in folders:
        for path in _visible(folder, listings):
            suffix = suffix_of(path)
            if suffix not in suffixes or ending not in ("", suffix) or not _is_file(path):
                continue
            name = path.relative_to(root).as_posix()
            found = expression.fullmatch(name[: len(name) - len(suffix)])
            if found:
                parts = {"case": "", "modality": "", "label": "", **found.groupdict()}
                matches.append(Match(path, parts["case"], parts["modality"], parts["label"]))
    return matches


def describe_found(pattern: Path, matches: Sequence[Match], modalities: Sequence[str] = ()) -> str:
    """Return how many cases a pattern has, which modalities, and an example."""
    number = counted(len({match.case for match in matches}), "case")
    named = f", with the modalities {listed(modalities, MAX_MODALITIES)}" if modalities else ""
    first = min(matches, key=lambda match: (match.case, match.modality))
    return f"{number} by the pattern {pattern}{named}, such as {first.path}"


def list_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return the folder's files of the given formats, sorted by name, without hidden ones."""
    return [path for path in _visible(folder, {}) if suffix_of(path) in suffixes and _is_file(path)]


def nearest_files(pattern: Path, case_id: str | None = None) -> str:
    """Return a line with what is there in place of the files of a pattern, or of one case."""
    if case_id is not None:
        pattern = Path(re.sub(r"\{case(:[^{}/]*)?\}", lambda _: case_id, str(pattern)))
    root, names = _split(pattern)
    while not is_folder(root):
        names = (root.name, *names)
        root = root.parent
    folders = [root]
    for depth in range(1, len(names) + 1):
        inside = _folders_inside(folders, root, names[:depth], {})
        if not inside:
            break
        folders = inside
    there = [path for folder in folders for path in _visible(folder, {})]
    if not there:
        return f"\n  {folders[0]} is empty."
    wanted = difflib.SequenceMatcher(b=names[depth - 1])

    def distance(path: Path) -> float:
        wanted.set_seq1(path.name)
        return -wanted.ratio()

    near = sorted(there[:_MAX_COMPARED], key=distance)
    return f"\n  There are {listed(near, _MAX_NEAREST)}."


def _split(pattern: Path) -> tuple[Path, tuple[str, ...]]:
    """Return the folder in which a pattern begins, and the names that follow."""
    parts = pattern.parts
    fixed = 0
    while fixed < len(parts) - 1:
        # A folder may have this very name.
        if _TOKEN.search(parts[fixed]) and not Path(*parts[: fixed + 1]).exists():
            break
        fixed += 1
    return Path(*parts[:fixed]), parts[fixed:]


def _folders_inside(
    folders: Sequence[Path], root: Path, names: Sequence[str], listings: dict[Path, list[Path]]
) -> list[Path]:
    """Return the folders in some folders whose paths from the root are those of a pattern."""
    expression = _expression("/".join(names))
    inside = []
    for folder in folders:
        for path in _visible(folder, listings):
            if expression.fullmatch(path.relative_to(root).as_posix()) and is_folder(path):
                inside.append(path)
    return inside


def _expression(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of the names of a pattern."""
    expression = ""
    end = 0
    seen = set[str]()
    for found in _TOKEN.finditer(pattern):
        expression += re.escape(pattern[end : found.start()])
        end = found.end()
        name, colon, globs = (found[1] or "*").partition(":")
        if name in seen:
            expression += f"(?P={name})"
        elif name in PARTS:
            seen.add(name)
            expression += f"(?P<{name}>{_one_of(globs) if colon else '[^/]+'})"
        elif name == "*":
            expression += "[^/]*"
        else:
            expression += f"(?:{_one_of(name)})"
    return re.compile(expression + re.escape(pattern[end:]), re.DOTALL)


def _one_of(globs: str) -> str:
    """Return the expression for one of some globs, separated by commas."""
    choices = []
    for glob in globs.split(","):
        choice = ""
        for piece in re.split(r"(\*|\?|\[[^\]]+\])", glob):
            if piece.startswith("[") and piece.endswith("]"):
                choice += piece.replace("[!", "[^")
            else:
                choice += {"*": "[^/]*", "?": "[^/]"}.get(piece, re.escape(piece))
        choices.append(choice)
    return "|".join(choices)


def _visible(folder: Path, listings: dict[Path, list[Path]]) -> list[Path]:
    """Return what is in a folder, sorted by name, without hidden files such as unfinished ones."""
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
