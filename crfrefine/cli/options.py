"""What the options of several commands have in common: help without its price, paths that are not empty, a bound on threads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crfrefine.text import shorten


def _show_help(ctx: typer.Context, wanted: bool) -> None:
    if wanted:
        print(ctx.get_help())
        raise typer.Exit


# Typer's own --help has no default, which makes it import pydantic to convert nothing: a fifth of the time that `info` takes.
HelpOption = Annotated[bool, typer.Option("-h", "--help", help="Show this message and exit.", callback=_show_help, is_eager=True)]

MOST_OF_A_PATH = 4096  # Characters; Linux takes no longer ones.
MOST_OF_A_NAME = 200  # Of a method, which stands in tables.
MAX_PARTS = 1_000_000
LARGEST_SEED = 2**63 - 1  # That all generators of random numbers take.
MAX_THREADS = 1024  # More than any machine in use has cores; typing errors beyond it would exhaust the system's threads.

ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads", metavar="N", min=1, max=MAX_THREADS, help="CPU threads. Default: the cores this process may use.", show_default=False
    ),
]


StrictOption = Annotated[
    bool, typer.Option("--strict", help="Refuse cases that lack a file; otherwise leave them out, and say which and why.")
]


def path_or_value(text: str) -> str:
    """Return a text that may be a path or something else; raise BadParameter where it is empty: Python would take the current folder."""
    if not text:
        raise typer.BadParameter("the path is empty; an unset variable?")
    if "\0" in text:
        raise typer.BadParameter(f"{shorten(text)}: a path cannot hold the character NUL")
    return text


def path_text(text: str | Path) -> str:
    """Return the text of a path; raise BadParameter where it is empty, or none that a system takes."""
    path_or_value(str(text))
    if len(str(text)) > MOST_OF_A_PATH:
        raise typer.BadParameter(f"{shorten(text)}: {len(str(text))} characters are more than a path can have")
    return str(text)


def parse_path(text: str | Path) -> Path:
    """Return the path that a text names; raises like `path_text`."""
    return Path(path_text(text))


OverridesOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one entry: --set bilateral.theta_alpha=6; repeatable.", show_default=False),
]
