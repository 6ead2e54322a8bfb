"""The run of `crfrefine evaluate`: pair the cases, reuse what is known, measure the rest in processes, write what was found."""

from __future__ import annotations

import time
from contextlib import closing
from typing import TYPE_CHECKING

from crfrefine.errors import CrfRefineError
from crfrefine.evaluate.measuring import Job, measure_pair
from crfrefine.evaluate.observer import EvaluationObserver
from crfrefine.evaluate.options import EvaluationOptions, check_options
from crfrefine.evaluate.outputs import CASES_NAME, REPORT_NAME, write_html, write_tables
from crfrefine.evaluate.pairing import CasePair, pair_cases
from crfrefine.evaluate.records import CaseResult, Settings, fingerprint, from_json, to_json
from crfrefine.evaluate.regions import plan_regions
from crfrefine.evaluate.results import Evaluation
from crfrefine.execution.processes import Lost, map_in_processes
from crfrefine.failures import Failure
from crfrefine.io.atomic import atomic_file, check_replaceable, check_writable, remove_file
from crfrefine.threads import available_threads

if TYPE_CHECKING:
    from pathlib import Path


class StoppedError(CrfRefineError):
    """A case failed, and the run was to stop at the first one that does."""


def run_evaluation(options: EvaluationOptions, observer: EvaluationObserver | None = None) -> Evaluation:
    """Measure all cases, compare the methods, and write the results into the output folder.

    Args:
        options: what to do.
        observer: told of the progress.

    Returns:
        What was found; `num_failed` tells whether all is well.

    Raises:
        CrfRefineError: nothing can be done at all: no case, options that contradict each other, no place to write; or a case failed with
            `fail_fast`.
        KeyboardInterrupt: passed on; what was measured until then is kept for `resume`.
    """
    started = time.perf_counter()
    observer = observer or EvaluationObserver()
    check_options(options)
    plan = plan_regions(options.regions, options.labels, options.ignore_label)
    pairing = pair_cases(options)
    settings = Settings(plan, options.tolerance_mm)
    notes = (*plan.notes, *pairing.notes)
    num_processes = min(options.processes or available_threads(), len(pairing.cases))
    run = _Run(options, settings, observer)
    evaluation = Evaluation(options, settings, pairing.cases, (), notes, num_processes, left_out=pairing.left_out)
    left_out = (evaluation.left_out_text,) if pairing.left_out else ()
    evaluation.results = run.measure(pairing.cases, num_processes, (*left_out, *notes))
    observer.stage_started("comparing")
    if evaluation.table.cases:
        _ = evaluation.summary, evaluation.verdict
    evaluation.seconds = time.perf_counter() - started
    write_tables(evaluation)
    if options.report and evaluation.table.cases:
        observer.stage_started("writing the report")
        write_html(evaluation, observer.stage_progressed, observer.note)
        evaluation.has_report = True
    elif (options.output / REPORT_NAME).exists():
        observer.note(f"{options.output / REPORT_NAME} is of an earlier run")
    return evaluation


class _Run:
    """The cases of a run, each kept in a file of its own as soon as it is measured."""

    def __init__(self, options: EvaluationOptions, settings: Settings, observer: EvaluationObserver) -> None:
        self._options = options
        self._settings = settings
        self._observer = observer
        self._folder = options.output / CASES_NAME
        check_writable(self._folder)

    def measure(self, pairs: tuple[CasePair, ...], num_processes: int, notes: tuple[str, ...]) -> list[CaseResult]:
        """Return the results, in the order of the cases."""
        for pair in pairs:
            check_replaceable(self._file_of(pair))
        found: dict[str, CaseResult] = {}
        for pair in pairs if self._options.resume else ():
            known = self._known(pair)
            if known is not None:
                found[pair.case_id] = known
        self._observer.run_started(len(pairs), num_processes, len(found))
        for note in notes:
            self._observer.note(note)
        for result in found.values():
            self._observer.case_ended(result)
        jobs = [Job(pair, self._settings) for pair in pairs if pair.case_id not in found]
        with closing(map_in_processes(measure_pair, jobs, num_processes)) as outcomes:
            for job, outcome in outcomes:
                result = _lost(job.pair, outcome) if isinstance(outcome, Lost) else outcome
                self._keep(job.pair, result)
                found[result.case_id] = result
                self._observer.case_ended(result)
                if result.problems and self._options.fail_fast:
                    raise StoppedError(f"stopped at case {result.case_id!r} (--fail-fast): {result.problems[0].message}")
        return [found[pair.case_id] for pair in pairs]

    def _known(self, pair: CasePair) -> CaseResult | None:
        try:
            return from_json(self._file_of(pair), fingerprint(pair, self._settings))
        except (CrfRefineError, OSError):
            return None

    def _keep(self, pair: CasePair, result: CaseResult) -> None:
        """Write what was measured, or take away what an earlier run wrote if it failed now."""
        try:
            identity = None if result.problems else fingerprint(pair, self._settings)
        except (CrfRefineError, OSError):
            identity = None  # The files changed while they were read.
        if identity is None:
            remove_file(self._file_of(pair))
        else:
            with atomic_file(self._file_of(pair)) as file:
                file.write(to_json(result, identity))

    def _file_of(self, pair: CasePair) -> Path:
        return self._folder / f"{pair.case_id}.json"


def _lost(pair: CasePair, lost: Lost) -> CaseResult:
    result = CaseResult(pair.case_id)
    result.fail(Failure(str(lost), "InputError"))
    return result
