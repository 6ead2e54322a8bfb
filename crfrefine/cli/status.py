"""`crfrefine status`: what is done, failed and missing of folder runs, and the commands that do the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from crfrefine.base.text import counted, for_terminal, listed, printable, shorten
from crfrefine.cli.options import parse_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crfrefine.runs.status.report import CaseStatus, RunStatus

_MAX_LISTED = 20
_MAX_OF_A_REASON = 300
_RUN = {"interrupted": "; interrupted, or still running", "not started": "; no record of it: not started"}


def status(
    ctx: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, for programs.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Name all cases, not the first 20 of each kind.")] = False,
) -> None:
    """Show what is left of folder runs, and the commands for it."""
    paths = [parse_path(text) for text in ctx.args]
    if not paths:
        raise typer.BadParameter("name output folders of runs, or files that --summary wrote", param_hint="PATH...")
    from crfrefine.runs.status.finding import find_status

    report = find_status(paths)
    if as_json:
        import json

        content = {"schema": 1, "is_complete": report.is_complete, "runs": [run.to_dict() for run in report.runs], "notes": report.notes}
        print(json.dumps(content, indent=2))
    else:
        for runs in _grouped(report.runs):
            _show(runs, None if verbose else _MAX_LISTED)
        for note in report.notes:
            print(for_terminal(f"note: {note}"))
    if not report.is_complete:
        raise typer.Exit(1)


def _grouped(runs: Sequence[RunStatus]) -> list[list[RunStatus]]:
    """Return the runs, complete ones into one folder together, such as those of a loop over cases."""
    groups: dict[object, list[RunStatus]] = {}
    for run in runs:
        is_plain = run.is_complete and len(run.parts) == 1
        groups.setdefault(run.output_folder if is_plain else id(run), []).append(run)
    return list(groups.values())


def _show(runs: Sequence[RunStatus], most: int | None) -> None:
    """Print a run, or several complete ones as one.

    Args:
        runs: their status.
        most: the largest number of cases of each kind that are named; None means all.
    """
    from crfrefine.runs.execution.records import FAILED
    from crfrefine.runs.status.report import DONE, MISSING, STATES

    run = runs[0]
    if len(runs) > 1:
        cases = {(case.case_id, case.output): case for run in runs for case in run.cases}
        notes = dict.fromkeys(note for run in runs for note in run.notes)
        run = replace(run, cases=list(cases.values()), notes=list(notes))
    counts = ", ".join(f"{len(run.of_state(state))} {state}" for state in STATES)
    alone = _RUN.get(run.parts[0].run, "") if len(run.parts) == 1 and not run.is_complete else ""
    several = f" of {len(runs)} runs" if len(runs) > 1 else ""
    print(f"{printable(run.output_folder)}: {counted(len(run.cases), 'case')}{several}: {counts}{alone}")
    shown = run.parts if most is None else [part for part in run.parts if part.counts[FAILED] + part.counts[MISSING]]
    for part in shown if len(run.parts) > 1 else ():
        left = "".join(f", {part.counts[state]} {state}" for state in (FAILED, MISSING) if part.counts[state])
        total = sum(part.counts.values())
        print(f"  part {part.part_id}: {part.counts[DONE]} of {total} done{left}{_RUN.get(part.run, '')}")
    _show_cases(run.of_state(FAILED), "failed", most)
    missing = run.of_state(MISSING)
    _show_cases([case for case in missing if case.reason != "not reached"], "missing", most)
    if names := [case.case_id for case in missing if case.reason == "not reached"]:
        print(f"  missing: {listed(names, most=len(names) if most is None else most)}")
    if most is None and run.of_state(DONE):
        print(f"  done: {listed([case.case_id for case in run.of_state(DONE)], most=len(run.cases))}")
    for note in run.notes:
        print(for_terminal(f"  note: {note}"))
    if run.commands:
        print("  the rest:")
        for command in run.commands:
            print(command)


def _show_cases(cases: Sequence[CaseStatus], state: str, most: int | None) -> None:
    shown = cases if most is None else cases[:most]
    for case in shown:
        reason = (case.reason or "").partition("\n")[0]
        print(f"  {state}: {shorten(case.case_id)}: {shorten(reason, _MAX_OF_A_REASON)}")
    if len(cases) > len(shown):
        print(f"  {state}: {len(cases) - len(shown)} more, which -v names")
