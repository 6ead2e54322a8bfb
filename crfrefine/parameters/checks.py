"""Checks of single values of a parameter file; errors name the dotted key. `Section.spread` checks lengths."""

from __future__ import annotations

import difflib
import math
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


@dataclass(frozen=True)
class Rule:
    """The values that a key may have: numbers in a range, true or false, or words."""

    kind: type = float  # float, int, bool or str
    low: float = -math.inf  # smallest number
    high: float = math.inf  # largest number
    low_open: bool = False  # whether `low` itself is refused
    words: tuple[str, ...] = ()
    # Words in a list per label: for the background, which means all foreground labels together, and for the others.
    # None means `words`.
    words_of_list: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    per: str | None = (
        None  # "label", "modality" or "axis": a list with a value for each may be given
    )
    shape: str = "single"  # "pair": two increasing numbers; "matrix": square, with a zero diagonal

    def check(self, value: Any, key: str) -> Any:
        """Return a value in its final type, lists as tuples and numpy's types as Python's; raise ConfigError for a wrong one."""
        value = value.tolist() if hasattr(value, "tolist") else value
        if self.shape == "matrix":
            return _penalty_matrix(value, key)
        is_list = isinstance(value, list | tuple)
        has_lists = is_list and value and all(isinstance(entry, list | tuple) for entry in value)
        if self.per and (has_lists if self.shape == "pair" else is_list):
            if not value:
                raise ConfigError(f"{key}: the list is empty")
            first, *others = self.words_of_list or (self.words,)
            rules = [
                replace(self, per=None, words=words) for words in (first, *(others or (first,)))
            ]
            return tuple(
                rules[min(index, 1)].check(entry, f"{key}[{index}]")
                for index, entry in enumerate(value)
            )
        if self.shape == "pair":
            if not is_list or len(value) != 2:
                raise ConfigError(
                    f"{key}: expected two numbers [low, high], got {shorten_value(value)}"
                )
            number = replace(self, shape="single")
            low, high = (
                number.check(entry, f"{key}[{index}]") for index, entry in enumerate(value)
            )
            if low >= high:
                raise ConfigError(
                    f"{key}: the first number must be smaller than the second, got {shorten_value(value)}"
                )
            return low, high
        if self.kind is bool:
            if isinstance(value, bool):
                return value
            expected = "expected true or false,"
        elif self.kind is str:
            if isinstance(value, str) and value in self.words:
                return value
            expected = f"expected one of {', '.join(self.words)};"
        elif isinstance(value, bool) or not isinstance(
            value, int if self.kind is int else int | float
        ):
            expected = f"expected a {'whole ' if self.kind is int else ''}number,"
        elif not abs(value) <= sys.float_info.max:  # also NaN
            expected = "expected a finite number,"
        elif not self.low <= value <= self.high or (self.low_open and value == self.low):
            upper = (
                ""
                if self.high == math.inf
                else f" and at most {self.high if self.kind is int else format(self.high, 'g')}"
            )
            expected = (
                f"must be {'greater than' if self.low_open else 'at least'} {self.low:g}{upper},"
            )
        else:
            return self.kind(value)
        raise ConfigError(f"{key}: {expected} got {shorten_value(value)}")


def _penalty_matrix(value: Any, key: str) -> tuple[tuple[float, ...], ...]:
    rows = value if isinstance(value, list | tuple) else ()
    if not rows or not all(isinstance(row, list | tuple) and len(row) == len(rows) for row in rows):
        raise ConfigError(
            f"{key}: expected a square matrix [[...], ...], got {shorten_value(value)}"
        )
    penalty = Rule(low=-MAX_PENALTY, high=MAX_PENALTY)
    matrix = tuple(
        tuple(penalty.check(entry, f"{key}[{i}][{j}]") for j, entry in enumerate(row))
        for i, row in enumerate(rows)
    )
    for index, row in enumerate(matrix):
        if row[index] != 0.0:
            raise ConfigError(
                f"{key}[{index}][{index}]: the diagonal must be zero, got {row[index]:g}; "
                "subtracting a row's diagonal entry from the whole row does not change the model"
            )
    return matrix


def wrong_length(length: int, key: str, what: str, size: int) -> ConfigError:
    """Return the error for a list that does not have one value per label, modality or axis of the case."""
    has = f"is {length} x {length}" if key.endswith("matrix") else f"has {counted(length, 'value')}"
    sizes = (
        what if size == 1 else {"label": "labels", "modality": "modalities", "axis": "axes"}[what]
    )
    return ConfigError(
        f"{key}: it {has}, but the case has {size} {sizes}; give one value for all, or one per {what}"
    )


def unknown_key(key: object, known: Collection[str]) -> ConfigError:
    """Return the error for a dotted key that does not exist: `theta_beta` is the last part of bilateral.theta_beta."""
    key = str(key)
    if key in GONE_KEYS:
        return ConfigError(f"{key}: this key is gone: {GONE_KEYS[key]}; leave it out")
    table, _, entry = key.partition(".")
    beside = [name.partition(".")[2] for name in known if name.startswith(f"{table}.")]
    close = [name for name in known if name.endswith(f".{key}")]
    close = close or difflib.get_close_matches(
        (entry if beside else key)[:MAX_CHARACTERS], beside or list(known), n=1
    )
    tables = dict.fromkeys(name.partition(".")[0] for name in known)
    hint = (
        f"did you mean {' or '.join(map(repr, close))}?"
        if close
        else f"known: {', '.join(beside or tables)}"
    )
    return ConfigError(f"{shorten(key)}: unknown key; {hint}")
