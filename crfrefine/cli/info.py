"""`crfrefine info`: describe a file, the cases of a folder, or this installation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from crfrefine.base.text import counted, for_terminal, printable
from crfrefine.cli import options as shared
from crfrefine.cli.progress import print_failure, print_traceback
from crfrefine.runs.options import InferenceOptions

if TYPE_CHECKING:
    from crfrefine.runs.tools.info import FolderReport


@shared.with_options(InferenceOptions, "resample")
def info(
    ctx: typer.Context,
    options: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="Everything, for programs.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Also read the voxels: ranges, or counts of labels.")] = False,
) -> None:
    """Show what a file or folder holds; without one, the setup."""
    paths = [shared.usage_path(text) for text in ctx.args]
    if not paths:
        _show_installation(as_json)
        return
    from crfrefine.base.failures import Failure, failing_alone
    from crfrefine.io import read_header
    from crfrefine.runs.tools.info import describe_header, inspect_folder

    found: list[dict[str, Any]] = []

    def fail(failure: Failure) -> None:
        found.append({"path": str(path), "problems": [failure.message]})
        print_failure(failure, verbose=verbose)

    for number, path in enumerate(paths):
        if number and not as_json:
            print()
        if path.is_dir():
            report = inspect_folder(path, **options)
            found.append({"path": str(path), "cases": report.cases, "notes": report.notes, "problems": report.problems})
            if not as_json:
                _show_folder(report, verbose)
            continue
        lines: list[tuple[str, str]] = []
        with failing_alone(fail, path):
            lines = describe_header(read_header(path), values=verbose)
            notes = [value for name, value in lines if name == "note"]
            found.append(
                {"path": str(path), "properties": dict(line for line in lines if line[0] != "note"), "notes": notes, "problems": []}
            )
        if lines and not as_json:
            print(printable(str(path)))
            for name, value in lines:
                print(f"  {name:<12}  {for_terminal(value)}")
    is_well = not any(one["problems"] for one in found)
    if as_json:
        import json

        print(json.dumps({"schema": 1, "is_well": is_well, "paths": found, "notes": []}, indent=2))
    if not is_well:
        raise typer.Exit(1)


def _show_installation(as_json: bool) -> None:
    from crfrefine.runs.tools.info import installation

    found = installation()
    if as_json:
        import json

        print(json.dumps({"schema": 1, **found}, indent=2))
        return
    for name, text in found.items():
        print(for_terminal(f"{name:<12}  {text}"))


def _show_folder(report: FolderReport, verbose: bool) -> None:
    counts = f"{counted(len(report.cases), 'case')} in order, {counted(len(report.problems), 'problem')}"
    print(f"{printable(str(report.path))}: {counts}")
    shown = {printable(case_id): line for case_id, line in report.cases.items()}
    width = max(map(len, shown), default=0)
    for name, line in shown.items():
        print(f"  {name:<{width}}  {line}")
    for note in report.notes:
        print(for_terminal(f"  note: {note}"))
    for problem in report.problems:
        print(for_terminal(f"  wrong: {problem}"))
    for trace in report.tracebacks if verbose else ():
        print_traceback(trace)
