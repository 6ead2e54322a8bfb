"""The descriptor of a command for Boutiques (schema 0.5), as a dictionary for JSON."""

from __future__ import annotations

from typing import Any

import crfrefine
from crfrefine.apps.tools.descriptors.command import Command, Option

_TYPES = {"flag": "Flag", "integer": "Number", "number": "Number", "text": "String", "input": "File", "output": "String"}
_STATUS = {1: "a case failed, or an input cannot be used; standard error says which and why", 2: "wrong usage"}


def boutiques_descriptor(command: Command) -> dict[str, Any]:
    """Return the descriptor of a command.

    Paths to write are strings, as Boutiques expects files of inputs to exist; folders to read are of its type File, too.

    Source: Glatard et al., Boutiques: a flexible framework to integrate command-line applications in computing platforms. GigaScience 7
    (5), 2018; its JSON schema 0.5.
    """
    written = [option for option in command.options if option.kind == "output"]
    return {
        "name": f"crfrefine {command.name}",
        "description": command.help,
        "tool-version": crfrefine.__version__,
        "schema-version": "0.5",
        "command-line": " ".join(["crfrefine", command.name, *map(_key, command.options)]),
        "inputs": [_input(option) for option in command.options],
        "output-files": [
            {
                "id": f"written_{option.name}",
                "name": f"written to {option.flag or option.name}",
                "description": option.help,
                "path-template": _key(option),
                "optional": not option.is_required,
            }
            for option in written
        ],
        "error-codes": [{"code": code, "description": text} for code, text in _STATUS.items()],
        "tags": {"domain": ["neuroinformatics", "medical imaging"], "task": ["segmentation"]},
    }


def _key(option: Option) -> str:
    return f"[{option.name.upper()}]"


def _input(option: Option) -> dict[str, Any]:
    shown = {} if option.default is None else {"description": f"{option.help} Default: {option.default}."}
    found: dict[str, Any] = {
        "id": option.name,
        "name": option.flag or option.name,
        "description": option.help,
        **shown,
        "type": _TYPES[option.kind],
        "value-key": _key(option),
        "optional": not option.is_required,
    }
    if option.flag:
        found["command-line-flag"] = option.flag
    if option.is_repeatable:
        # The flag before every value.
        found |= {"list": True, "list-separator": f" {option.flag} " if option.flag else " "}
    if option.kind == "integer":
        found["integer"] = True
    if option.choices:
        found["value-choices"] = list(option.choices)
    for name, limit in (("minimum", option.minimum), ("maximum", option.maximum)):
        if limit is not None:
            found[name] = limit
    return found
