"""Write the tables of options in docs/reference/cli.md from the help of the commands."""

import re
from pathlib import Path

import click

from crfrefine.cli.command import Command
from crfrefine.cli.main import app

PAGE = Path(__file__).parent / "reference" / "cli.md"


def table(command: str) -> str:
    """Return the table of a command's options, in the order of its help."""
    built = app.get_command(click.Context(app), command)
    assert isinstance(built, Command)
    rows = []
    for records in built.rows_of_panels(click.Context(built, info_name=command)).values():
        for record in records:
            names, text = (" ".join(part.split()).replace("|", r"\|") for part in record)
            text = text.replace("[", r"\[")
            if not names.endswith("--help"):
                rows.append(f"| `{names}` | {text} |")
    return "\n".join(["| option | meaning |", "| --- | --- |", *rows])


def with_tables(page: str) -> str:
    """Return the page with its tables written again."""
    marks = re.compile(
        r"(<!-- options of ([a-z-]+) -->\n\n).*?(\n\n<!-- end of options -->)", re.DOTALL
    )
    return marks.sub(lambda found: found[1] + table(found[2]) + found[3], page)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
