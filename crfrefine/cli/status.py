"""`crfrefine status`: which cases of folder runs are done, failed and missing."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crfrefine.base.notes import Note
from crfrefine.base.option import Option
from crfrefine.base.text import counted, first_line, for_terminal, listed, printable, shorten
from crfrefine.cli import options as shared
from crfrefine.cli.command import command
from crfrefine.cli.tables import print_json, print_written

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crfrefine.records.states import CaseState

_MAX_LISTED = 20
_MAX_REASON = 300
_EXAMPLES = """\
crfrefine status refined
crfrefine status refined -v
crfrefine status refined --json"""


@command(_EXAMPLES)
def status(
    folders: Annotated[tuple[Path, ...], Option("", "Output folders of runs.", "FOLDER...")],
    merge: Annotated[
        bool,
        Option(
            "--merge",
            "Join the tables of the parts of a job array, statistics-K-of-N.csv, to "
            "statistics.csv.",
        ),
    ] = False,
    as_json: Annotated[bool, Option("--json", "Everything, for programs.")] = False,
    verbose: Annotated[
        bool, shared.VERBOSE._replace(help="Name all cases, not the first 20 of each kind.")
    ] = False,
) -> None:
    """Show which cases of folder runs are done, failed or missing."""
    from crfrefine.errors import InputError
    from crfrefine.records.states import case_states

    is_complete = True
    content = []
    for folder in folders:
        if not folder.is_dir():
            problem = "expected a folder, this is a file" if folder.exists() else "no such folder"
            raise InputError(f"{folder}: {problem}; name the output folder of a run")
        states, notes, are_done = case_states(folder)
        is_complete = is_complete and are_done
        if merge:
            from crfrefine.records.merged_statistics import merge_statistics

            print_written(merge_statistics(folder, states))
        if not as_json:
            _show(folder, states, notes, max_listed=len(states) if verbose else _MAX_LISTED)
            continue
        cases = [case.to_dict() for case in states]
        texts = [str(note) for note in notes]
        content.append({"output_folder": str(folder.resolve()), "cases": cases, "notes": texts})
    if as_json:
        print_json(2, {"is_complete": is_complete, "folders": content})
    if not is_complete:
        raise typer.Exit(1)


def _show(folder: Path, cases: Sequence[CaseState], notes: Sequence[Note], max_listed: int) -> None:
    """Print the counts, and each reason why cases are not done, with these cases.

    At most `max_listed` cases of a kind and reason are named, and so many reasons.
    """
    states = [case.state for case in cases]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("done", "failed", "missing"))
    print(f"{printable(str(folder))}: {counted(len(states), 'case')}: {counts}")
    names_of_reason: dict[tuple[str, str], list[str]] = {}
    for case in sorted(cases, key=lambda case: case.state, reverse=True):
        if case.reason is not None:
            reason = first_line(str(case.reason))
            names_of_reason.setdefault((case.state, reason), []).append(case.case_id)
    for (state, reason), names in islice(names_of_reason.items(), max_listed):
        print(f"  {state}: {listed(names, most=max_listed)}: {shorten(reason, _MAX_REASON)}")
    num_more = len(names_of_reason) - max_listed
    if num_more > 0:
        print(f"  {num_more} more reasons, which -v names")
    volumes = []
    for case in cases:
        if case.record is not None and case.record.largest_vanished_ml:
            volumes.append((case.record.largest_vanished_ml, case.case_id))
    volumes.sort(reverse=True)
    vanished = [f"{case_id} ({volume:.3g} ml)" for volume, case_id in volumes]
    if vanished:
        print(f"  largest component that vanished: {listed(vanished, most=max_listed)}")
    for note in notes:
        print(for_terminal(f"  note: {note}"))
    if "failed" in states or "missing" in states:
        print(f"  run the same command with --continue for the rest{_parts_left(cases)}")


def _parts_left(cases: Sequence[CaseState]) -> str:
    """Return the numbers of the parts whose cases are not all done, as job arrays take them."""
    parts: dict[int, set[int]] = {}
    for case in cases:
        if case.state != "done" and case.num_parts > 1:
            parts.setdefault(case.num_parts, set()).add(case.part_id)
    texts = []
    for num_parts, part_ids in sorted(parts.items()):
        ranges: list[list[int]] = []
        for part_id in sorted(part_ids):
            if ranges and part_id == ranges[-1][1] + 1:
                ranges[-1][1] = part_id
            else:
                ranges.append([part_id, part_id])
        names = [f"{first}-{last}" if first < last else str(first) for first, last in ranges]
        texts.append(f": of {num_parts} parts these, --array={','.join(names)}")
    return "".join(texts)
