"""`crfrefine info`: what a file is, and which cases a folder holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from crfrefine.cli.options import HelpOption, parse_path


def info(
    ctx: typer.Context,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Also read the voxels: ranges, or counts of labels.")] = False,
    wants_help: HelpOption = False,
) -> None:
    """Show what a file is, its geometry, which cases a folder holds and what is wrong with them."""
    paths = [parse_path(text) for text in ctx.args]
    if not paths:
        raise typer.BadParameter("name at least one file or folder", param_hint="FILE...")
    from crfrefine.errors import CrfRefineError
    from crfrefine.inspection import describe_file

    is_well = True
    for number, path in enumerate(paths):
        if number:
            print()
        if path.is_dir():
            is_well &= _show_folder(path)
            continue
        try:
            lines = describe_file(path, values=verbose)
        except CrfRefineError as error:
            print(f"crfrefine: error: {error}", file=sys.stderr)
            is_well = False
            continue
        print(path)
        for name, value in lines:
            print(f"  {name:<12}  {value}")
    if not is_well:
        raise typer.Exit(1)


def _show_folder(path: Path) -> bool:
    """Print what a folder holds; return whether all is well with it."""
    from crfrefine.inspection import inspect_folder

    report = inspect_folder(path)
    cases, problems = len(report.cases), len(report.problems)
    counts = f"{cases} case{'' if cases == 1 else 's'} in order, {problems} problem{'' if problems == 1 else 's'}"
    print(f"{path}: {counts}")
    width = max(map(len, report.cases), default=0)
    for case_id, line in report.cases.items():
        print(f"  {case_id:<{width}}  {line}")
    for note in report.notes:
        print(f"  note: {note}")
    for problem in report.problems:
        print(f"  wrong: {problem}")
    return not report.problems
