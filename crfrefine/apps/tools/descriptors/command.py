"""A command and its options, as descriptors need them. The command line fills them in (`crfrefine.cli.describe`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["flag", "integer", "number", "text", "input", "output"]
"""What a value is; "input" and "output" are paths."""


@dataclass(frozen=True)
class Option:
    """An option or a positional argument.

    Attributes:
        name: unique in the command: letters, digits and underscores.
        flag: such as "--images"; "" for a positional argument.
        kind: what its value is.
        help: a sentence or two.
        is_required: whether it must be given.
        is_repeatable: whether it may be given several times.
        choices: the only values, if there are such.
        default: the value if it is not given, as text; None: there is none.
        minimum: the smallest number; None: any.
        maximum: the largest number; None: any.
    """

    name: str
    flag: str
    kind: Kind
    help: str
    is_required: bool = False
    is_repeatable: bool = False
    choices: tuple[str, ...] = ()
    default: str | None = None
    minimum: float | None = None
    maximum: float | None = None


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        name: such as "infer".
        help: what it does.
        options: in the order of its signature.
    """

    name: str
    help: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Manual:
    """What `--help` shows of a command.

    Attributes:
        name: such as "crfrefine infer"; "crfrefine" for the application.
        usage: the arguments in short, such as "[OPTIONS] FILE...".
        help: paragraphs on what it does.
        options: arguments and options: names with their placeholder, and what they mean.
    """

    name: str
    usage: str
    help: str
    options: tuple[tuple[str, str], ...]
