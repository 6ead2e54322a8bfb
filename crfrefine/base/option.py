"""The description of a command-line option, beside the field or parameter that holds its value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from crfrefine.base.text import shorten
from crfrefine.errors import InputError

MAX_OF_A_PATH = 4096  # characters; the limit of Linux

# The panels of the help of a command, in its order.
ARGUMENTS, INPUT, OUTPUT, MODEL, LESIONS, RESOURCES, CLUSTER, RARE, MESSAGES = PANELS = (
    "Arguments",
    "Input",
    "Output",
    "Model",
    "Lesions",
    "Resources",
    "Cluster",
    "Rarely needed",
    "Messages",
)


class Option(NamedTuple):
    """A command's option, or its argument if it has no names; `cli.command` makes it.

    It belongs to the annotation of a field of an options class, or of a parameter of the function
    of a command, after the type of the value: `tuple[T, ...]` means that the option can be
    repeated.
    """

    names: str  # such as "-i --images", or "--report/--no-report"
    help: str
    metavar: str | None = None  # placeholder of the value
    parse: Callable[[str], Any] | None = None  # converts the text; raises InputError
    panel: str = RARE
    choices: tuple[str, ...] = ()  # the values that it may have, if they are few
    may_stand_alone: bool = False  # without a value, which is then the first of the choices
    limits: tuple[int | None, int | None] = (None, None)  # smallest and largest whole number
    show_default: bool = False
    unless: str = ""  # the options without which this one is required
    # returns the values that begin with a text, each with a few words, for the shell
    complete: Callable[[str], list[tuple[str, str]]] | None = None


STRICT = Option(
    "--strict", "Refuse incomplete cases; otherwise leave them out, and say which and why."
)
LABELS = Option("-l --labels", "Reference: folder, file or pattern.", "PATH", panel=INPUT)


def parse_path(text: str) -> Path:
    """Return the path of a text; raises like `path_text`."""
    return Path(path_text(text))


def path_text(text: str) -> str:
    """Return the text of a path.

    Raises InputError if it cannot name a file. Empty text cannot: Python takes it for ".".
    """
    if not text:
        raise InputError("the value is empty; an unset variable?")
    if "\0" in text or len(text) > MAX_OF_A_PATH:
        raise InputError(
            f"{shorten(text)}: expected a path of at most {MAX_OF_A_PATH} characters, without NUL; "
            f"found {len(text)}"
        )
    return text
