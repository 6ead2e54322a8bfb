"""`crfrefine info`: describe a file, the cases of a folder, or this installation."""

from __future__ import annotations

import sys
from collections.abc import Mapping
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
    verbose: Annotated[
        bool,
        typer.Option(
            "-v",
            "--verbose",
            help="Also read the voxels: image or label map, ranges, or counts of labels.",
        ),
    ] = False,
) -> None:
    """Show what a file or folder holds; without one, the setup."""
    paths = [shared.usage_path(text) for text in ctx.args]
    from crfrefine.base.failures import Failure, failing_alone
    from crfrefine.io import read_header
    from crfrefine.runs.tools.info import describe_header, inspect_folder, installation

    def fail(failure: Failure) -> None:
        values["problems"] = [failure.message]
        print_failure(failure, verbose=verbose)

    shown: list[dict[str, Any]] = []
    for number, path in enumerate(paths):
        values: dict[str, Any] = {"path": str(path)}
        shown.append(values)
        if number and not as_json:
            print()
        if path.is_dir():
            cases, notes, problems = inspect_folder(path, **options)
            messages = [problem.message for problem in problems]
            values |= {"cases": cases, "notes": notes, "problems": messages}
            if as_json:
                continue
            counts = f"{counted(len(cases), 'case')} in order, {counted(len(problems), 'problem')}"
            print(f"{printable(str(path))}: {counts}")
            rows = {printable(case_id): line for case_id, line in cases.items()}
            width = max(map(len, rows), default=0)
            for name, line in rows.items():
                print(f"  {name:<{width}}  {line}")
            remarks = [f"note: {note}" for note in notes]
            for remark in remarks + [f"wrong: {message}" for message in messages]:
                print(for_terminal(f"  {remark}"))
            for trace in [each.traceback for each in problems if verbose and each.traceback]:
                print(for_terminal(indented(trace)), file=sys.stderr)
            continue
        with failing_alone(fail, path):
            lines = describe_header(read_header(path), values=verbose)
            properties = {name: value for name, value in lines if name != "note"}
            values |= {
                "properties": properties,
                "notes": [value for name, value in lines if name == "note"],
                "problems": [],
            }
            if not as_json:
                print(printable(str(path)))
                for name, value in lines:
                    print(f"  {name:<12}  {for_terminal(value)}")
    content: Mapping[str, object]
    if paths:
        content = {
            "is_well": not any(values["problems"] for values in shown),
            "paths": shown,
            "notes": [],
        }
    else:
        content = installation()
    if as_json:
        import json

        print(json.dumps({"schema": 1, **content}, indent=2))
    elif not paths:
        for name, text in content.items():
            print(for_terminal(f"{name:<12}  {text}"))
    if paths and not content["is_well"]:
        raise typer.Exit(1)
