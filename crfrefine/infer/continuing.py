"""The cases that --continue leaves as earlier runs have done them, and why it repeats others."""

from __future__ import annotations

from collections.abc import Iterable

from crfrefine.base.notes import Note, NoteKind
from crfrefine.cases.case_files import CaseFiles
from crfrefine.infer.outputs import OutputFiles
from crfrefine.records.contents import time_of_change, times_of_strokes
from crfrefine.records.records import CaseRecord, RunSummary
from crfrefine.records.states import CaseState, RecordedRuns

REFINED_AGAIN = "refined again"
_OMIT = "skipped if it is complete; omit --continue to refine all cases again"
# What --continue does with a case, by the reason why it is not done, or by the doubt that it is.
CONSEQUENCES = {
    NoteKind.WITH_OTHER_VALUES: REFINED_AGAIN,
    NoteKind.WITH_OTHER_STROKES: REFINED_AGAIN,
    NoteKind.NO_RECORD: "skipped if it is complete, though other parameters may have made it",
    NoteKind.CHANGED: "skipped if it is complete, and its record left out",
    NoteKind.FROM_OTHER_INPUTS: _OMIT,
    NoteKind.BY_OTHER_VERSION: _OMIT,
}


def done_before(
    recorded: RecordedRuns,
    files_of_cases: Iterable[tuple[CaseFiles, OutputFiles]],
    now: RunSummary,
    notes: list[Note],
) -> tuple[dict[str, CaseRecord], list[Note]]:
    """Return the records of the cases that earlier runs have done, for --continue, and notes.

    The returned notes are on cases that are left as they are, although this run might give other
    results; all others are added to `notes`. Without a folder, only the files count.
    """
    done = {}
    cases_of_reason: dict[Note, list[str]] = {}
    for files, outputs in files_of_cases:
        case_id = files.case_id
        case = CaseState(recorded, case_id, outputs.label_map, outputs.all(), now)
        reason = case.reason
        # Contents tell more than the times of strokes, if they are recorded. A single file has no
        # record: only newer strokes show.
        drawn = times_of_strokes(files)
        has_other_strokes = False
        if case.record is not None:
            has_other_strokes = not case.record.contents and case.record.strokes != drawn
        elif recorded.folder is None:
            written = time_of_change(case.label_map) or ""
            has_other_strokes = any((time or "") > written for time in drawn.values())
        if case.state == "done" and has_other_strokes:
            reason = NoteKind.WITH_OTHER_STROKES()
        elif case.state == "done":
            done[case_id] = case.record or CaseRecord(case_id)
            if case.run is not None:
                if not done[case_id].contents and case.run.inputs != now.inputs:
                    reason = NoteKind.FROM_OTHER_INPUTS()
                elif case.run.version != now.version:
                    reason = NoteKind.BY_OTHER_VERSION()
        if reason is not None and reason.kind in CONSEQUENCES and recorded.folder is not None:
            cases_of_reason.setdefault(reason, []).append(case_id)
    notes += recorded.notes
    left = []
    for reason, names in cases_of_reason.items():
        consequence = CONSEQUENCES[reason.kind]
        note = NoteKind.EARLIER_RESULTS(
            cases=len(names),
            names=names,
            what=str(reason),
            consequence=consequence,
        )
        if consequence == REFINED_AGAIN:
            notes.append(note)
        else:
            left.append(note)
    return done, left
