"""Tables for notebooks: the HTML that Jupyter shows for an object with `_repr_html_`. The report of `evaluate` has its own pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from crfrefine.base.text import printable


def html_table(caption: str, names: Sequence[str], rows: Iterable[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """Return a table with a caption above it and notes below; every text is escaped."""
    head = "".join(f"<th>{_cell(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    below = "".join(f"<p>{_cell(note)}</p>\n" for note in notes)
    return f"<table>\n<caption>{_cell(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n{below}"


def _cell(text: str) -> str:
    return escape(printable(text))
