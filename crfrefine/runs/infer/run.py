"""The folder run of `crfrefine infer`: read one case ahead, refine, write and record; `plan.py` finds out what there is to do.

Nothing is printed here: an `Observer` receives the events.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from crfrefine.base.failures import describe_failure, failing_alone
from crfrefine.base.inputs import keeping_inputs
from crfrefine.base.text import counted
from crfrefine.errors import CrfRefineError, DeviceLostError, StorageError
from crfrefine.runs.execution.records import Observer
from crfrefine.runs.infer.case_work import CaseInWork, Task, process_case, read_case, refine_case, write_case
from crfrefine.runs.infer.options import InferenceOptions
from crfrefine.runs.infer.records import CaseRecord, RunSummary, note_on_num_labels

if TYPE_CHECKING:
    from crfrefine.runs.infer.summary_writing import SummaryFile, SummaryLines


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
        KeyboardInterrupt: passed on, after the summary is saved; a file that was being written is removed.
    """
    return _Run(options, observer or Observer()).execute()


class _Run:
    """One call of `run_inference`."""

    def __init__(self, options: InferenceOptions, observer: InferenceObserver) -> None:
        from crfrefine.runs.infer.plan import plan_run
        from crfrefine.runs.infer.summary_writing import SummaryLines, summary_file

        options = self.options = options if options.dask is None else options.with_absolute_paths()
        self._observer = observer
        self._is_stopped = False
        plan = self._plan = plan_run(options)
        self._settings, self._tasks, self._summary = plan.settings, plan.tasks, plan.summary
        self._files: list[SummaryFile | SummaryLines] = []
        if plan.record is not None:
            self._files.append(SummaryLines(plan.record, plan.summary, append=plan.has_record))
        if options.summary is not None:
            self._files.append(summary_file(options.summary, plan.summary, resume=options.resume))

    def execute(self) -> RunSummary:
        """Refine the cases, here or on a Dask cluster."""
        from crfrefine.runs.infer.structure_names import write_names

        started = time.perf_counter()
        self._observer.run_started(self._summary)
        for note in self._plan.notes:
            self._observer.note(note)
        if self._plan.names_file is not None:
            write_names(self._plan.names_file, self._settings.structures)
        for file in self._files:
            file.save_first()
        try:
            if self.options.dask is None:
                self._refine_here()
            else:
                self._refine_on_cluster(self.options.dask)
            left = self._summary.num_cases - len(self._summary.cases)
            if left and any(record.failed_by(StorageError) for record in self._summary.cases):
                why = "nothing more can be written; run again with --continue when it can"
                self._observer.note(f"{counted(left, 'case')} not begun, since {why}")
            if (text := note_on_num_labels(record.kept or vars(record) for record in self._summary.cases)) is not None:
                self._observer.note(text)
        except (KeyboardInterrupt, CrfRefineError):
            self._summary.interrupted = True
            raise
        finally:
            self._summary.seconds = time.perf_counter() - started
            order = {task.files.case_id: task.number for task in self._tasks}
            self._summary.cases = sorted(self._summary.cases, key=lambda record: order[record.case_id])
            with ExitStack() as ending:  # An error of one file, such as a full disk, keeps none of the others from being written.
                ending.callback(self._observer.run_ended, self._summary)
                for file in self._files:
                    ending.callback(file.save_last)
        return self._summary

    def _refine_here(self) -> None:
        """Refine one case after the other; meanwhile a thread reads the next one."""
        tasks = iter(self._tasks)
        reader = ThreadPoolExecutor(1, "read")

        def begin_to_read() -> Future[CaseInWork] | None:
            task = next(tasks, None)
            return None if task is None else reader.submit(self._read, task)

        try:
            reading = begin_to_read()
            while reading is not None and not self._is_stopped:
                if not reading.done():
                    self._observer.stage_changed("", "reading")
                work, reading = reading.result(), begin_to_read()
                if work.case is not None:
                    self._refine(work)
                self._finish(work.record)
                del work  # Its arrays are freed before the next case is awaited.
        finally:
            reader.shutdown(wait=False, cancel_futures=True)

    def _read(self, task: Task) -> CaseInWork:
        """Read a case; a case that is skipped or failed has no arrays then. Runs in the reading thread."""
        work = CaseInWork(task, CaseRecord(task.files.case_id))
        with failing_alone(work.record.fail, *task.paths):
            read_case(self._settings, work)
        return work

    def _refine(self, work: CaseInWork) -> None:
        """Run the CRF on a case that was read, and write the result."""
        record, observer = work.record, self._observer
        observer.case_started(record.case_id, work.task.number)
        self._tell_notes(record)
        with failing_alone(record.fail, *work.task.paths):
            note = partial(observer.note, case_id=record.case_id)
            refine_case(self._settings, work, progress=partial(observer.stage_changed, record.case_id), note=note)
        if work.refined is not None:
            with failing_alone(record.fail):
                write_case(self._settings, work)
        if record.failed_by(DeviceLostError) and self.options.device == "auto" and self._settings.device != "cpu":
            self._settings = replace(self._settings, device="cpu")
            observer.note("the GPU stopped working: the other cases are computed on the CPU, as --device auto allows")

    def _refine_on_cluster(self, address: str) -> None:
        """Refine each case on a worker of a Dask cluster, from its first file to its last."""
        from crfrefine.runs.execution.cluster import map_on_cluster

        with closing(map_on_cluster(address, partial(process_case, self._settings), self._tasks)) as outcomes:
            for task, outcome in outcomes:
                record = outcome if isinstance(outcome, CaseRecord) else CaseRecord(task.files.case_id)
                if isinstance(outcome, Exception):
                    record.fail(describe_failure(outcome, *task.paths))
                self._observer.case_started(record.case_id, task.number)
                if record.status != "skipped":
                    self._tell_notes(record)
                self._finish(record)
                if self._is_stopped:
                    return

    def _finish(self, record: CaseRecord) -> None:
        self._summary.cases.append(record)
        for file in self._files:
            file.case_ended(record)
        self._observer.case_ended(record)
        self._is_stopped |= record.failed_by(StorageError) or (self.options.fail_fast and bool(record.failures))

    def _tell_notes(self, record: CaseRecord) -> None:
        for note in record.notes:
            self._observer.note(note, case_id=record.case_id)
