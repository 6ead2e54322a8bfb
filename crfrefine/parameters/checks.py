"""Checks of single values of a parameter file; errors name the dotted key.

The lengths of lists depend on a case: `spread` checks them.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from crfrefine.base.text import MAX_CHARACTERS, counted, shorten, shorten_value
from crfrefine.errors import ConfigError

MAX_PENALTY = 1e6  # largest weight or penalty: products must stay far inside float32's range
MAX_COUNT = 1_000_000  # largest number of iterations: engines count in 32 bits
# Dotted keys of earlier versions, with the reason why each one is gone.
GONE_KEYS = {
    "postprocess.decision": "each voxel gets its likeliest label",
    "postprocess.num_components": "keep_largest keeps one component",
    "mean_field.precision": "everything is computed in single precision",
    "volume.keep": "the volume term keeps the voxels of each label's largest component",
    "mean_field.damping": "each step is the plain parallel update",
}
_PLURALS = {"label": "labels", "modality": "modalities", "axis": "axes"}
# Types of the values of a number, and a message's words on other types.
_NUMBERS: dict[type, tuple[Any, str]] = {
    int: ((int,), "expected a whole number,"),
    float: ((int, float), "expected a number,"),
}


@dataclass(frozen=True)
class Rule:
    """The values that a key may have: numbers in a range, true or false, or words."""

    kind: type = float  # float, int, bool or str
    low: float = -math.inf  # smallest number
    high: float = math.inf  # largest number
    low_open: bool = False  # whether `low` itself is refused
    words: tuple[str, ...] = ()
    # Words in a list per label: those of its first entry, the background's, which is for all
    # foreground labels together, and those of the other entries. None means `words`.
    words_of_list: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    # "label", "modality" or "axis": a list with a value for each may be given.
    per: str | None = None
    shape: str = "single"  # "pair": two increasing numbers; "matrix": square, with a zero diagonal

    def check(self, value: Any, key: str) -> Any:
        """Return a value in its final type: lists as tuples, and numpy's types as Python's.

        Raises ConfigError for a value that the key may not have.
        """
        if hasattr(value, "tolist"):
            value = value.tolist()
        if self.shape == "matrix":
            return _check_matrix(value, key)
        if self.per is not None and self.is_list(value):
            if not value:
                raise ConfigError(f"{key}: the list is empty")
            of_first, of_others = self.words_of_list or (self.words, self.words)
            first_rule = replace(self, per=None, words=of_first)
            other_rule = replace(self, per=None, words=of_others)
            checked = [first_rule.check(value[0], f"{key}[0]")]
            for index, entry in enumerate(value[1:], start=1):
                checked.append(other_rule.check(entry, f"{key}[{index}]"))
            return tuple(checked)
        if self.shape == "pair":
            if not isinstance(value, list | tuple) or len(value) != 2:
                raise ConfigError(
                    f"{key}: expected two numbers [low, high], got {shorten_value(value)}"
                )
            number = replace(self, per=None, shape="single")
            low = number.check(value[0], f"{key}[0]")
            high = number.check(value[1], f"{key}[1]")
            if low >= high:
                raise ConfigError(
                    f"{key}: the first number must be smaller than the second, "
                    f"got {shorten_value(value)}"
                )
            return low, high
        expected = self._expected_instead(value)
        if expected is not None:
            raise ConfigError(f"{key}: {expected} got {shorten_value(value)}")
        return self.kind(value)

    def is_list(self, value: Any) -> bool:
        """Return whether a value is a list with one value per label, modality or axis."""
        if not isinstance(value, list | tuple):
            return False
        if self.shape == "pair":
            return len(value) > 0 and all(isinstance(entry, list | tuple) for entry in value)
        return True

    def wrong_length(self, length: int, size: int, key: str) -> ConfigError:
        """Return the error for a list that does not have one value per label, modality or axis."""
        found = f"has {counted(length, 'value')}"
        if self.shape == "matrix":
            found = f"is {length} x {length}"
        sizes = f"{size} {self.per}"
        if size != 1 and self.per is not None:
            sizes = f"{size} {_PLURALS[self.per]}"
        return ConfigError(
            f"{key}: it {found}, but the case has {sizes}; "
            f"give one value for all, or one per {self.per}"
        )

    def _expected_instead(self, value: Any) -> str | None:
        """Return the expectation for a message; None if the single value is allowed."""
        if self.kind is bool:
            return None if isinstance(value, bool) else "expected true or false,"
        if self.kind is str:
            return None if value in self.words else f"expected one of {', '.join(self.words)};"

        types, expected = _NUMBERS[self.kind]
        if isinstance(value, bool) or not isinstance(value, types):
            return expected
        if not abs(value) <= sys.float_info.max:  # also NaN
            return "expected a finite number,"
        if self.low < value <= self.high or (value == self.low and not self.low_open):
            return None
        lowest = "greater than" if self.low_open else "at least"
        expected = f"must be {lowest} {self.low:g}"
        if self.high != math.inf:
            highest = str(self.high) if self.kind is int else f"{self.high:g}"
            expected += f" and at most {highest}"
        return f"{expected},"


def _check_matrix(value: Any, key: str) -> tuple[tuple[float, ...], ...]:
    """Return a square matrix with a zero diagonal, (L, L)."""
    rows = value if isinstance(value, list | tuple) else ()
    is_square = all(isinstance(row, list | tuple) and len(row) == len(rows) for row in rows)
    if not rows or not is_square:
        raise ConfigError(
            f"{key}: expected a square matrix [[...], ...], got {shorten_value(value)}"
        )
    penalty = Rule(low=-MAX_PENALTY, high=MAX_PENALTY)
    matrix = []
    for row_number, row in enumerate(rows):
        row_key = f"{key}[{row_number}]"
        matrix.append(tuple(penalty.check(p, f"{row_key}[{n}]") for n, p in enumerate(row)))
    for index, row in enumerate(matrix):
        if row[index] != 0.0:
            raise ConfigError(
                f"{key}[{index}][{index}]: the diagonal must be zero, got {row[index]:g}; "
                "subtracting a row's diagonal entry from the whole row does not change the model"
            )
    return tuple(matrix)


def unknown_key(key: object, known: Collection[str]) -> ConfigError:
    """Return the error for a dotted key that does not exist, with a proposal if one is close.

    `theta_beta` without a table means the last part of bilateral.theta_beta.
    """
    key = str(key)
    if key in GONE_KEYS:
        return ConfigError(f"{key}: this key is gone: {GONE_KEYS[key]}; leave it out")
    table, _, entry = key.partition(".")
    entries = [name.partition(".")[2] for name in known if name.startswith(f"{table}.")]

    proposals = [name for name in known if name.endswith(f".{key}")]
    if not proposals:
        if entries:
            proposals = difflib.get_close_matches(entry[:MAX_CHARACTERS], entries, n=1)
        else:
            proposals = difflib.get_close_matches(key[:MAX_CHARACTERS], list(known), n=1)

    if proposals:
        hint = f"did you mean {' or '.join(map(repr, proposals))}?"
    elif entries:
        hint = f"known: {', '.join(entries)}"
    else:
        tables = dict.fromkeys(name.partition(".")[0] for name in known)
        hint = f"known: {', '.join(tables)}"
    return ConfigError(f"{shorten(key)}: unknown key; {hint}")


def require_names(key: str, names: Any) -> tuple[str, ...]:
    """Return a list of names; raise ConfigError for anything else."""
    are_names = isinstance(names, list | tuple)
    are_names = are_names and all(isinstance(name, str) for name in names)
    # A file cannot hold half a character.
    if not are_names or re.search("[\ud800-\udfff]", "".join(names)):
        raise ConfigError(f"{key}: expected a list of names, got {shorten_value(names)}")
    return tuple(names)
