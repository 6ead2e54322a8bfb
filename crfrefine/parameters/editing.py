"""Sections of parameters from tables and back, and changed copies of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from crfrefine.errors import ConfigError
from crfrefine.parameters import checks
from crfrefine.parameters.sections import SECTIONS, BilateralParameters, Section

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


def _section_from(kind: type[_SectionType], table: Any, prefix: str) -> _SectionType:
    """Build a section from a mapping, naming keys in errors by `prefix`."""
    if isinstance(table, kind):
        return table
    if not isinstance(table, Mapping):
        raise ConfigError(f"{prefix}: expected a table of keys, got {checks.describe(table)}")
    return edited(kind, table, prefix)


def sections_from(name: str, value: Any) -> Any:
    """Return the section of a name from a table, or the appearance kernels from a table or several; errors name the key."""
    kind = SECTIONS[name]
    if name != "bilateral" or isinstance(value, Mapping | BilateralParameters):
        section = _section_from(kind, value, name)
        return (section,) if name == "bilateral" else section
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(
            f"bilateral: expected a table or several, got {checks.describe(value)}; to switch the term off, set its weight to 0"
        )
    return tuple(_section_from(kind, entry, f"bilateral.{index}") for index, entry in enumerate(value))


def edited(base: _SectionType | type[_SectionType], values: Mapping[str, Any], prefix: str) -> _SectionType:
    """The section `base` (for a class, its defaults) with some values changed; errors name keys by `prefix`."""
    fields = {entry.name: entry for entry in dataclasses.fields(base)}
    checks.check_known(values, fields, f"{prefix}.")
    checked = {name: fields[name].metadata["check"](value, f"{prefix}.{name}") for name, value in values.items()}
    return base(**checked) if isinstance(base, type) else dataclasses.replace(base, **checked)


def plain_section(section: Section) -> dict[str, Any]:
    """Return the section's keys with plain Python values; unset keys are left out."""

    def plain(value: Any) -> Any:
        return [plain(entry) for entry in value] if isinstance(value, tuple) else value

    pairs = ((entry.name, getattr(section, entry.name)) for entry in dataclasses.fields(section))
    return {name: plain(value) for name, value in pairs if value is not None}
