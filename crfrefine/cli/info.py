"""`crfrefine info`: describe a file, the cases of a folder, or this installation."""

from __future__ import annotations

import sys
from functools import partial
from typing import Annotated, Any

import typer

from crfrefine.base.text import counted, for_terminal, printable
from crfrefine.cli import options as shared
from crfrefine.cli.main import indented, print_failure
from crfrefine.runs.options import InferenceOptions


@partial(shared.with_options, InferenceOptions, names="resample")
def info(
    ctx: typer.Context,
    options: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="Everything, for programs.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Also read the voxels: ranges, or counts of labels.")] = False,
) -> None:
    """Show what a file or folder holds; without one, the setup."""
    paths = [shared.usage_path(text) for text in ctx.args]
    from crfrefine.base.failures import Failure, failing_alone
    from crfrefine.io import read_header
    from crfrefine.runs.tools.info import describe_header, inspect_folder, installation

    shown: list[dict[str, Any]] = []
    for number, path in enumerate(paths):
        lines: list[str] = []
        failures: list[Failure] = []
        values: dict[str, Any] = {"path": str(path)}
        if path.is_dir():
            report = inspect_folder(path, **options)
            values |= {"cases": report.cases, "notes": report.notes}
            failures = report.problems
            counts = f"{counted(len(report.cases), 'case')} in order, {counted(len(failures), 'problem')}"
            lines.append(f"{printable(str(path))}: {counts}")
            width = max((len(printable(case_id)) for case_id in report.cases), default=0)
            lines += [f"  {printable(case_id):<{width}}  {line}" for case_id, line in report.cases.items()]
            lines += [for_terminal(f"  note: {note}") for note in report.notes]
            lines += [for_terminal(f"  wrong: {problem.message}") for problem in failures]
        with failing_alone(failures.append, path):
            if not path.is_dir():
                pairs = describe_header(read_header(path), values=verbose)
                values |= {"properties": {name: value for name, value in pairs if name != "note"}}
                values |= {"notes": [value for name, value in pairs if name == "note"]}
                lines = [printable(str(path)), *(f"  {name:<12}  {for_terminal(value)}" for name, value in pairs)]
        shown.append({**values, "problems": [failure.message for failure in failures]})
        if lines and not as_json:
            print("\n".join(["", *lines] if number else lines))
        for failure in failures:
            if not path.is_dir():
                print_failure(failure, verbose=verbose)
            elif verbose and failure.traceback is not None:
                print(for_terminal(indented(failure.traceback)), file=sys.stderr)
    content = {"is_well": not any(values["problems"] for values in shown), "paths": shown, "notes": []} if paths else installation()
    if as_json:
        import json

        print(json.dumps({"schema": 1, **content}, indent=2))
    elif not paths:
        for name, text in content.items():
            print(for_terminal(f"{name:<12}  {text}"))
    if paths and not content["is_well"]:
        raise typer.Exit(1)
