"""Dataclasses as plain values for JSON, and back by the types of their fields.

A field is stored under its name, or under the `key` of its metadata. A class that has `to_dict` and
`from_dict` converts itself, with `fields_to_plain` and `fields_from_plain` if it likes. JSON has no
NaN, so that null is read as NaN where a number must be, and no numbers as keys.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from crfrefine.base.text import shorten_value

Json = dict[str, Any]  # plain values by their names, such as those of a dataclass's fields

# The types of values in JSON for a type; a whole number may be written as 1.
_KINDS_OF_JSON: dict[Any, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    float: (int, float),
    str: (str,),
    NoneType: (NoneType,),
}


def to_plain(value: Any) -> Any:
    """Return dataclasses and mappings as dictionaries, tuples as lists, paths and times as text."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if dataclasses.is_dataclass(value):
        return fields_to_plain(value)
    if isinstance(value, Mapping):
        return {key: to_plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(entry) for entry in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    return value


def fields_to_plain(record: Any) -> dict[str, Any]:
    """Return the plain values of a dataclass's fields."""
    fields = dataclasses.fields(record)
    return {_key_of(field): to_plain(getattr(record, field.name)) for field in fields}


def from_plain(kind: Any, value: Any) -> Any:
    """Return the value of the type `kind` that `to_plain` was called on.

    Raises:
        TypeError: the value does not fit the type.
        KeyError: a field without a default is missing.
        ValueError: the value has the right type, but is not allowed.
    """
    outer = get_origin(kind)
    inner = get_args(kind)
    if outer in (Union, UnionType):
        # None comes first: as a number, null would be NaN.
        for member in sorted(inner, key=lambda member: member is not NoneType):
            with suppress(TypeError, ValueError, KeyError):
                return from_plain(member, value)
        raise TypeError(f"expected {kind}, got {shorten_value(value)}")
    if outer in (list, tuple):
        _require(isinstance(value, list), kind, value)
        kinds = inner
        if outer is list or inner[-1] is Ellipsis:
            kinds = (inner[0],) * len(value)
        _require(len(kinds) == len(value), kind, value)
        return outer(from_plain(one, entry) for one, entry in zip(kinds, value, strict=True))
    if outer is not None:  # a mapping, whose keys are text or whole numbers
        _require(isinstance(value, dict), kind, value)
        return {inner[0](key): from_plain(inner[1], entry) for key, entry in value.items()}
    if hasattr(kind, "from_dict"):
        return kind.from_dict(value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return kind(**fields_from_plain(kind, value))
    if kind is float and value is None:
        value = math.nan
    if kind is Any or type(value) in _KINDS_OF_JSON.get(kind, ()):
        return value
    _require(kind not in _KINDS_OF_JSON and type(value) is str, kind, value)
    read = datetime.fromisoformat if kind is datetime else kind
    return read(value)  # a time, a path, or a word of an enumeration


def fields_from_plain(kind: type, values: Any) -> dict[str, Any]:
    """Return the arguments of a dataclass from the plain values of its fields.

    Fields that are missing or null have their defaults; others than its own are left out. Raises
    like `from_plain`, with the name of the field.
    """
    _require(isinstance(values, Mapping), kind, values)
    types = _types_of(kind)
    arguments = {}
    for field in dataclasses.fields(kind):
        key = _key_of(field)
        value = values.get(key)
        missing = dataclasses.MISSING
        is_required = field.default is missing and field.default_factory is missing
        if value is None and not is_required:
            continue
        if key not in values:
            raise KeyError(key)
        try:
            arguments[field.name] = from_plain(types[field.name], value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{key}: expected {field.type}, got {shorten_value(value)}") from error
    return arguments


def _require(is_right: bool, kind: Any, value: Any) -> None:
    """Raise TypeError unless a value fits a type."""
    if not is_right:
        raise TypeError(f"expected {kind}, got {shorten_value(value)}")


_types_of = functools.cache(get_type_hints)


def _key_of(field: dataclasses.Field[Any]) -> str:
    """Return the key of a field in JSON."""
    return field.metadata.get("key", field.name)
