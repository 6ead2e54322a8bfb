"""The manual page, `man crfrefine`: the help of all commands in roff.

Typer has no such writer, and click-man reads commands of Click alone, of which Typer has its own copy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import crfrefine
from crfrefine.apps.tools.descriptors.command import Manual

_EXIT_STATUS = (
    ("0", "All well."),
    ("1", "Something failed, with a message on standard error."),
    ("2", "Wrong usage."),
    ("129, 130, 143", "Ended by SIGHUP, SIGINT (Ctrl-C), SIGTERM."),
)


def man_page(manuals: Sequence[Manual]) -> str:
    """Return the page of the application and then each command, in the macros of `man` alone and in ASCII (man(7), groff_man(7))."""
    application, *commands = manuals
    lines = [f'.TH {_escaped(application.name).upper()} 1 "" "{_escaped(f"crfrefine {crfrefine.__version__}")}" "User Commands"']
    # Ragged lines without hyphens: options can be searched and copied.
    lines += [".ad l", ".nh"]
    summary = application.help.partition("\n")[0].rstrip(".")
    lines += [".SH NAME", f"{_escaped(application.name)} \\- {_escaped(summary)}"]
    lines += [".SH SYNOPSIS", *_usage(application)]
    lines += [".SH DESCRIPTION", *_paragraphs(application.help), ".SH OPTIONS", *_items(application.options)]
    lines.append(".SH COMMANDS")
    for command in commands:
        lines += [f".SS {_escaped(command.name)}", *_paragraphs(command.help), ".PP", *_usage(command), *_items(command.options)]
    lines += [".SH EXIT STATUS", *_items(_EXIT_STATUS)]
    return "\n".join(lines) + "\n"


def _usage(manual: Manual) -> list[str]:
    return [f"\\fB{_escaped(manual.name)}\\fR {_escaped(manual.usage)}"]


def _paragraphs(text: str) -> Iterator[str]:
    for number, paragraph in enumerate(re.split(r"\n\s*\n", text.strip())):
        if number:
            yield ".PP"
        yield _line(" ".join(paragraph.split()))


def _items(pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    for names, text in pairs:
        yield from (".TP", f"\\fB{_escaped(names)}\\fR", _line(" ".join(text.split())))


def _line(text: str) -> str:
    """Return a line of text, which must not look like a request."""
    escaped = _escaped(text)
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped


def _escaped(text: str) -> str:
    """Return text with roff's escapes: a plain "-" may be shown as another dash, which cannot be copied into a shell."""
    special = {"\\": "\\e", "-": "\\-", "'": "\\(aq", '"': "\\(dq", "`": "\\(ga", "^": "\\(ha", "~": "\\(ti"}
    return "".join(special.get(letter, letter if letter.isascii() else f"\\[u{ord(letter):04X}]") for letter in text)
