"""`KEY=VALUE`, as `--set` takes it."""

from __future__ import annotations

import re
import tomllib
from typing import Any

from crfrefine.base.text import shorten
from crfrefine.errors import ConfigError
from crfrefine.parameters import checks
from crfrefine.parameters.toml import toml_problem

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
        raise ConfigError(f"{checks.describe(text)}: expected KEY=VALUE, e.g. bilateral.theta_alpha=6")
    try:
        parsed = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError) as error:
        if _BARE_WORD.fullmatch(raw):
            return key, raw
        raise ConfigError(
            f"{shorten(key)}: cannot read the value {checks.describe(raw)}: {toml_problem(error)}; "
            'numbers, [lists], and in lists words in "quotes"'
        ) from error
    if set(parsed) != {"value"}:
        raise ConfigError(f"{shorten(key)}: expected one value, got {checks.describe(raw)}")
    return key, parsed["value"]
