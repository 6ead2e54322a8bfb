"""`crfrefine status`: the done, failed and missing cases of folder runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from crfrefine.base.text import counted, for_terminal, listed, printable, shorten
from crfrefine.cli.options import parse_path

if TYPE_CHECKING:
    from crfrefine.runs.status import RunStatus

_MAX_LISTED = 20
_MAX_OF_A_REASON = 300


def status(
    ctx: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, for programs.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Name all cases, not the first 20 of each kind.")] = False,
) -> None:
    """Show what is left of folder runs."""
    paths = [parse_path(text) for text in ctx.args]
    if not paths:
        raise typer.BadParameter("name output folders of runs, or files that --summary wrote", param_hint="PATH...")
    from crfrefine.runs.status import DONE, find_status

    runs, notes = find_status(paths)
    is_complete = not notes and all(case.state == DONE for run in runs for case in run.cases)
    if as_json:
        import json

        print(json.dumps({"schema": 2, "is_complete": is_complete, "runs": [run.to_dict() for run in runs], "notes": notes}, indent=2))
    else:
        for run in runs:
            _show(run, len(run.cases) if verbose else _MAX_LISTED, names_done=verbose)
        for note in notes:
            print(for_terminal(f"note: {note}"))
    if not is_complete:
        raise typer.Exit(1)


def _show(run: RunStatus, most: int, *, names_done: bool) -> None:
    """Print the state of a run, with the names of at most so many cases of each kind."""
    from crfrefine.runs.status import DONE, FAILED, MISSING, STATES

    counts = ", ".join(f"{len(run.of_state(state))} {state}" for state in STATES)
    print(f"{printable(run.output_folder)}: {counted(len(run.cases), 'case')}: {counts}")
    failed, missing = run.of_state(FAILED), run.of_state(MISSING)
    with_reason = [*failed, *(case for case in missing if case.reason != "not reached")]
    for case in with_reason[:most]:
        reason = (case.reason or "").partition("\n")[0]
        print(f"  {case.state}: {shorten(case.case_id)}: {shorten(reason, _MAX_OF_A_REASON)}")
    if len(with_reason) > most:
        print(f"  {len(with_reason) - most} more, which -v names")
    if names := [case.case_id for case in missing if case.reason == "not reached"]:
        print(f"  missing: {listed(names, most=most)}")
    if failed or missing:
        parts = sorted({case.part_id for case in (*failed, *missing)})
        of_parts = f", part {', '.join(map(str, parts))} of {run.num_parts}," if run.num_parts > 1 else ""
        print(f"  run the same command{of_parts} with --continue")
    if names_done and run.of_state(DONE):
        print(f"  done: {listed([case.case_id for case in run.of_state(DONE)], most=most)}")
