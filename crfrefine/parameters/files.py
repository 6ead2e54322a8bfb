"""Files of parameters: presets, the file that a name or a path means, values as TOML, and keys."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crfrefine.base.text import MAX_OF_A_PATH, MAX_OF_A_REASON, listed, shorten, shorten_value
from crfrefine.errors import ConfigError
from crfrefine.parameters.checks import unknown_key
from crfrefine.parameters.sections import KEYS, Section

_PACKAGE = Path(__file__).resolve().parents[1]
# The folder of the presets: inside the installed package, or beside it in a source tree.
CONFIGS = _PACKAGE / "configs"
if not CONFIGS.is_dir():
    CONFIGS = _PACKAGE.parent / "configs"


def list_presets() -> list[str]:
    """Names of the presets, `default` first, the others in alphabetical order."""
    names = [path.stem for path in CONFIGS.glob("*.toml")]
    return sorted(names, key=lambda name: (name != "default", name))


def purpose_of(preset: str) -> str:
    """Return the purpose of a preset in a few words: the start of its first comment."""
    first_line, _, _ = (CONFIGS / f"{preset}.toml").read_text(encoding="utf-8").partition("\n")
    # It ends before a parenthesis, or at a colon or period, after twelve characters or more.
    return re.split(r"(?<=.{12})(?: \(|[:.](?: |$))", first_line.removeprefix("# "))[0]


def find_config(name_or_path: str | Path) -> Path:
    """Return the file of a preset's name or of a path; raises ConfigError if it does not exist."""
    path = Path(name_or_path)
    preset = CONFIGS / f"{path.name}.toml"
    try:
        if name_or_path == path.name and preset.is_file():
            return preset
        if path.is_file():
            return path
        problem = "is not a regular file" if path.exists() else "no such file or preset"
    except (OSError, ValueError) as error:  # A name that is too long, or holds the character NUL.
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{shorten(name_or_path)}: cannot be read as a parameter file: {reason}"
        ) from error
    raise ConfigError(
        f"{shorten(name_or_path, MAX_OF_A_PATH)}: {problem}; presets: {', '.join(list_presets())}"
    )


# ---- Tables as sections


def section_of(kind: type[Section], table: Any, prefix: str) -> Section:
    """Return a section from its table; raises ConfigError for a wrong key or value.

    Errors name keys by `prefix`, which has a kernel's number if there are several.
    """
    if isinstance(table, kind):
        return table
    if not isinstance(table, Mapping):
        raise ConfigError(f"{prefix}: expected a table of keys, got {shorten_value(table)}")
    for key in table:
        if f"{kind.section}.{key}" not in KEYS:
            raise unknown_key(f"{prefix}.{key}", KEYS)
    try:
        return kind(**table)
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"{kind.section}.", f"{prefix}.", 1)) from None


# ---- Values as TOML

_BARE_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*")


def toml_entry(name: str, value: object, comment: str) -> str:
    """Return a key, its value and a comment as TOML; without a value, as a comment."""
    entry = f"{name} = {toml_value(value)}"
    if value is None:
        entry = f"# {name}: not set"
    if "\n" in entry:
        return f"# {comment}\n{entry}\n"
    return f"{entry:<31} # {comment}\n"


def toml_value(value: object) -> str:
    """Return a string, number or nested sequence as TOML, a matrix with a line for each row."""
    if isinstance(value, Sequence) and value and isinstance(value[0], list | tuple):
        return toml_lines(value)
    # TOML forbids the one control character that JSON allows.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def toml_lines(values: Sequence[object]) -> str:
    """Return a sequence as TOML, with a line for each value."""
    text = "[\n"
    for value in values:
        text += f"  {toml_value(value)},\n"
    return text + "]"


def parse_toml(text: str) -> dict[str, Any]:
    """Return the table of a text in TOML; raise ConfigError with its fault."""
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(shorten(error, MAX_OF_A_REASON)) from error
    except (ValueError, RecursionError) as error:  # Python's messages are not fit for users.
        raise ConfigError(
            "too many digits in a number, an invalid date, or too many nested lists"
        ) from error


def parse_override(text: str) -> tuple[str, Any]:
    """Split `KEY=VALUE` into a dotted key and a value for `CrfParameters.replace`.

    The value is in TOML's syntax; a single word needs no quotes. Raises ConfigError if the text
    cannot be read.
    """
    key, _, raw = map(str.strip, text.partition("="))
    if not key or not raw:
        raise ConfigError(
            f"{shorten_value(text)}: expected KEY=VALUE, e.g. bilateral.theta_alpha=6"
        )
    try:
        parsed = parse_toml(f"value = {raw}")
    except ConfigError as error:
        if _BARE_WORD.fullmatch(raw):
            return key, raw
        raise ConfigError(
            f"{shorten(key)}: cannot read the value {shorten_value(raw)}: {error}; "
            'numbers, [lists], and in lists words in "quotes"'
        ) from error
    if set(parsed) != {"value"}:
        raise ConfigError(f"{shorten(key)}: expected one value, got {shorten_value(raw)}")
    return key, parsed["value"]


# ---- Dotted keys

_DOTTED_KEY = re.compile(r"(\w+)\.(?:([0-9]+)\.)?(\w+)")


def kernel_prefixes(num_kernels: int) -> list[str]:
    """Return the prefix of each kernel's keys; it has a number if there are several kernels."""
    if num_kernels == 1:
        return ["bilateral"]
    return [f"bilateral.{number}" for number in range(num_kernels)]


def set_entry(table: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a dotted key in a table as of `to_dict`; raises ConfigError if unknown."""
    match = _DOTTED_KEY.fullmatch(key)
    if match is None:
        raise unknown_key(key, KEYS)
    name, number, entry = match.groups()
    if f"{name}.{entry}" not in KEYS or (number is not None and name != "bilateral"):
        raise unknown_key(key, KEYS)
    if name != "bilateral":
        table[name][entry] = value
        return

    kernels = table[name]
    if number is None and len(kernels) > 1:
        keys = [f"{prefix}.{entry}" for prefix in kernel_prefixes(len(kernels))]
        raise ConfigError(
            f"{shorten(key)}: there are {len(kernels)} kernels; say which: {listed(keys)}"
        )
    number = number or "0"
    if len(number) > 9 or int(number) >= len(kernels):
        raise ConfigError(
            f"{shorten(key)}: expected the number of a kernel from 0 to {len(kernels) - 1}"
        )
    kernels[int(number)][entry] = value
