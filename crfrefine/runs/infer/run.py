"""The run of `crfrefine infer`: read one case ahead, refine, write and record.

`plan.py` finds out what there is to do. Nothing is printed here: an `Observer` receives the events.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from crfrefine.base.failures import describe_failure
from crfrefine.base.inputs import keeping_inputs
from crfrefine.base.text import counted
from crfrefine.errors import CrfRefineError, DeviceLostError, StorageError
from crfrefine.io.atomic import write_small_file
from crfrefine.runs.execution.records import Observer
from crfrefine.runs.infer.case_work import CaseInWork, finish_case, process_case, read_case
from crfrefine.runs.infer.options import InferenceOptions
from crfrefine.runs.infer.records import CaseRecord, RunSummary, note_on_num_labels

if TYPE_CHECKING:
    from crfrefine.runs.infer.plan import RunPlan

InferenceObserver = Observer[RunSummary, CaseRecord]


@keeping_inputs()
def run_inference(options: InferenceOptions, observer: InferenceObserver | None = None) -> RunSummary:
    """Refine the cases that the options name; a bad case is recorded and the others continue.

    Args:
        options: what to do.
        observer: receives the progress.

    Returns:
        A record of each case; `count("failed")` is 0 if no case failed.

    Raises:
        CrfRefineError: the run is impossible: no case, no device, no place to write.
        KeyboardInterrupt: passed on; a file that was being written is removed.
    """
    from crfrefine.runs.infer.plan import plan_run
    from crfrefine.runs.infer.store import RecordFile
    from crfrefine.runs.infer.structure_names import write_names

    options = options if options.dask is None else options.with_absolute_paths()
    observer = observer or Observer()
    plan, started = plan_run(options), time.perf_counter()
    summary = plan.summary
    observer.run_started(summary)
    for note in plan.notes:
        observer.note(note)
    if plan.names_file is not None:
        write_names(plan.names_file, plan.settings.structures)
    file = None if plan.record is None else RecordFile(plan.record, summary)
    try:
        with closing(_refine_here(plan, observer) if options.dask is None else _refine_on_cluster(plan, observer)) as records:
            for record in records:
                summary.cases.append(record)
                if file is not None and record.status != "skipped":
                    file.append(record)
                observer.case_ended(record)
                if record.failed_by(StorageError) or (options.fail_fast and record.failures):
                    break
        left = summary.num_cases - len(summary.cases)
        if left and any(record.failed_by(StorageError) for record in summary.cases):
            why = "nothing more can be written; run again with --continue when it can"
            observer.note(f"{counted(left, 'case')} not begun, since {why}")
        if (text := note_on_num_labels(summary.cases)) is not None:
            observer.note(text)
    except (KeyboardInterrupt, CrfRefineError):
        summary.interrupted = True
        raise
    finally:
        summary.seconds = time.perf_counter() - started
        order = {task.files.case_id: task.number for task in plan.tasks}
        summary.cases.sort(key=lambda record: order[record.case_id])
        with ExitStack() as ending:  # An error of one file, such as a full disk, does not keep the others from being written.
            ending.callback(observer.run_ended, summary)
            if options.summary is not None:
                ending.callback(lambda path: write_small_file(path, summary.to_json().encode()), options.summary)
            if file is not None:
                ending.callback(file.close)
    return summary


def _refine_here(plan: RunPlan, observer: InferenceObserver) -> Generator[CaseRecord]:
    """Yield the record of each case; a thread reads the next case while one is refined."""
    settings, tasks = plan.settings, iter(plan.tasks)
    reader = ThreadPoolExecutor(1, "read")

    def begin_to_read() -> Future[CaseInWork] | None:
        task = next(tasks, None)
        return None if task is None else reader.submit(read_case, settings, task)

    try:
        reading = begin_to_read()
        while reading is not None:
            if not reading.done():
                observer.stage_changed("", "reading")
            work, reading = reading.result(), begin_to_read()
            record = finish_case(settings, work, observer)
            del work  # Its arrays are freed before the next case is awaited.
            if record.failed_by(DeviceLostError) and settings.options.device == "auto" and settings.device != "cpu":
                settings = replace(settings, device="cpu")
                observer.note("the GPU stopped working: the other cases are computed on the CPU, as --device auto allows")
            yield record
    finally:
        reader.shutdown(wait=False, cancel_futures=True)


def _refine_on_cluster(plan: RunPlan, observer: InferenceObserver) -> Generator[CaseRecord]:
    """Yield the record of each case; a worker of a Dask cluster does it from its first file to its last."""
    from crfrefine.runs.execution.cluster import map_on_cluster

    address = plan.settings.options.dask
    assert address is not None
    with closing(map_on_cluster(address, partial(process_case, plan.settings), plan.tasks)) as outcomes:
        for task, outcome in outcomes:
            record = outcome if isinstance(outcome, CaseRecord) else CaseRecord(task.files.case_id)
            if isinstance(outcome, Exception):
                record.fail(describe_failure(outcome, *task.paths))
            observer.case_started(record.case_id, task.number)
            for note in record.notes if record.status != "skipped" else ():
                observer.note(note, case_id=record.case_id)
            yield record
