"""The run of `crfrefine infer`: cases in flight, or sent to a Dask cluster; each is recorded."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from typing import Any

from crfrefine.base.inputs import keeping_inputs
from crfrefine.base.notes import NoteKind
from crfrefine.cases.role_table import tell_roles
from crfrefine.errors import CrfRefineError, StorageError
from crfrefine.infer.case_work import refine_case
from crfrefine.infer.in_flight import CasesInFlight
from crfrefine.infer.options import InferenceOptions
from crfrefine.infer.plan import RunPlan
from crfrefine.io.json import add_lines
from crfrefine.io.writing import write_small_file
from crfrefine.records.records import RunObserver, RunSummary, notes_on_cases


@keeping_inputs()
def run_inference(options: InferenceOptions, observer: RunObserver | None = None) -> RunSummary:
    """Refine the cases that the options name; a bad case is recorded and the others continue.

    Raises CrfRefineError if the run is impossible: no case, no device, no place to write.
    Interrupts are passed on.
    """
    if options.dask is not None:  # Workers run in other folders.
        options = options.with_absolute_paths()
    observer = observer or RunObserver()
    plan = RunPlan(options)
    started = time.perf_counter()
    summary = plan.summary
    if options.choice is None:  # A choice of parameters has shown them.
        observer.cases_found(plan.inputs.cases.found)
    observer.run_started(summary)
    tell_roles(plan.inputs.cases, plan.inputs.reading, observer)
    for note in plan.notes:
        observer.note(note)
    for path, content in plan.folder_files:
        write_small_file(path, content)
    run = {"run": uuid.uuid4().hex[:12]}  # of each line of the record
    waiting: list[Mapping[str, Any]] = []  # lines that the disk has not taken
    if plan.record_file is not None:
        waiting.append({**run, **summary.head()})
        add_lines(plan.record_file, waiting)
    try:
        _run_cases(plan, observer, run, waiting)
    except (KeyboardInterrupt, CrfRefineError):
        summary.interrupted = True
        raise
    finally:
        summary.seconds = time.perf_counter() - started
        order = {task.files.case_id: number for number, task in enumerate(plan.tasks)}
        summary.cases.sort(key=lambda record: order[record.case_id])
        # An error of one file, such as a full disk, does not keep the others from being written.
        with ExitStack() as ending:
            ending.callback(observer.run_ended, summary)
            if plan.summary_file is not None:
                content = summary.to_json().encode()
                ending.callback(write_small_file, plan.summary_file, content)
            if plan.statistics_file is not None and summary.cases:
                from crfrefine.infer.label_statistics import statistics_csv

                table = statistics_csv(plan).encode()
                ending.callback(write_small_file, plan.statistics_file, table)
            if plan.record_file is not None and waiting:
                ending.callback(add_lines, plan.record_file, waiting)
    return summary


def _run_cases(
    plan: RunPlan,
    observer: RunObserver,
    run: Mapping[str, Any],
    waiting: list[Mapping[str, Any]],
) -> None:
    """Refine the cases, record each one when it ends, and tell the notes on all of them.

    The lines of the record have the entries of `run`; lines that the disk does not take stay in
    `waiting`. A full disk ends the run, and with --fail-fast any failure.
    """
    options = plan.options
    summary = plan.summary
    if options.dask is not None:
        from crfrefine.infer.cluster import records_of_cluster

        records = records_of_cluster(plan.tasks, options.dask)
    else:
        records = CasesInFlight(plan.tasks, options, summary.device).records(refine_case, observer)
    is_full = False
    with closing(records):
        for record in records:
            # A case that could not be read has nothing to say beside its failure.
            if record.status != "skipped" and "read" in record.times:
                for note in record.notes:
                    observer.note(note, case_id=record.case_id)
            summary.cases.append(record)
            if plan.record_file is not None and record.status != "skipped":
                waiting.append({**run, **record.to_dict()})
                # The line is written with the next one; the end of the run reports the error.
                with suppress(CrfRefineError):
                    add_lines(plan.record_file, waiting)
            observer.case_ended(record)
            if record.failures:
                is_full = record.has_failed_by(StorageError)
                if is_full or options.fail_fast:
                    break
    num_left = summary.num_cases - len(summary.cases)
    if is_full and num_left:
        observer.note(NoteKind.DISK_FULL(cases=num_left))
    for note in (*notes_on_cases(summary.cases, plan.inputs.reading.mapping), *plan.notes_at_end):
        observer.note(note)
