"""The description of a command-line option, beside the dataclass field that holds its value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crfrefine.base.text import shorten
from crfrefine.errors import InputError

MAX_OF_A_PATH = 4096  # characters; the limit of Linux
MAX_PARTS = 1_000_000

INTERPOLATIONS = LINEAR, CUBIC = "linear", "cubic"  # values of --resample
# The help of --add-background, for the commands that read a network's output.
ADD_BACKGROUND = (
    "The network's output has no channel for the background: take its probabilities for labels "
    "1, 2 ..., and 1 minus their sum for label 0. One channel needs no option."
)


@dataclass(frozen=True)
class Option:
    """A command's option, or its argument if it has no names; `cli.options` gives it to Typer."""

    names: str  # such as "-i --images"
    help: str
    metavar: str | None = None  # placeholder of the value
    parse: Callable[[str], Any] | None = None  # converts the text; raises InputError
    choices: tuple[str, ...] = ()  # the values that it may have, if they are few
    limits: tuple[int | None, int | None] = (None, None)  # smallest and largest whole number
    show_default: bool = False


def parse_path(text: str | Path) -> Path:
    """Return the path of a text; raises like `path_text`."""
    return Path(path_text(text))


def path_text(text: str | Path) -> str:
    """Return the text of a path.

    Raises InputError if it cannot name a file. Empty text cannot: Python takes it for ".".
    """
    text = str(text)
    if not text:
        raise InputError("the value is empty; an unset variable?")
    if "\0" in text or len(text) > MAX_OF_A_PATH:
        raise InputError(
            f"{shorten(text)}: expected a path of at most {MAX_OF_A_PATH} characters, without NUL; "
            f"found {len(text)}"
        )
    return text
