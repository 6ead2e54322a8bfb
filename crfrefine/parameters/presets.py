"""The presets, and the parameter file that belongs to a name or a path."""

from __future__ import annotations

import re
from pathlib import Path

from crfrefine.base.text import MAX_OF_A_PATH, shorten
from crfrefine.errors import ConfigError

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
