"""Frozen dataclasses as the plain values of JSON, and back by the types of their fields.

A field is stored under its name, or under the `key` of its metadata. A class that has `to_dict` and `from_dict` converts itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def to_plain(value: Any) -> Any:
    """Return dataclasses and mappings as dictionaries, and tuples as lists."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if dataclasses.is_dataclass(value):
        return {
            entry.metadata.get("key", entry.name): to_plain(getattr(value, entry.name))
            for entry in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {key: to_plain(entry) for key, entry in value.items()}
    return [to_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def from_plain(kind: Any, value: Any) -> Any:
    """Return the dataclass `kind` that `to_plain` was called on; errors of several kinds for any other value."""
    outer, inner = get_origin(kind), get_args(kind)
    if outer in (Union, UnionType):
        kinds = [each for each in inner if each is not NoneType]
        # Where there are several, the class that has the field checks it.
        return value if len(kinds) > 1 or value is None else from_plain(kinds[0], value)
    if outer in (list, tuple):
        return outer(from_plain(inner[0], entry) for entry in value)
    if outer is not None:
        return {key: from_plain(inner[1], entry) for key, entry in value.items()}
    if kind is float:
        return math.nan if value is None else float(value)
    if hasattr(kind, "from_dict"):
        return kind.from_dict(value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints, entries = get_type_hints(kind), dataclasses.fields(kind)
        return kind(
            **{
                entry.name: from_plain(
                    hints[entry.name], value[entry.metadata.get("key", entry.name)]
                )
                for entry in entries
            }
        )
    return value
