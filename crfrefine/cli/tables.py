"""Tables, values and names of files that commands print, for people or for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crfrefine.base.text import for_terminal, printable

if TYPE_CHECKING:
    from crfrefine.records.records import RunSummary


def print_results(summary: RunSummary) -> None:
    """Print one row per case on standard output.

    It is a table on a terminal, else values separated by tabs under a line of names.
    """
    names = ("case", "status", "steps", "changed", "seconds", "output")
    rows = []
    for record in summary.cases:
        seconds = f"{record.seconds:.2f}" if record.times else None
        facts = (record.num_iterations, record.voxels_changed, seconds, record.output)
        texts = ["" if fact is None else str(fact) for fact in facts]
        rows.append((record.case_id, record.status, *texts))
    if rows:
        print_table(names, rows, numbers=("steps", "changed", "seconds"))


def print_written(*files: Path) -> None:
    """Name files on standard error, in this order."""
    for path in files:
        print(for_terminal(f"written: {path}"), file=sys.stderr)


def print_json(schema: int, content: Mapping[str, object]) -> None:
    """Print values for programs, with the number of their schema."""
    print(json.dumps({"schema": schema, **content}, indent=2))


def print_table(
    names: tuple[str, ...], rows: Sequence[tuple[str, ...]], numbers: tuple[str, ...] = ()
) -> None:
    """Print a table on standard output, aligned on a terminal, else for programs.

    The columns in `numbers` are right-aligned.

    Tabs, line breaks and other non-printing characters are escaped as in Python strings: a row
    stays one line, a cell one cell.
    """
    rows = [tuple(map(printable, row)) for row in rows]
    if not sys.stdout.isatty():
        for row in (names, *rows):
            print("\t".join(row))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        is_number = name in numbers
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(highlight=False).print(table)
