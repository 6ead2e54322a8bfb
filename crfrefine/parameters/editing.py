"""Sections of parameters from tables, and changed copies of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from crfrefine.errors import ConfigError
from crfrefine.parameters import checks
from crfrefine.parameters.sections import SECTIONS, BilateralParameters, Section, checked

_SectionType = TypeVar("_SectionType", bound=Section)


def suggested_key(key: str) -> str:
    """Suggest a dotted key: `theta_beta` is the last part of bilateral.theta_beta, `bilatral.weight` a misspelling."""
    known = [f"{name}.{entry.name}" for name, kind in SECTIONS.items() for entry in dataclasses.fields(kind)]
    section, _, entry = key.partition(".")
    if key and not entry:
        same = [name for name in known if name.partition(".")[2] == key]
        if same:
            return f"did you mean {' or '.join(repr(name) for name in same)}?"
    if section in SECTIONS:
        known = [name for name in known if name.startswith(f"{section}.")]
    return checks.suggestion(key, known)


def sections_from(name: str, value: Any) -> Any:
    """Return the section of a name from a table, or the appearance kernels from a table or several; errors name the key."""
    kind = SECTIONS[name]
    are_several = name == "bilateral" and not isinstance(value, Mapping | BilateralParameters)
    if are_several and (not isinstance(value, list | tuple) or not value):
        raise ConfigError(
            f"bilateral: expected a table or several, got {checks.describe(value)}; to switch the term off, set its weight to 0"
        )
    sections = []
    for index, table in enumerate(value if are_several else (value,)):
        prefix = f"bilateral.{index}" if are_several else name
        if not isinstance(table, Mapping | kind):
            raise ConfigError(f"{prefix}: expected a table of keys, got {checks.describe(table)}")
        sections.append(edited(kind, table, prefix) if isinstance(table, Mapping) else table)
    return tuple(sections) if name == "bilateral" else sections[0]


def edited(base: _SectionType | type[_SectionType], values: Mapping[str, Any], prefix: str) -> _SectionType:
    """The section `base` (for a class, its defaults) with some values changed; errors name keys by `prefix`."""
    fields = {entry.name: entry for entry in dataclasses.fields(base)}
    checks.check_known(values, fields, f"{prefix}.")
    changes = {name: checked(fields[name], value, f"{prefix}.{name}") for name, value in values.items()}
    return base(**changes) if isinstance(base, type) else dataclasses.replace(base, **changes)
