"""Conversion of frozen dataclasses to plain values for JSON, and back by their fields' types.

A field is stored under its name, or under the `key` of its metadata. A class that has `to_dict` and
`from_dict` converts itself.
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
        fields = dataclasses.fields(value)
        return {_key_of(field): to_plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {key: to_plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(entry) for entry in value]
    return value


def from_plain(kind: Any, value: Any) -> Any:
    """Return the value of the type `kind` that `to_plain` was called on.

    Raises errors of several kinds for any other value.
    """
    if get_origin(kind) is not None:
        return _from_plain_generic(kind, value)
    if kind is float:
        return math.nan if value is None else float(value)
    if hasattr(kind, "from_dict"):
        return kind.from_dict(value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        types = get_type_hints(kind)
        arguments = {}
        for field in dataclasses.fields(kind):
            arguments[field.name] = from_plain(types[field.name], value[_key_of(field)])
        return kind(**arguments)
    return value


def _from_plain_generic(kind: Any, value: Any) -> Any:
    """Return that of a type with arguments: a union, list[X], tuple[X, ...] or dict[str, X]."""
    outer = get_origin(kind)
    arguments = get_args(kind)
    if outer in (Union, UnionType):
        members = [member for member in arguments if member is not NoneType]
        # A value that may have several types is checked by the class that has the field.
        if len(members) > 1 or value is None:
            return value
        return from_plain(members[0], value)
    if outer in (list, tuple):
        return outer(from_plain(arguments[0], entry) for entry in value)
    return {key: from_plain(arguments[1], entry) for key, entry in value.items()}


def _key_of(field: dataclasses.Field[Any]) -> str:
    """Return the key of a field in JSON."""
    return field.metadata.get("key", field.name)
