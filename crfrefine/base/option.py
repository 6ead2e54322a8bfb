"""The description of a command-line option, beside the field of the dataclass that holds its value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crfrefine.base.text import shorten
from crfrefine.errors import InputError

MAX_OF_A_PATH = 4096  # Characters; the limit of Linux.
MAX_PARTS = 1_000_000

INTERPOLATIONS = LINEAR, CUBIC = "linear", "cubic"  # values of --resample


@dataclass(frozen=True)
class Option:
    """A command-line option, or without names an argument; `crfrefine.cli.options` makes it Typer's."""

    names: str  # such as "-i --images"
    help: str
    metavar: str | None = None  # placeholder of the value
    parse: Callable[[str], Any] | None = (
        None  # makes the value from text; raises InputError for a wrong text
    )
    choices: tuple[str, ...] = ()  # the values that it may have, if they are few
    limits: tuple[int | None, int | None] = (None, None)  # smallest and largest whole number
    show_default: bool = False


def parse_path(text: str | Path) -> Path:
    """Return the path of a text; raises like `path_text`."""
    return Path(path_text(text))


def path_text(text: str | Path) -> str:
    """Return the text of a path; raise InputError if it is empty, which Python takes for the current folder, or cannot name a file."""
    text = str(text)
    if not text:
        raise InputError("the value is empty; an unset variable?")
    if "\0" in text or len(text) > MAX_OF_A_PATH:
        raise InputError(
            f"{shorten(text)}: expected a path of at most {MAX_OF_A_PATH} characters, without NUL; found {len(text)}"
        )
    return text
