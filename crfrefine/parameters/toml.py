"""Text of a parameter file, TOML with a comment for each key, and `KEY=VALUE` of `--set`."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Sequence
from typing import Any

from crfrefine.base.text import MAX_OF_A_REASON, shorten, shorten_value
from crfrefine.errors import ConfigError


def toml_value(value: object) -> str:
    """TOML text of a string, number, or nested sequence of these; a matrix takes a line for each row."""
    if isinstance(value, Sequence) and value and isinstance(value[0], list | tuple):
        return "[\n" + "".join(f"  {toml_value(row)},\n" for row in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def toml_entry(name: str, value: object, comment: str) -> str:
    """One `name = value  # comment` line; a key without a value is shown commented out, with its meaning."""
    text = f"# {name}: not set" if value is None else f"{name} = {toml_value(value)}"
    return f"# {comment}\n{text}\n" if "\n" in text else f"{text:<31} # {comment}\n"


def toml_problem(error: ValueError | RecursionError) -> str:
    """Return the fault of a text that `tomllib` could not read, for messages."""
    if isinstance(error, RecursionError):
        return "lists or tables are nested too deeply"
    # Python reads integers of at most 4300 digits; its message about that is not for users.
    is_known = isinstance(error, tomllib.TOMLDecodeError)
    return shorten(error, MAX_OF_A_REASON) if is_known else "a number with too many digits, or an invalid date"


_BARE_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*")


def parse_override(text: str) -> tuple[str, Any]:
    """Split `KEY=VALUE` into a dotted key and a value for `CrfParameters.replace`.

    Args:
        text: the value in TOML's syntax; a single word needs no quotes.

    Raises:
        ConfigError: there is no `=`, or the value cannot be read.
    """
    key, sign, raw = text.partition("=")
    key, raw = key.strip(), raw.strip()
    if not sign or not key or not raw:
        raise ConfigError(f"{shorten_value(text)}: expected KEY=VALUE, e.g. bilateral.theta_alpha=6")
    try:
        parsed = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError) as error:
        if _BARE_WORD.fullmatch(raw):
            return key, raw
        raise ConfigError(
            f"{shorten(key)}: cannot read the value {shorten_value(raw)}: {toml_problem(error)}; "
            'numbers, [lists], and in lists words in "quotes"'
        ) from error
    if set(parsed) != {"value"}:
        raise ConfigError(f"{shorten(key)}: expected one value, got {shorten_value(raw)}")
    return key, parsed["value"]
