"""The run of `crfrefine evaluate`: pair the cases, measure them in processes, write the results."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from itertools import chain
from operator import itemgetter

from crfrefine.base.failures import Failure
from crfrefine.base.inputs import keeping_inputs
from crfrefine.base.limits import available_threads
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import printable
from crfrefine.errors import InputError
from crfrefine.evaluate.checks import check_options
from crfrefine.evaluate.contents import lesions_csv, make_summary, metrics_csv
from crfrefine.evaluate.evaluation import Evaluation, EvaluationObserver
from crfrefine.evaluate.measured import CasePair
from crfrefine.evaluate.measuring import CaseResult, measure_pair
from crfrefine.evaluate.numbering import (
    notes_on_copies,
    notes_on_mapping,
    notes_on_names,
    notes_on_numbers,
)
from crfrefine.evaluate.options import (
    LESIONS_NAME,
    METRICS_NAME,
    REPORT_NAME,
    SUMMARY_NAME,
    EvaluationOptions,
)
from crfrefine.evaluate.pairing import pair_cases
from crfrefine.evaluate.processes import map_in_processes
from crfrefine.evaluate.roles import tell_roles
from crfrefine.evaluate.sentences import judge, learned_text
from crfrefine.io.json import to_json
from crfrefine.io.paths import add_volumes, stem_of
from crfrefine.io.writing import check_replaceable, check_writable, write_small_file
from crfrefine.parameters.model import TRAINED_ON
from crfrefine.records.states import read_records


@keeping_inputs()
def run_evaluation(
    options: EvaluationOptions, observer: EvaluationObserver | None = None
) -> Evaluation:
    """Measure all cases, compare the methods, and write the results.

    Raise CrfRefineError if the cases cannot be measured or the results cannot be written.
    """
    started = time.perf_counter()
    observer = observer or EvaluationObserver()
    check_options(options)
    evaluation = pair_cases(options)
    add_volumes(*options.inputs)
    for pair in evaluation.pairs:
        add_volumes(*pair.paths)
    names = [METRICS_NAME, SUMMARY_NAME]
    if options.lesions is not None:
        names.append(LESIONS_NAME)
    if options.report:
        names.append(REPORT_NAME)
    for name in names:
        check_replaceable(options.output / name)
    evaluation.num_processes = min(options.processes or available_threads(), len(evaluation.pairs))
    _measure(evaluation, observer)

    observer.stage_changed("", "comparing")
    evaluation.verdict = judge(evaluation)
    evaluation.seconds = time.perf_counter() - started

    contents = {
        METRICS_NAME: metrics_csv(evaluation.full_table),
        SUMMARY_NAME: to_json(make_summary(evaluation), indent=2),
    }
    if options.lesions is not None:
        contents[LESIONS_NAME] = lesions_csv(evaluation)
    for name in sorted(contents, key=lambda name: name == SUMMARY_NAME):  # the summary last
        write_small_file(options.output / name, contents[name].encode())
    evaluation.written += [options.output / name for name in contents]
    if options.report and evaluation.table.cases:
        from crfrefine.evaluate.report import write_report  # It imports jinja2.

        observer.stage_changed("", "writing the report")
        write_report(options.output / REPORT_NAME, evaluation, observer)
        evaluation.written.append(options.output / REPORT_NAME)
    for name in (LESIONS_NAME, REPORT_NAME):
        path = options.output / name
        if path not in evaluation.written and path.exists():
            observer.note(NoteKind.EARLIER_REPORT(path=str(path)))
    observer.run_ended(evaluation)
    return evaluation


def _measure(evaluation: Evaluation, observer: EvaluationObserver) -> None:
    """Measure all cases, and note what their files show.

    Facts that are known before the first case are noted then.
    """
    evaluation.refined, evaluation.learned = find_refined(evaluation.pairs, evaluation.notes)
    if evaluation.learned:
        evaluation.notes.append(NoteKind.MEASURED_ON_LEARNED(learned=learned_text(evaluation)))
    check_writable(evaluation.options.output)
    for text in evaluation.found:
        observer.cases_found(text)
    observer.run_started(evaluation)
    tell_roles(evaluation, observer)
    note_on_left_out = evaluation.note_on_left_out
    if note_on_left_out is not None:
        observer.note(note_on_left_out)
    for note in evaluation.notes:
        observer.note(note)

    results = {}
    measure = partial(measure_pair, evaluation.measured)
    outcomes = map_in_processes(measure, evaluation.pairs, evaluation.num_processes)
    with closing(outcomes):
        for pair, outcome in outcomes:
            if isinstance(outcome, Failure):
                result = CaseResult(pair.case_id)
                result.fail(outcome)
            else:
                result = outcome
            results[pair.case_id] = result
            observer.case_ended(result)
            if result.failures and evaluation.options.fail_fast:
                raise InputError(
                    f"stopped at case {result.case_id!r} (--fail-fast): "
                    f"{result.failures[0].message}"
                )
    evaluation.results = [results[pair.case_id] for pair in evaluation.pairs]
    for notes_on in (notes_on_mapping, notes_on_names, notes_on_numbers, notes_on_copies):
        for note in notes_on(evaluation.results, evaluation.measured):
            observer.note(note)
            evaluation.notes.append(note)


def find_refined(
    pairs: Sequence[CasePair], notes: list[Note]
) -> tuple[set[str], dict[str, list[str]]]:
    """Return the methods that are refinements, and by method the cases it was learned on.

    The records that `infer` leaves in its output folder name them. A method without a record is in
    neither, and one without such cases not in the second.
    """
    label_maps = {}
    for pair in pairs:
        for method in pair.methods:
            path = pair.label_map_of(method)
            if path is not None:
                label_maps[method, pair.case_id] = path

    # By time, the label maps in records, and whether their parameters were learned on their case. A
    # manifest puts label maps into folders within that of the record.
    written = []
    for folder in dict.fromkeys(chain(*(path.parents for path in label_maps.values()))):
        recorded = read_records(folder)
        notes += [NoteKind.MAYBE_LEARNED(problem=str(note)) for note in recorded.notes]
        for run in recorded.runs:
            trained_on = run.parameters.get(TRAINED_ON) or ()
            for record in run.cases:
                if record.output is None:
                    continue
                # Its folder may have been moved, and so the name in it counts.
                path = folder / run.all_cases.get(record.case_id, record.output.name)
                is_known = printable(record.case_id) in trained_on and record.held_out_by is None
                written.append((run.started, path.parent / stem_of(path), is_known))
    written.sort(key=itemgetter(0))
    is_learned = {path: is_known for _, path, is_known in written}  # The latest run counts.
    refined = set()
    learned: dict[str, list[str]] = {}
    for (method, case_id), path in label_maps.items():
        if path in is_learned:
            refined.add(method)
        if is_learned.get(path):
            learned.setdefault(method, []).append(case_id)
    return refined, learned
