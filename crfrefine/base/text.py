"""Text from files and command lines, made fit for messages and tables.

It is shortened, and has no characters that move the cursor or break a table.
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Iterable
from itertools import islice

MAX_CHARACTERS = 80
MAX_LISTED = 5
MAX_OF_A_PATH = 300
MAX_OF_A_REASON = 200
# Longer than any path; a longer line of a message can only be an attempt to flood the terminal.
MAX_OF_A_LINE = 5000
# Titles in the navigation of the site (`mkdocs.yml`).
PAGE_TITLES = {
    "docs/guide/clusters.md": "Scripts and clusters",
    "docs/guide/patterns.md": "Folders and patterns",
    "docs/reference/formats.md": "File formats",
}
_MAX_OF_A_VALUE = 60


def printable(text: str) -> str:
    r"""Return the text with `\n`, `\x1b` and the like instead of characters that do not print."""
    if text.isprintable():
        return text
    shown = ""
    for letter in text:
        if letter.isprintable():
            shown += letter
        else:
            shown += letter.encode("unicode_escape").decode()
    return shown


def for_spreadsheet(name: str) -> str:
    """Return a name without control characters that no spreadsheet takes for a formula."""
    if name.startswith(("=", "+", "-", "@")):
        return f"'{printable(name)}"
    return printable(name)


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Return rows as a table of comma-separated values."""
    import csv

    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def shorten(text: object, most: int = MAX_CHARACTERS) -> str:
    """Return text that prints on one line; its end beyond `most` characters becomes "…"."""
    full = str(text)
    shown = printable(full[: most + 1])
    if max(len(full), len(shown)) > most:
        return shown[: most - 1] + "…"
    return shown


def shorten_value(value: object) -> str:
    """Return the repr of a value, shortened like `shorten`."""
    if isinstance(value, str):
        value = value[: _MAX_OF_A_VALUE + 1]
    try:
        return shorten(repr(value), _MAX_OF_A_VALUE)
    # Python refuses to write integers of more than 4300 digits, and deeply nested lists.
    except (ValueError, RecursionError):
        return f"a value of type {type(value).__name__} that is too large to show"


def see(page: str) -> str:
    """Return a reference to a page of the documentation, perhaps with an anchor, by its title."""
    path, _, anchor = page.partition("#")
    place = f'"{PAGE_TITLES[path]}"'
    if anchor:
        place += f", {anchor},"
    return f"see {place} in crfrefine's documentation"


def first_line(text: str) -> str:
    """Return the first line of a message, without such as the grids below it."""
    return text.split("\n", 1)[0]


def counted(number: int, what: str) -> str:
    """Return a number with its noun: "1 region", "3 regions"."""
    if number == 1:
        return f"{number} {what}"
    return f"{number} {what}s"


def text_of_sizes(sizes: Iterable[object]) -> str:
    """Return the extents of a grid or a voxel as text, such as 240×240×155."""
    return "\u00d7".join(map(str, sizes))


def listed(items: Collection[object], most: int = MAX_LISTED) -> str:
    """Return the first few items, each shortened, and how many more there are."""
    text = ", ".join(map(shorten, islice(items, most)))
    if len(items) > most:
        text += f" and {len(items) - most} more"
    return text


def for_terminal(message: str, most: int = MAX_OF_A_LINE) -> str:
    r"""Return a message without control characters of terminals.

    Line breaks stay where the next line is indented, as in our messages. A line break inside a name
    is therefore shown as `\n`, unless blanks follow it: then it cannot pass for a separate message.
    """
    lines = re.split(r"\n(?=  )", message)
    return "\n".join(shorten(line, most) for line in lines)
