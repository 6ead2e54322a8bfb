"""The run of `crfrefine evaluate`: pair the cases, measure them in processes, write the results."""

from __future__ import annotations

import time
from contextlib import closing

from crfrefine.base.failures import Failure
from crfrefine.base.inputs import keeping_inputs
from crfrefine.base.threads import available_threads
from crfrefine.cases.dataset_description import read_descriptions
from crfrefine.cases.reading_options import RegionReading, find_regions
from crfrefine.errors import CrfRefineError
from crfrefine.evaluate.learned import cases_learned_on
from crfrefine.evaluate.measuring import measure_pair
from crfrefine.evaluate.options import METRICS_NAME, REPORT_NAME, SUMMARY_NAME, EvaluationOptions, check_options
from crfrefine.evaluate.outputs import write_html, write_tables
from crfrefine.evaluate.pairing import pair_cases
from crfrefine.evaluate.processes import map_in_processes
from crfrefine.evaluate.records import CaseResult, Job, Settings
from crfrefine.evaluate.regions import plan_regions
from crfrefine.evaluate.results import Evaluation, EvaluationObserver
from crfrefine.evaluate.structures import has_structures, pair_structures
from crfrefine.io.atomic import check_replaceable, check_writable
from crfrefine.io.recognition import add_volumes


class StoppedError(CrfRefineError):
    """A case failed, and the run stops at the first failure."""


@keeping_inputs()
def run_evaluation(options: EvaluationOptions, observer: EvaluationObserver | None = None) -> Evaluation:
    """Measure all cases, compare the methods, and write the results into the output folder.

    Raises:
        CrfRefineError: the run is impossible (no case, contradictory options, no place to write), or a case failed with `fail_fast`.
        KeyboardInterrupt: passed on; nothing is written.
    """
    started = time.perf_counter()
    observer = observer or EvaluationObserver()
    check_options(options)
    plan = plan_regions(options.regions, options.labels, options.ignore_label)
    pairing = pair_structures(options) if has_structures(options) else pair_cases(options)
    add_volumes(*options.inputs, *(path for pair in pairing.cases for path in pair.paths))
    for name in (METRICS_NAME, SUMMARY_NAME, *([REPORT_NAME] if options.report else [])):
        check_replaceable(options.output / name)
    plan = plan.with_structures(pairing.structures)
    notes = [*plan.notes, *pairing.notes]
    settings = Settings(plan, options.tolerance_mm, options.resample, _channels(options, notes))
    num_processes = min(options.processes or available_threads(), len(pairing.cases))
    learned = cases_learned_on(pairing.cases, notes)
    evaluation = Evaluation(options, settings, pairing.cases, (), notes, num_processes, left_out=pairing.left_out, learned=learned)
    if learned:
        others = len(pairing.cases) - len({case for cases in learned.values() for case in cases})
        over = f"; means and charts are over the other {others}, {METRICS_NAME} has all" if others else ""
        notes.append(evaluation.learned_text + over)
    _measure(evaluation, observer)
    observer.stage_changed("", "comparing")
    if evaluation.table.cases:
        _ = evaluation.summary, evaluation.verdict
    evaluation.seconds = time.perf_counter() - started
    write_tables(evaluation)
    if options.report and evaluation.table.cases:
        observer.stage_changed("", "writing the report")
        write_html(evaluation, lambda case_id, number, total: observer.stage_changed(case_id, "report", number, total), observer.note)
        evaluation.has_report = True
    elif (options.output / REPORT_NAME).exists():
        observer.note(f"{options.output / REPORT_NAME} is from an earlier run")
    observer.run_ended(evaluation)
    return evaluation


def _channels(options: EvaluationOptions, notes: list[str]) -> dict[str, RegionReading]:
    """Return which channels of each method's files are regions: as the `dataset.json` beside them says, or that of the reference.

    One that cannot be read is noted.
    """
    named = dict(options.probabilities)
    places = {name: (named.get(name, folder), folder, options.labels) for name, folder in options.methods.items()}
    found = {}
    for name, paths in places.items():
        own: list[str] = []
        found[name] = find_regions(None, read_descriptions([path if path.is_dir() else path.parent for path in paths], own))
        notes += [note for note in own if note not in notes]
    return found


def _measure(evaluation: Evaluation, observer: EvaluationObserver) -> None:
    """Fill in the results of the evaluation, in the order of the cases."""
    check_writable(evaluation.options.output)
    jobs = [Job(pair, evaluation.settings) for pair in evaluation.pairs]
    observer.run_started(evaluation)
    for note in (*([evaluation.left_out_text] if evaluation.left_out else []), *evaluation.notes):
        observer.note(note)
    found = {}
    with closing(map_in_processes(measure_pair, jobs, evaluation.num_processes)) as outcomes:
        for job, outcome in outcomes:
            result = outcome if isinstance(outcome, CaseResult) else CaseResult(job.case_id)
            if isinstance(outcome, Failure):
                result.fail(outcome)
            found[job.case_id] = result
            observer.case_ended(result)
            if result.failures and evaluation.options.fail_fast:
                raise StoppedError(f"stopped at case {result.case_id!r} (--fail-fast): {result.failures[0].message}")
    evaluation.results = [found[job.case_id] for job in jobs]
