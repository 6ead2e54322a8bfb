"""Patterns of file names, such as `study/{case}/{case}-{modality}.nii.gz`, and what they match.

`{case}`, `{modality}` and `{label}` stand for a part of a name, the same one wherever they occur
again; `*` for anything. None of them crosses a `/`. `{case:p*,q??}` restricts the part to some
globs, and `{seg,label}` is one of some texts. A pattern without a known suffix has any of them.
"""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from crfrefine.base.text import counted, listed, shorten
from crfrefine.cases.conventions import CASE_IN_PATH, OTHER_WORDS
from crfrefine.errors import InputError
from crfrefine.io.formats import VOLUME_SUFFIXES
from crfrefine.io.paths import describe_others, is_folder, is_pattern, suffix_of

PARTS = ("case", "modality", "label")
_TOKEN = re.compile(r"\{([^{}/]*)\}|(\*)")
_MAX_NEAREST = 3
MAX_MODALITIES = 16  # most modalities that a message lists
_MAX_COMPARED = 1000  # most names that are compared with a pattern
# Most files that are looked at for a pattern to propose, and most folders above them.
_MAX_FILES = 5000
_MAX_DEPTH = 4
_MAX_WORDS = 32  # Names of a folder that differ in more words do not differ by modality.


class Match(NamedTuple):
    """A file, and the parts of its path that a pattern names."""

    path: Path
    case: str = ""
    modality: str = ""
    label: str = ""


def patterns_of(names: Sequence[Sequence[str]], place: Path) -> list[list[Path]]:
    """Return the lines of a table of names for a folder, or the pattern that is given instead."""
    if is_pattern(place):
        return [[place]]
    return [[place / name for name in line] for line in names]


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

    def value_of(token: re.Match[str]) -> str:
        part = token[1]
        if part not in PARTS:
            raise InputError(
                f"{pattern}: the path of an output has {{case}} and the like, and no *"
            )
        value: str = getattr(match, part)
        if not value:
            raise InputError(f"{pattern}: {{{part}}} has no counterpart in {match.path}")
        return value

    return Path(_TOKEN.sub(value_of, str(pattern)))


def find_matches(
    pattern: Path,
    suffixes: Sequence[str],
    listings: dict[Path, list[Path]] | None = None,
    cases: Collection[str] = (),
) -> list[Match]:
    """Return the files of a pattern with one of the suffixes, sorted by path.

    Hidden files and folders are skipped. `listings` keeps the content of the folders. A name that
    can be split in several ways has one of the `cases`, if that fits, or else the longest case.
    """
    root, names = _split(pattern)
    if listings is None:
        listings = {}
    folders = [root] if is_folder(root) else []
    for depth in range(1, len(names)):
        folders = _folders_inside(folders, root, names[:depth], listings)

    ending = suffix_of(pattern)
    text = "/".join(names)
    expression = _expression(text[: len(text) - len(ending)].removesuffix(".*"), cases)
    matches = []
    for folder in folders:
        for path in _visible(folder, listings):
            suffix = suffix_of(path)
            if suffix not in suffixes or ending not in ("", suffix) or not _is_file(path):
                continue
            name = path.relative_to(root).as_posix()
            found = expression.fullmatch(name[: len(name) - len(suffix)])
            if found:
                matches.append(Match(path, **found.groupdict()))
    return matches


def advise_on_splits(pattern: Path, matches: Sequence[Match], part: str) -> str:
    """Return a line on a pattern such as `{case}_{label}` if names can be split in several ways.

    It is "" unless the name of a case begins with that of another one and the text between.
    """
    between = re.search(rf"\{{case\}}([^{{}}/*]+)\{{{part}\}}", str(pattern))
    if between is None:
        return ""
    cases = {match.case for match in matches}
    names = set[str]()
    are_clear = True
    for match in matches:
        name = getattr(match, part)
        pieces = match.case.split(between[1])
        for number in range(len(pieces) - 1, 0, -1):
            if between[1].join(pieces[:number]) in cases:
                name = between[1].join([*pieces[number:], name])
                are_clear = False
                break
        names.add(name)
    if are_clear:  # Names of parts may have the text between, too.
        return ""
    choices = shorten(",".join(sorted(names)), 200)
    return (
        f"\n  A name may be split in several ways at {between[1]!r}: say which parts there are, as "
        f"with {{{part}:{choices}}}."
    )


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

    def likeness(path: Path) -> float:
        return difflib.SequenceMatcher(None, path.name, names[depth - 1]).ratio()

    near = sorted(there[:_MAX_COMPARED], key=likeness, reverse=True)
    shown = listed([path.relative_to(root) for path in near], _MAX_NEAREST)
    return f"\n  There are {shown} in {root}."


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
    templates: list[str] = []
    for place in CASE_IN_PATH:
        templates = templates or _templates(names, place)
    if len(templates) > _MAX_WORDS:
        return "", ""
    images: list[str] = []
    labels: list[str] = []
    for template in templates:
        (labels if _names_other(template) else images).append(template)
    pattern = images[0] if images else ""
    if len(images) > 1:
        # Templates are compared character by character, not folder by folder.
        forward = os.path.commonprefix(images)  # noqa: RUF071
        backward = os.path.commonprefix([image[::-1] for image in images])  # noqa: RUF071
        start = re.sub(r"[A-Za-z0-9]*$", "", forward)
        end = re.sub(r"^[A-Za-z0-9]*", "", backward[::-1])
        middles = [image[len(start) : len(image) - len(end)] for image in images]
        if all(re.fullmatch(r"[A-Za-z0-9][^/{}]*", middle) for middle in middles):
            pattern = f"{start}{{modality}}{end}"
    return pattern, labels[0] if labels else ""


def _names_other(name: str) -> bool:
    """Return whether one of the words of a name is that of a label map, a mask or scores."""
    return not {*OTHER_WORDS}.isdisjoint(re.split(r"[^a-z0-9]+", name.lower()))


def _templates(names: Sequence[str], place: str) -> list[str]:
    """Return the names that cases have in common, such as `{case}_t1.nii`, sorted.

    The name of the case is in a `place` of them. A name counts if more than half as many cases have
    it as have the most frequent one, and, of several cases, more than one has it.
    """
    cases = set[str]()
    found = Counter[str]()
    for name in names:
        suffix = suffix_of(Path(name))
        stem = name[: len(name) - len(suffix)]
        match = re.fullmatch(place, stem)
        if match is None or _names_other(match["case"]):
            continue
        cases.add(match["case"])
        rest = stem[match.end("case") :]
        if rest.startswith("/"):  # In the folder of a case, names may have its name again.
            more = r"\d" if match["case"][-1].isdigit() else r"[^\W\d_]"
            own = rf"(?<![^\W_]){re.escape(match['case'])}(?!{more})"
            rest = re.sub(own, "{case}", rest)
        found[f"{stem[: match.start('case')]}{{case}}{rest}{suffix}"] += 1
    fewest = max(found.values(), default=0) / 2
    if len(cases) > 1 or "/" not in place:
        fewest = max(fewest, 1)
    return sorted(name for name, count in found.items() if count > fewest)


def _split(pattern: Path) -> tuple[Path, tuple[str, ...]]:
    """Return the folder in which a pattern begins, and the names that follow."""
    parts = pattern.parts
    fixed = 0
    while fixed < len(parts) - 1:
        # A folder may have this very name.
        if _TOKEN.search(parts[fixed]) and not os.path.lexists(Path(*parts[: fixed + 1])):
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


def _expression(pattern: str, cases: Collection[str] = ()) -> re.Pattern[str]:
    """Return the regular expression of the names of a pattern; these cases are tried first."""
    expression = ""
    any_name = "[^/]+"
    any_case = "|".join([*map(re.escape, sorted(cases, key=len, reverse=True)), any_name])
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
            choice = any_case if name == "case" else any_name
            if colon:
                choice = _one_of(globs)
            expression += f"(?P<{name}>{choice})"
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
