"""`crfrefine info`: describe a file, the cases of a folder, or this installation."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crfrefine.base.option import LABELS, Option
from crfrefine.base.text import counted, for_terminal, printable
from crfrefine.cli import options as shared
from crfrefine.cli.command import command, options_of
from crfrefine.cli.failures import indented, print_failure
from crfrefine.cli.tables import print_json
from crfrefine.infer.options import InferenceOptions

if TYPE_CHECKING:
    from crfrefine.base.failures import Failure

_EXAMPLES = """\
crfrefine info
crfrefine info ct.nii.gz -v
crfrefine info -i images -p logits -l labels"""


@command(
    _EXAMPLES,
    options_of(InferenceOptions, "images logits masks input_type resample", needs_inputs=False),
)
def info(
    paths: Annotated[
        tuple[Path, ...], Option("", "Files, folders or patterns to describe.", "FILE...")
    ] = (),
    labels: Annotated[Path | None, LABELS] = None,
    as_json: Annotated[bool, Option("--json", "Everything, for programs.")] = False,
    verbose: Annotated[
        bool,
        shared.VERBOSE._replace(
            help="Also read the voxels: image or label map, ranges, or counts of labels.",
        ),
    ] = False,
    **options: Any,
) -> None:
    """Show the content of a file or folder; without one, the setup."""
    if options["images"] and not paths:
        paths = options["images"][:1]
    elif not options["images"] and (options["logits"] or labels is not None):
        raise typer.BadParameter("name the images of the cases with -i", param_hint="--images")
    options["labels"] = labels
    if not paths:
        from crfrefine.info.installation import installation

        shown = installation()
        if as_json:
            print_json(1, shown)
            return
        for name, text in shown.items():
            print(for_terminal(f"{name:<12}  {text}"))
        return
    # They import numpy.
    from crfrefine.io.paths import holds_many, holds_volumes, is_dicom, is_pattern

    reports: list[dict[str, Any]] = []
    for number, path in enumerate(paths):
        if number and not as_json:
            print()
        is_series = is_dicom(path) and not holds_volumes(path)
        is_folder = is_pattern(path) or (holds_many(path) and not is_series)
        if is_folder or options["images"]:
            values = _inspect_folder(path, options, is_verbose=verbose, is_printed=not as_json)
        else:
            values = _inspect_file(path, is_verbose=verbose, is_printed=not as_json)
        reports.append({"path": str(path), **values})

    is_well = not any(report["problems"] for report in reports)
    if as_json:
        print_json(1, {"is_well": is_well, "paths": reports, "notes": []})
    if not is_well:
        raise typer.Exit(1)


def _inspect_folder(
    folder: Path, options: dict[str, Any], *, is_verbose: bool, is_printed: bool
) -> dict[str, Any]:
    """Return the cases of a folder for programs, and print them if wanted.

    A line is about a case, a note or a problem; if verbose, tracebacks follow.
    """
    from crfrefine.info.folders import inspect_folder

    if options["masks"] == "nonzero":
        options = {**options, "masks": None}
    report = inspect_folder(folder, **options)
    notes = [str(note) for note in report.notes]
    messages = [str(problem) for problem in report.problems]
    if is_printed:
        if report.found:
            print(for_terminal(report.found))
        num_cases = counted(len(report.cases), "case")
        num_problems = counted(len(messages), "problem")
        print(f"{printable(str(folder))}: {num_cases} in order, {num_problems}")
        _print_columns("  ", report.cases.items())
        if report.roles:
            print("  roles of the files of the first case:")
        role_rows = []
        for role in report.roles:
            role_rows.append((role.name, role.kind, role.frame, role.path.name, role.evidence))
        _print_columns("    ", role_rows)
        for note in notes:
            print(for_terminal(f"  note: {note}"))
        for problem in report.problems:
            print(for_terminal(f"  wrong: {problem}"))
            if is_verbose and problem.traceback is not None:
                print(for_terminal(indented(problem.traceback)), file=sys.stderr)
    if report.found:
        notes.insert(0, report.found)
    roles = [{**role._asdict(), "path": str(role.path)} for role in report.roles]
    return {"cases": report.cases, "roles": roles, "notes": notes, "problems": messages}


def _print_columns(indent: str, rows: Iterable[tuple[str, ...]]) -> None:
    """Print rows of texts as columns."""
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(f"{indent}{'  '.join(map(str.ljust, row, widths)).rstrip()}")


def _inspect_file(path: Path, *, is_verbose: bool, is_printed: bool) -> dict[str, Any]:
    """Return the properties of a file or a folder of DICOM for programs, and print them if wanted.

    A file that cannot be read has an error on standard error instead.
    """
    from crfrefine.base.failures import failing_alone
    from crfrefine.info.files import describe_header, describe_values
    from crfrefine.io import read_header
    from crfrefine.io.formats import STRUCTURES
    from crfrefine.io.paths import is_dicom, recognize

    failures: list[Failure] = []
    lines: list[tuple[str, str]] = []
    with failing_alone(failures.append, path):
        if is_dicom(path) or recognize(path) is STRUCTURES:
            from crfrefine.convert.dicom import describe_dicom

            lines = describe_dicom(path)
        else:
            header = read_header(path)
            lines = describe_header(header)
            if is_verbose:
                lines += describe_values(header)
    if failures:
        print_failure(failures[0], verbose=is_verbose)
        return {"problems": [str(failures[0])]}
    if is_printed:
        print(printable(str(path)))
        for name, value in lines:
            print(f"  {name:<12}  {for_terminal(value)}")
    properties = {name: value for name, value in lines if name != "note"}
    notes = [value for name, value in lines if name == "note"]
    return {"properties": properties, "notes": notes, "problems": []}
