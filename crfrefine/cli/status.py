"""`crfrefine status`: which cases of folder runs are done, failed and missing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crfrefine.base.text import counted, for_terminal, listed, printable, shorten
from crfrefine.cli.options import usage_path

if TYPE_CHECKING:
    from crfrefine.runs.records import CaseState

_MAX_LISTED = 20
_MAX_REASON = 300


def status(
    ctx: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, for programs.")] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Name all cases, not the first 20 of each kind.")
    ] = False,
) -> None:
    """Show which cases of folder runs are done, failed or missing."""
    folders = [usage_path(text) for text in ctx.args]
    if not folders:
        raise typer.BadParameter("name output folders of runs", param_hint="FOLDER...")
    from crfrefine.errors import InputError
    from crfrefine.runs.records import case_states, read_records
    from crfrefine.runs.run import note_on_num_labels

    is_complete = True
    content = []
    for folder in folders:
        recorded = read_records(folder)
        if not recorded.runs:
            raise InputError(
                "\n  ".join(
                    [
                        f"{folder}: holds no record of `infer`; name the output folder of a run",
                        *recorded.notes,
                    ]
                )
            )
        cases = case_states(folder, recorded)
        done = [case.record for case in cases if case.record is not None]
        is_complete = (
            is_complete and not recorded.notes and all(case.state == "done" for case in cases)
        )
        notes = [*recorded.notes, *filter(None, [note_on_num_labels(done)])]
        if vanished := [record.case_id for record in done if record.vanished_labels]:
            notes.append(f"labels vanished in {counted(len(vanished), 'case')}: {listed(vanished)}")
        if not as_json:
            _show(folder, cases, notes, len(cases) if verbose else _MAX_LISTED)
        values = [
            {
                "case_id": case.case_id,
                "state": case.state,
                "label_map": str(case.label_map),
                "reason": case.reason,
            }
            for case in cases
        ]
        content.append({"output_folder": str(folder.resolve()), "cases": values, "notes": notes})
    if as_json:
        import json

        print(json.dumps({"schema": 2, "is_complete": is_complete, "folders": content}, indent=2))
    if not is_complete:
        raise typer.Exit(1)


def _show(folder: Path, cases: list[CaseState], notes: list[str], max_listed: int) -> None:
    """Print the counts, and the reason of each case that is not done.

    At most so many cases of a kind and reason.
    """
    states = [case.state for case in cases]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("done", "failed", "missing"))
    print(f"{printable(str(folder))}: {counted(len(cases), 'case')}: {counts}")
    by_reason: dict[tuple[str, str], list[str]] = {}
    for case in sorted(cases, key=lambda case: case.state, reverse=True):
        if case.reason:
            by_reason.setdefault((case.state, case.reason.partition("\n")[0]), []).append(
                case.case_id
            )
    for (state, reason), names in list(by_reason.items())[:max_listed]:
        print(f"  {state}: {listed(names, most=max_listed)}: {shorten(reason, _MAX_REASON)}")
    if (more := len(by_reason) - max_listed) > 0:
        print(f"  {more} more reasons, which -v names")
    for note in notes:
        print(for_terminal(f"  note: {note}"))
    if {"failed", "missing"} & set(states):
        print("  run the same command with --continue for the rest")
