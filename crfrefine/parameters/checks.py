"""Checks of single configuration values: each takes a value and its dotted key, returns the value in its final type, or raises ConfigError.

Lengths that depend on the case (numbers of labels, modalities, axes) are checked by `CrfParameters.resolve`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from crfrefine.base.text import MAX_CHARACTERS, shorten, shorten_value
from crfrefine.errors import ConfigError

Check = Callable[[Any, str], Any]

MAX_PENALTY = 1e6
"""Largest weight or penalty, in the unit of logits: products must stay far inside float32's range, or the marginals would be noise."""


MAX_COUNT = 1_000_000
"""Largest number of iterations: engines count in 32 bits and store values per iteration, and no model needs as many."""

describe = shorten_value


def plain(value: Any) -> Any:
    """Turn numpy scalars and arrays into Python numbers and lists, without importing numpy."""
    return value.tolist() if hasattr(value, "tolist") else value


def suggestion(name: str, known: Collection[str]) -> str:
    """Suggest a known name, or list them all."""
    close = difflib.get_close_matches(name[:MAX_CHARACTERS], list(known), n=1)
    return f"did you mean '{close[0]}'?" if close else "known: " + ", ".join(known)


def check_length(value: Sequence[object], key: str, what: str, size: int) -> None:
    """Refuse a list that does not have one value per label, modality or axis of the case."""
    if len(value) != size:
        plural = {"label": "labels", "modality": "modalities", "axis": "axes"}[what]
        count = f"1 {what}" if size == 1 else f"{size} {plural}"
        given = "1 value" if len(value) == 1 else f"{len(value)} values"
        one = "word" if isinstance(value[0], str) else "number"
        raise ConfigError(f"{key}: it has {given}, but the case has {count}; give one {one} for all, or one per {what}")


GONE_KEYS = {
    "postprocess.decision": "this key is gone: each voxel gets its likeliest label; leave it out",
    "postprocess.num_components": "this key is gone: keep_largest keeps one component; leave it out",
    "mean_field.precision": "this key is gone: everything is computed in single precision; leave it out",
    "volume.keep": "this key is gone: the volume term keeps the voxels of each label's largest component; leave it out",
    "mean_field.damping": "this key is gone: each step is the plain parallel update; leave it out",
}
"""Dotted keys of earlier versions, and their successors."""


def check_known(table: Mapping[str, object], known: Collection[str], prefix: str) -> None:
    """Refuse unknown keys: a misspelled key must not be ignored."""
    for name in table:
        if name not in known:
            refuse_key(f"{prefix}{name}", suggestion(str(name), known))


def refuse_gone(table: Mapping[str, object]) -> None:
    """Refuse a file of an earlier version that has several keys that are gone: all of them are named at once."""
    names = [key.split(".") for key in GONE_KEYS]
    found = [f"{section}.{key}" for section, key in names if isinstance(own := table.get(section), Mapping) and key in own]
    if len(found) > 1:
        lines = (f"\n  {key}: {GONE_KEYS[key]}" for key in found)
        raise ConfigError(f"from an earlier version of crfrefine: leave out these keys{''.join(lines)}")


def refuse_key(key: str, hint: str) -> NoReturn:
    """Raise ConfigError for a dotted key that does not exist; the hint is for a key that never did."""
    raise ConfigError(f"{shorten(key)}: {GONE_KEYS.get(key) or f'unknown key; {hint}'}")


def boolean(value: Any, key: str) -> bool:
    """Return true or false."""
    value = plain(value)
    if not isinstance(value, bool):
        raise ConfigError(f"{key}: expected true or false, got {describe(value)}")
    return value


@dataclass(frozen=True)
class Range:
    """A finite number between two bounds."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __call__(self, value: Any, key: str) -> float:
        """Return the number as float."""
        value = plain(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{key}: expected a number, got {describe(value)}")
        try:
            result = float(value)
        except OverflowError:
            result = math.inf
        if not math.isfinite(result):
            raise ConfigError(f"{key}: expected a finite number, got {describe(value)}")
        low, high = self.low, self.high
        if result < low or result > high or (self.low_open and result == low) or (self.high_open and result == high):
            left = f"greater than {low:g}" if self.low_open else f"at least {low:g}"
            right = "" if high == math.inf else f" and less than {high:g}" if self.high_open else f" and at most {high:g}"
            raise ConfigError(f"{key}: must be {left}{right}, got {describe(value)}")
        return result


penalty = Range(-MAX_PENALTY, MAX_PENALTY)
"""A weight or an entry of the compatibility, in the unit of logits."""


def count(value: Any, key: str) -> int:
    """Return a whole number from 1 to MAX_COUNT."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{key}: expected a whole number, got {describe(value)}")
    if not 1 <= value <= MAX_COUNT:
        raise ConfigError(f"{key}: must be {'at least 1' if value < 1 else f'at most {MAX_COUNT}'}, got {describe(value)}")
    return value


@dataclass(frozen=True)
class Choice:
    """One of a few words."""

    names: tuple[str, ...]

    def __call__(self, value: Any, key: str) -> str:
        """Return the word."""
        if isinstance(value, str) and value in self.names:
            return value
        advice = f"; {suggestion(value, self.names)}" if isinstance(value, str) else ""
        raise ConfigError(f"{key}: expected one of {', '.join(self.names)}; got {describe(value)}{advice}")


@dataclass(frozen=True)
class OneOrMany:
    """One value, or a list with one for each label, modality or axis.

    For labels, the first entry (the background's) may mean all foreground labels together; then each entry is checked by itself.
    """

    one: Check
    first: Check | None = None
    others: Check | None = None

    def __call__(self, value: Any, key: str) -> Any:
        """Return the value, or the list as a tuple."""
        value = plain(value)
        if not isinstance(value, list | tuple):
            return self.one(value, key)
        if not value:
            raise ConfigError(f"{key}: the list is empty")
        return tuple(((self.others if index else self.first) or self.one)(entry, f"{key}[{index}]") for index, entry in enumerate(value))


@dataclass(frozen=True)
class Interval:
    """Two increasing numbers [a, b] between two bounds, or a list of such pairs, one for each modality."""

    low: float = -math.inf
    high: float = math.inf

    def __call__(self, value: Any, key: str) -> Any:
        """Return the pair or the pairs as tuples."""
        value = plain(value)
        if isinstance(value, list | tuple) and value and all(isinstance(entry, list | tuple) for entry in value):
            return tuple(self._pair(entry, f"{key}[{index}]") for index, entry in enumerate(value))
        return self._pair(value, key)

    def _pair(self, value: Any, key: str) -> tuple[float, float]:
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise ConfigError(f"{key}: expected two numbers [low, high], got {describe(value)}")
        number = Range(self.low, self.high)
        first, second = (number(entry, f"{key}[{index}]") for index, entry in enumerate(value))
        if first >= second:
            raise ConfigError(f"{key}: the first number must be smaller than the second, got {describe(value)}")
        return first, second


def penalty_matrix(value: Any, key: str) -> tuple[tuple[float, ...], ...]:
    """A square matrix of finite numbers with a zero diagonal; it need not be symmetric."""
    value = plain(value)
    if not isinstance(value, list | tuple) or not value or not all(isinstance(row, list | tuple) for row in value):
        raise ConfigError(f"{key}: expected a square matrix [[...], ...], got {describe(value)}")
    size = len(value)
    for index, row in enumerate(value):
        if len(row) != size:
            raise ConfigError(f"{key}: expected a square matrix: it has {size} rows, but row {index} has {len(row)} numbers")
    matrix = tuple(tuple(penalty(entry, f"{key}[{i}][{j}]") for j, entry in enumerate(row)) for i, row in enumerate(value))
    for index in range(size):
        if matrix[index][index] != 0.0:
            raise ConfigError(
                f"{key}[{index}][{index}]: the diagonal must be zero, got {matrix[index][index]:g}; "
                "subtracting a row's diagonal entry from the whole row does not change the model"
            )
    return matrix
