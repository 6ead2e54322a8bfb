"""A command and its options, as descriptors need them. The command line fills them in (`crfrefine.cli.describe`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["flag", "integer", "number", "text", "input", "output"]
"""What a value is; "input" and "output" are paths."""


@dataclass(frozen=True)
class Option:
    """An option or a positional argument."""

    name: str  # Unique in the command: letters, digits and underscores.
    flag: str  # Such as "--images"; "" for a positional argument.
    kind: Kind  # What its value is.
    help: str  # A sentence or two.
    is_required: bool = False  # Whether it must be given.
    is_repeatable: bool = False  # Whether it may be given several times.
    choices: tuple[str, ...] = ()  # The only values, if there are such.
    default: str | None = None  # The value if it is not given, as text; None: there is none.
    minimum: float | None = None  # The smallest number; None: any.
    maximum: float | None = None  # The largest number; None: any.


@dataclass(frozen=True)
class Command:
    """A command."""

    name: str  # Such as "infer".
    help: str  # What it does.
    options: tuple[Option, ...]  # In the order of its signature.


@dataclass(frozen=True)
class Manual:
    """What `--help` shows of a command."""

    name: str  # Such as "crfrefine infer"; "crfrefine" for the application.
    usage: str  # The arguments in short, such as "[OPTIONS] FILE...".
    help: str  # Paragraphs on what it does.
    options: tuple[tuple[str, str], ...]  # Arguments and options: names with their placeholder, and what they mean.
