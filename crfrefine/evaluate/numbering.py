"""Labels whose numbers differ between a method and the reference, such as 255 and 1.

Each Dice is 0 then, although the masks may agree.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence

from crfrefine.base.option import REFERENCE
from crfrefine.base.text import listed
from crfrefine.evaluate.measuring import CaseResult

_COVERED = 0.5  # A label is rather another one that has more than this share of its voxels,
_SELDOM = 0.1  # if less than this share of the voxels of both has the right number.
_MAX_NAMED = 8

_SPACE = re.compile(r"[\s_-]+")

Pairs = Mapping[tuple[int, int], int]


def notes_on_numbers(results: Sequence[CaseResult], own: str) -> list[str]:
    """Return a note for each method whose labels seem to have other numbers, over all cases.

    `own` is the name of the judged method, which `--map` does not name.
    """
    pairs_of: dict[str, Counter[tuple[int, int]]] = {}
    from_channels: set[str] = set()
    for result in results:
        from_channels |= result.from_channels
        for method, pairs in result.pairs.items():
            pairs_of.setdefault(method, Counter()).update(pairs)
    notes = _notes_on_names(results)
    for method, pairs in pairs_of.items():
        numbers = other_numbers(pairs)
        if numbers and method in from_channels:
            notes.append(_note(method, pairs, numbers, _options_of_reference(pairs, numbers)))
        elif numbers:
            source = "" if method == own else f"{method}:"
            notes.append(_note(method, pairs, numbers, _options_of_method(pairs, numbers, source)))
    return notes


def _notes_on_names(results: Sequence[CaseResult]) -> list[str]:
    """Return a note for each method whose label maps give a label another name than the reference.

    The first case that shows it counts.
    """
    notes: dict[str, str] = {}
    for result in results:
        for method, names in result.names.items():
            differing = []
            for label, name in result.names_in_reference.items():
                other = names.get(label, name)
                if _SPACE.sub(" ", other).casefold() != _SPACE.sub(" ", name).casefold():
                    differing.append(f"label {label} is {name!r} there, {other!r} here")
            if differing and method not in notes:
                shown = listed(differing, _MAX_NAMED)
                notes[method] = f"{method} names labels otherwise than the reference: {shown}"
    return [*notes.values()]


def other_numbers(pairs: Pairs) -> dict[int, int]:
    """Return the label of the reference that each label of a method rather is, if it is another.

    Args:
        pairs: the voxels of each pair of a label of the method and one of the reference.

    Returns:
        By a label of the method, that of the reference.
    """
    of_method: Counter[int] = Counter()
    of_reference: Counter[int] = Counter()
    for (label, wanted), count in pairs.items():
        of_method[label] += count
        of_reference[wanted] += count

    covers: dict[int, list[int]] = {}
    for (label, wanted), count in pairs.items():
        if 0 in (label, wanted) or count <= _COVERED * of_reference[wanted]:
            continue
        is_right = pairs.get((label, label), 0) >= _SELDOM * of_method[label]
        is_found = pairs.get((wanted, wanted), 0) >= _SELDOM * of_reference[wanted]
        if not is_right and not is_found:
            covers.setdefault(label, []).append(wanted)
    # A label that covers several ones is their union.
    return {label: wanted[0] for label, wanted in sorted(covers.items()) if len(wanted) == 1}


def _options_of_method(pairs: Pairs, numbers: Mapping[int, int], source: str) -> list[str]:
    """Return the options that give a method the numbers of the reference."""
    mapping = dict(numbers)
    predicted = {label for label, _ in pairs}
    for wanted in numbers.values():
        if wanted in predicted:  # It would be one with the label that gets its number.
            mapping.setdefault(wanted, 0)
    return [f"--map {shlex.quote(f'{source}{old}={new}')}" for old, new in mapping.items()]


def _options_of_reference(pairs: Pairs, numbers: Mapping[int, int]) -> list[str]:
    """Return the options that give the reference the numbers of a method's channels."""
    mapping = {wanted: label for label, wanted in numbers.items()}
    in_reference = {wanted for _, wanted in pairs}
    free = {old: new for old, new in mapping.items() if new in mapping or new not in in_reference}
    return [f"--map {REFERENCE}:{old}={new}" for old, new in free.items()]


def _note(method: str, pairs: Pairs, numbers: Mapping[int, int], options: list[str]) -> str:
    """Return the note on the labels of a method, with the options that give them their numbers."""
    covered = []
    for label, wanted in numbers.items():
        size = sum(count for (_, other), count in pairs.items() if other == wanted)
        share = pairs[label, wanted] / size
        covered.append(f"label {label} is at {share:.0%} of the voxels of label {wanted}")
    note = (
        f"{method} seems to have other numbers than the reference, whose labels it hardly ever "
        f"finds: {listed(covered, _MAX_NAMED)}"
    )
    if options:
        note += f"; if these are the same structures, add {' '.join(options)}"
    return note
