"""Messages about a pattern: how many cases it has, and what to write instead of it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from crfrefine.base.text import counted, listed, shorten
from crfrefine.cases.listing import find_matches, folders_inside, visible_inside
from crfrefine.cases.patterns import TOKEN, Match, split_pattern
from crfrefine.io.formats import LOGITS_SUFFIXES
from crfrefine.io.paths import is_folder, stem_of

MAX_MODALITIES = 16  # most modalities that a message lists
_MAX_NEAREST = 3
_MAX_COMPARED = 1000  # most names that are compared with a pattern
_NUMBER = "_0000"  # of the first modality, as nnU-Net has it
_CASE = re.compile(r"\{case(:[^{}/]*)?\}")


def advise_on_splits(pattern: Path, matches: Sequence[Match], part: str) -> str:
    """Return a line on a pattern such as `{case}_{label}` if names can be split in several ways.

    It is "" unless the name of a case begins with that of another one and the text between.
    """
    between = re.search(rf"\{{case\}}([^{{}}/*]+)\{{{part}\}}", str(pattern))
    if between is None:
        return ""
    cases = {match.case for match in matches}
    names = set()
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
    """Return how many cases a pattern has, which modalities, and an example.

    It mentions names that are joined of several parts, and how many more files would fit if two
    folders `{case}` were two parts of the name.
    """
    number = counted(len({match.case for match in matches}), "case")
    named = f", with the modalities {listed(modalities, MAX_MODALITIES)}" if modalities else ""
    first = min(matches, key=lambda match: (match.case, match.modality))
    found = f"{number} by the pattern {pattern}{named}, such as {first.path}"
    if first.case not in str(first.path):  # Its parts were joined.
        found += f", of the case {first.case}"

    names = list(pattern.parts)
    names[-1] = stem_of(pattern).removesuffix(".*")
    twins = [place for place, name in enumerate(names) if name == "{case}"]
    if len(twins) < 2:
        return found
    names[twins[1]] = "{case:*}"
    names[-1] += pattern.name[len(stem_of(pattern)) :]
    joined = Path(*names)
    taken = {match.path for match in matches}
    others = [match for match in find_matches(joined, LOGITS_SUFFIXES) if match.path not in taken]
    if twins[1] == len(names) - 1:  # Other files beside those of a case are usual.
        cases = {match.case for match in matches}
        others = [match for match in others if stem_of(match.path) in cases]
    if others:
        more = counted(len(others), "more file")
        found += f"; {more} such as {others[0].path} would fit if both name the case: '{joined}'"
    return found


def advise_on_folders(pattern: Path, matches: Sequence[Match]) -> str:
    """Return a line with a pattern that tells cases of one name in several folders apart.

    It is "" unless `*` or `{a,b}` is for a folder of the pattern, and one of these was tried
    with success: each file has a case, a modality and a label of its own.
    """
    if len({match.path.parent for match in matches}) < 2:
        return ""
    found = find_matches(pattern, LOGITS_SUFFIXES, may_join=True)
    for candidate in _with_more_parts(pattern):
        told_apart = find_matches(candidate, LOGITS_SUFFIXES, may_join=True)
        if {match.path for match in told_apart} != {match.path for match in found}:
            continue
        if len({match[1:] for match in told_apart}) == len(told_apart):
            return (
                f"\n  Two folders have one name: '{candidate}' names a case by both, such as "
                f"{told_apart[0].case}."
            )
    return ""


def _with_more_parts(pattern: Path) -> Iterator[Path]:
    """Yield patterns with `{case}` instead of one of their `*` and `{a,b}`, or of several."""
    root, names = split_pattern(pattern)
    text = "/".join(names)
    unnamed = []
    for found in TOKEN.finditer(text):
        if found[0] == "*" or ("," in found[0] and ":" not in found[0]):
            unnamed.append(found)
    folders = [found for found in unnamed if "/" in text[found.end() :]]
    # File names may have the parts that name the folders, as in sub-1/ses-1/sub-1_ses-1.nii.
    for chosen in [*([found] for found in folders), folders, unnamed]:
        changed = text
        for found in reversed(chosen):
            globs = "" if found[0] == "*" else f":{found[0][1:-1]}"
            changed = f"{changed[: found.start()]}{{case{globs}}}{changed[found.end() :]}"
        yield root / changed
        # If two folders may have the same name, only its own globs make the second one a part.
        first, brace, rest = changed.partition("}")
        yield root / f"{first}{brace}{rest.replace('{case}', '{case:*}', 1)}"


def advise_on_number(pattern: Path, case_id: str) -> str:
    """Return a line on names that differ from those of the images by nnU-Net's number 0000.

    It is "" unless the pattern that the line names has a file of the case.
    """
    numbered = Path(_CASE.sub(lambda found: f"{found[0]}{_NUMBER}", str(pattern)))
    if any(match.case == case_id for match in find_matches(numbered, LOGITS_SUFFIXES)):
        return f"\n  '{numbered}' names the cases without {_NUMBER}."
    return ""


def nearest_files(pattern: Path, case_id: str | None = None) -> str:
    """Return a line with the files that are there instead of those of a pattern, or of one case."""
    if case_id is not None:
        pattern = Path(_CASE.sub(lambda _: case_id, str(pattern)))
    root, names = split_pattern(pattern)
    while not is_folder(root):
        names = (root.name, *names)
        root = root.parent
    folders = [root]
    for depth in range(1, len(names) + 1):
        inside = folders_inside(folders, root, names[:depth], {})
        if not inside:
            break
        folders = inside
    there = [path for folder in folders for path in visible_inside(folder, {})]
    if not there:
        return f"\n  {folders[0]} is empty."

    missing = names[depth - 1] if names else ""  # the first name of the pattern without a file

    def likeness(path: Path) -> float:
        return difflib.SequenceMatcher(None, path.name, missing).ratio()

    near = sorted(there[:_MAX_COMPARED], key=likeness, reverse=True)
    shown = listed([path.relative_to(root) for path in near], _MAX_NEAREST)
    return f"\n  There are {shown} in {root}."
