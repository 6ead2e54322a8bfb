"""Patterns of file names, such as `study/{case}/{case}-{modality}.nii.gz`, and what they match.

`{case}`, `{modality}` and `{label}` are each a part of a name, the same one wherever they occur
again; `*` for anything. None of them crosses a `/`. `{case:p*,q??}` restricts the part to some
globs, and `{seg,label}` is one of some texts. A pattern without a known suffix has any of them.

The name of a case may have several parts, joined by `_`: a `{case:*}` with globs that the first one
has not is another part. If no file has the same text at each `{case}`, the second one is a part,
too. What follows is the whole name, or one of its parts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from crfrefine.base.text import shorten
from crfrefine.errors import InputError
from crfrefine.io.paths import is_pattern

PARTS = ("case", "modality", "label")
TOKEN = re.compile(r"\{([^{}/]*)\}|(\*)")


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


def modalities_listed(pattern: Path) -> tuple[str, ...]:
    """Return the modalities that a pattern lists by name: t1 of `{modality:t1,f*}`, not f*."""
    return tuple(name for name in modality_globs(pattern) if not re.search(r"[*?\[]", name))


def folder_of(place: Path) -> Path:
    """Return the folder in which a pattern begins; any other path as it is."""
    if not is_pattern(place):
        return place
    return split_pattern(place)[0]


def check_pattern(pattern: Path, parts: Collection[str]) -> None:
    """Raise InputError unless a pattern names the case, and nothing but these parts."""
    text = "/".join(split_pattern(pattern)[1])
    for found in TOKEN.finditer(text):
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
        expression_of(text)
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
        value = getattr(match, part)
        if not value:
            raise InputError(f"{pattern}: {{{part}}} has no counterpart in {match.path}")
        return value

    return Path(TOKEN.sub(value_of, str(pattern)))


def in_listed_order(pattern: Path, names: Collection[str]) -> list[str]:
    """Return modalities in the order of a pattern's list, as `{modality:dwi,adc}`, else sorted.

    Names of the same glob are sorted.
    """
    globs = modality_globs(pattern)

    def place_of(name: str) -> tuple[int, str]:
        for number, glob in enumerate(globs):
            if re.fullmatch(expression_of_globs(glob), name):
                return number, name
        return len(globs), name

    return sorted(names, key=place_of)


def modality_globs(pattern: Path) -> list[str]:
    """Return the globs to which a pattern restricts `{modality}`; [] for none."""
    found = re.search(r"\{modality:([^{}/]*)\}", str(pattern))
    if found is None:
        return []
    return found[1].split(",")


def split_pattern(pattern: Path) -> tuple[Path, tuple[str, ...]]:
    """Return the folder in which a pattern begins, and the names that follow."""
    parts = pattern.parts
    fixed = 0
    while fixed < len(parts) - 1:
        # A folder may have this very name.
        if TOKEN.search(parts[fixed]) and not os.path.lexists(Path(*parts[: fixed + 1])):
            break
        fixed += 1
    return Path(*parts[:fixed]), parts[fixed:]


def expression_of(pattern: str, cases: Collection[str] = (), num_parts: int = 1) -> re.Pattern[str]:
    """Return the regular expression of the names of a pattern; these cases are tried first.

    The first `{case}`, so many, are parts of the name, in groups `case`, `case_2`, and so on.
    """
    expression = ""
    any_name = "[^/]+"
    any_case = "|".join([*map(re.escape, sorted(cases, key=len, reverse=True)), any_name])
    end = 0
    seen: dict[str, str] = {}  # the globs of each part, by its group
    num_same = 0  # how often `{case}` occurred as it did first
    for found in TOKEN.finditer(pattern):
        expression += re.escape(pattern[end : found.start()])
        end = found.end()
        name, colon, globs = (found[1] or "*").partition(":")
        group = name
        if name == "case":
            is_same = not colon or globs == seen.get("case", globs)
            num_same += is_same
            if seen.get("case") is not None and (not is_same or num_same <= num_parts):
                group = f"case_{sum(part.startswith('case') for part in seen) + 1}"
        if group in seen:
            # A case occurs again by its whole name, or by a part of it.
            same = [f"(?P={other})" for other in seen if other.partition("_")[0] == name]
            whole_or_part = ["_".join(same), *same] if len(same) > 1 else same
            expression += f"(?:{'|'.join(whole_or_part)})"
        elif name in PARTS:
            choice = any_case if group == "case" else any_name
            if colon:
                choice = expression_of_globs(globs)
            seen[group] = globs
            expression += f"(?P<{group}>{choice})"
        elif name == "*":
            expression += "[^/]*"
        else:
            expression += f"(?:{expression_of_globs(name)})"
    return re.compile(expression + re.escape(pattern[end:]), re.DOTALL)


def expression_of_globs(globs: str) -> str:
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
