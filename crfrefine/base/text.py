"""Text from files and command lines for messages and tables: shortened, without characters that move the cursor or break a table."""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import islice

TIMES = "\u00d7"  # between the extents of a grid, as in 240×240×155
MAX_CHARACTERS = 80
MAX_LISTED = 5
MAX_OF_A_PATH = 300
MAX_OF_A_REASON = 200
MAX_OF_A_LINE = 5000  # Longer than any path; a longer line of a message can only be an attempt to flood the terminal.
# Titles in the navigation of the site (`mkdocs.yml`).
PAGE_TITLES = {
    "docs/guide/clusters.md": "Scripts and clusters",
    "docs/reference/formats.md": "File formats",
}
_MAX_OF_A_VALUE = 60


def printable(text: str) -> str:
    r"""Return the text with `\n`, `\x1b` and the like instead of non-printing characters: line breaks, tabs, escape sequences."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def shorten(text: object, most: int = MAX_CHARACTERS) -> str:
    """Return text that prints on one line; beyond `most` characters, its end is replaced by "…"."""
    whole = str(text)
    shown = printable(whole[: most + 1])
    return shown if len(whole) <= most and len(shown) <= most else shown[: most - 1] + "…"


def shorten_value(value: object) -> str:
    """Return the repr of a value, shortened like `shorten`."""
    if isinstance(value, str):
        value = value[: _MAX_OF_A_VALUE + 1]
    try:
        return shorten(repr(value), _MAX_OF_A_VALUE)
    except (
        ValueError,
        RecursionError,
    ):  # Python refuses to write integers of more than 4300 digits, and deeply nested lists.
        return f"a value of type {type(value).__name__} that is too large to show"


def see(page: str) -> str:
    """Return a reference to a page of the documentation, perhaps with an anchor, by its title on the site."""
    path, _, anchor = page.partition("#")
    return (
        f'see "{PAGE_TITLES[path]}"'
        + (f", {anchor}," if anchor else "")
        + " in crfrefine's documentation"
    )


def counted(number: int, what: str) -> str:
    """Return a number with its noun: "1 region", "3 regions"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def listed(items: Collection[object], most: int = MAX_LISTED) -> str:
    """Return the first few items, each shortened, separated by commas, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(shorten, islice(items, most))) + more


def for_terminal(message: str, most: int = MAX_OF_A_LINE) -> str:
    r"""Return a message without terminal control characters; line breaks stay where the next line is indented, as in our messages.

    A line break inside a name is therefore shown as `\n`, unless blanks follow it: an indented line cannot pass for a separate message.
    """
    lines = re.split(r"\n(?=  )", message)
    return "\n".join(shorten(line, most) for line in lines)
