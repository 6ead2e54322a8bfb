"""Write the tables of options in docs/reference/cli.md from the help of the commands."""

import re
from pathlib import Path

import typer

from crfrefine.cli.main import app

PAGE = Path(__file__).parent / "reference" / "cli.md"


def table(command: str) -> str:
    """Return the table of a command's options, in the order of its help."""
    group = typer.main.get_command(app)
    context = typer.Context(group)
    built = group.get_command(context, command)
    rows = []
    for parameter in built.get_params(typer.Context(built, info_name=command)):
        record = parameter.get_help_record(context)
        names, text = (" ".join(part.split()).replace("|", r"\|") for part in record)
        text = text.replace("\\[", "[").replace("[", r"\[")
        if not names.startswith("--help"):
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
