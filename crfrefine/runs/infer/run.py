"""The folder run of `crfrefine infer`: read ahead, refine, write behind, and record each case; `plan.py` finds out what there is to do.

Nothing is printed here: an `Observer` receives the events.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from crfrefine.base.failures import Failure, describe_failure, failing_alone
from crfrefine.base.inputs import keeping_inputs
from crfrefine.base.memory import memory_limit
from crfrefine.base.text import counted
from crfrefine.errors import CrfRefineError, DeviceLostError, StorageError
from crfrefine.runs.execution.read_ahead import Admit, ReadAhead
from crfrefine.runs.execution.records import Observer
from crfrefine.runs.infer.case_work import CaseInWork, Task, process_case, read_case, refine_case, write_case
from crfrefine.runs.infer.options import InferenceOptions
from crfrefine.runs.infer.records import CaseRecord, RunSummary, note_on_num_labels

if TYPE_CHECKING:
    from collections.abc import Generator

    from crfrefine.runs.execution.executor import Outcome
    from crfrefine.runs.infer.summary_writing import SummaryFile, SummaryLines


InferenceObserver = Observer[RunSummary, CaseRecord]

MOST_READERS = 4
"""Cases that are read ahead where reading is the bottleneck."""
SHARE_OF_CASES_AHEAD = 8
"""They take an eighth of the memory that the run may take, at most."""


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
        KeyboardInterrupt: passed on, after the file being written is finished and the summary is saved.
    """
    return _Run(options, observer or Observer()).execute()


class _Run:
    """One call of `run_inference`."""

    def __init__(self, options: InferenceOptions, observer: InferenceObserver) -> None:
        from crfrefine.runs.infer.plan import plan_run
        from crfrefine.runs.infer.summary_writing import SummaryLines, summary_file

        self.options = options
        self._observer = observer
        self._lock = threading.Lock()
        self._stop = threading.Event()
        plan = self._plan = plan_run(options)
        self._notes = list(plan.notes)
        self._settings, self._tasks, self._summary = plan.settings, plan.tasks, plan.summary
        self._files: list[SummaryFile | SummaryLines] = []
        if plan.record is not None:
            self._files.append(SummaryLines(plan.record, plan.summary, append=plan.has_record))
        if options.summary is not None:
            self._files.append(summary_file(options.summary, plan.summary, resume=options.resume))

    def execute(self) -> RunSummary:
        """Refine the cases: read the next while one is computed and the last is written; or elsewhere, as the options say."""
        is_cluster, has_timeout = self.options.placement.is_cluster, self.options.placement.case_timeout is not None
        is_on_gpus = self._plan.devices[0].startswith("cuda") and not is_cluster
        if len(self._plan.devices) > 1 or (is_on_gpus and has_timeout):
            return self._execute_on_devices()
        if not is_cluster and not has_timeout:
            return self._execute(self._execute_here)
        from crfrefine.runs.execution.factory import make_executor  # Pipes and processes take time to import.

        placement = replace(
            self.options.placement,
            threads=self.options.threads,
            max_memory=self.options.max_memory,
            one_per_device=self._summary.device != "cpu",
        )
        with make_executor(1, placement, writes_files=True) as executor:
            for warning in executor.warnings:
                self._tell(self._observer.warning, warning)
            self._summary.threads = executor.threads_per_item or self._summary.threads
            work = partial(process_case, self._settings)
            return self._execute(lambda: self._record_all(executor.map(work, self._tasks, self._case_started, self._stops)))

    def _execute_here(self) -> None:
        """Refine the cases in this process."""
        limit = memory_limit(self.options.max_memory)
        pipeline(
            self._tasks,
            self._read,
            self._refine,
            self._write,
            stop=self._stop,
            waiting=lambda stage: self._tell(self._observer.stage_changed, "", stage, 0, 0),
            most_readers=min(MOST_READERS, self._summary.threads) if limit.is_known else 1,
            most_bytes=limit.bytes // SHARE_OF_CASES_AHEAD,
        )

    def _execute_on_devices(self) -> RunSummary:
        """Refine the cases on GPUs with a process each."""
        from crfrefine.runs.infer.device_work import DeviceWork, device_processes

        fallback = "cpu" if self.options.device == "auto" else None
        processes, self._summary.threads = device_processes(
            self._plan.devices[: max(1, len(self._tasks))], self.options, fallback=fallback, note=partial(self._tell, self._observer.note)
        )
        work = DeviceWork(self._settings)

        def is_device_lost(record: CaseRecord | None) -> bool:
            return record is not None and record.failed_by(DeviceLostError)

        return self._execute(lambda: self._record_all(processes.map(work, self._tasks, self._case_started, is_device_lost, self._stops)))

    def _execute(self, run: Callable[[], None]) -> RunSummary:
        from crfrefine.runs.infer.structure_names import write_names

        started = time.perf_counter()
        self._tell(self._observer.run_started, self._summary)
        for note in self._notes:
            self._tell(self._observer.note, note)
        if self._plan.names_file is not None:
            write_names(self._plan.names_file, self._settings.structures)
        for file in self._files:
            file.save_first()
        try:
            run()
            left = self._summary.num_cases - len(self._summary.cases)
            if left and any(record.failed_by(StorageError) for record in self._summary.cases):
                why = "nothing more can be written; run again with --continue when it can"
                self._tell(self._observer.note, f"{counted(left, 'case')} not begun, since {why}")
            if (text := note_on_num_labels(record.kept or vars(record) for record in self._summary.cases)) is not None:
                self._tell(self._observer.note, text)
        except (KeyboardInterrupt, CrfRefineError):
            self._summary.interrupted = True
            raise
        finally:
            self._summary.seconds = time.perf_counter() - started
            order = {task.files.case_id: task.number for task in self._tasks}
            self._summary.cases = sorted(self._summary.cases, key=lambda record: order[record.case_id])
            with ExitStack() as ending:  # An error of one file, such as a full disk, keeps none of the others from being written.
                ending.callback(self._tell, self._observer.run_ended, self._summary)
                for file in self._files:
                    ending.callback(file.save_last)
        return self._summary

    def _read(self, task: Task, admit: Admit) -> CaseInWork | None:
        """Read a case; None: it is skipped, or failed, and recorded. Runs in the reading threads."""
        work = CaseInWork(task, CaseRecord(task.files.case_id))
        with self._work_on(work):
            read_case(self._settings, work, admit)
        if work.case is not None:
            return work
        self._finish(work.record)
        return None

    def _refine(self, work: CaseInWork) -> CaseInWork | None:
        """Run the CRF on a case; None: it failed and is recorded."""
        record = work.record
        self._case_started(work.task)
        for note in record.notes:
            self._note(record, note)
        progress = partial(self._tell, self._observer.stage_changed, record.case_id)
        with self._work_on(work):
            refine_case(self._settings, work, progress=progress, note=partial(self._note, record))
        if work.refined is not None:
            return work
        self._finish(record)
        return None

    def _write(self, work: CaseInWork) -> None:
        """Write a case and close its record. Runs in the writing thread."""
        with self._work_on(work):
            write_case(self._settings, work)
        self._finish(work.record)

    def _record_all(self, outcomes: Generator[tuple[Task, Outcome[CaseRecord | None]]]) -> None:
        """Record cases that are refined in other processes or on other machines, each on its own from its first file to its last."""
        with closing(outcomes):
            for task, outcome in outcomes:
                record = outcome.result or CaseRecord(task.files.case_id)
                if outcome.error is not None:
                    record.fail(describe_failure(outcome.error, *task.paths))
                for note in record.notes if record.status != "skipped" else ():
                    self._note(record, note)
                self._finish(record)

    def _stops(self, outcome: Outcome[CaseRecord | None]) -> bool:
        """Return whether no further case is begun after one; those that are computed elsewhere are finished, since they write files."""
        if outcome.failure is not None:
            return self._ends_run(outcome.failure)
        return outcome.result is not None and any(map(self._ends_run, outcome.result.failures))

    def _ends_run(self, failure: Failure) -> bool:
        """Return whether no further case is begun after a failure."""
        return self.options.fail_fast or failure.kind == StorageError.__name__

    def _case_started(self, task: Task) -> None:
        self._tell(self._observer.case_started, task.files.case_id, task.number)

    def _work_on(self, work: CaseInWork) -> AbstractContextManager[None]:
        """Return the context for every part of the processing of a case: an error in it fails only this case."""

        def fail(failure: Failure) -> None:
            work.record.fail(failure)
            if failure.kind == DeviceLostError.__name__ and self.options.device == "auto" and self._settings.device != "cpu":
                self._settings = replace(self._settings, device="cpu")
                from crfrefine.runs.infer.device_work import ON_CPU_NOW

                self._tell(self._observer.note, ON_CPU_NOW)
            if self._ends_run(failure):
                self._stop.set()

        return failing_alone(fail, *(work.task.paths if work.refined is None else ()))

    def _finish(self, record: CaseRecord) -> None:
        self._summary.cases.append(record)
        for file in self._files:
            file.case_ended(record)
        self._tell(self._observer.case_ended, record)

    def _note(self, record: CaseRecord, text: str) -> None:
        self._tell(self._observer.note, text, case_id=record.case_id)

    def _tell(self, method: Callable[..., None], *arguments: object, **named: object) -> None:
        with self._lock:
            method(*arguments, **named)


# A pipeline of three stages: the next items are read while one is computed and the previous one is written.
# Few items are in memory: those that `ReadAhead` allows, one that is computed and one that is being written.

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
Computed = TypeVar("Computed")


def pipeline(
    items: Iterable[Item],
    read: Callable[[Item, Admit], Loaded | None],
    compute: Callable[[Loaded], Computed | None],
    write: Callable[[Computed], None],
    *,
    stop: threading.Event,
    waiting: Callable[[str], None],
    most_readers: int = 1,
    most_bytes: int = 0,
) -> None:
    """Run the items through the stages; a stage that returns None ends the processing of its item.

    Args:
        items: in the order in which they are read.
        read: the first stage, in other threads.
        compute: the second one, in the caller's thread.
        write: the last one, in a separate thread. An item that it has begun is finished, even after an interrupt.
        stop: when set, no further item is started.
        waiting: called with "reading" or "writing" while computing waits for it.
        most_readers: items that may be read ahead; more than one only where reading is the bottleneck.
        most_bytes: what they may take together; see `ReadAhead`.
    """

    def wait_for(writing: Future[None]) -> None:
        if not writing.done():
            waiting("writing")
        writing.result()

    writer = ThreadPoolExecutor(1, "write")
    ahead = ReadAhead(items, read, stop, most_readers=most_readers, most_bytes=most_bytes)
    try:
        # Start the thread before there is anything to interrupt: an exception while it starts would lose it, and the pool would not
        # wait for the file that it writes.
        writer.submit(int).result()
        writing: Future[None] | None = None
        ahead.start()
        while (loaded := ahead.take(partial(waiting, "reading"))) is not None and not stop.is_set():
            computed = compute(loaded)
            del loaded  # free it while waiting for the next item
            if writing is not None:
                wait_for(writing)
            writing = None if computed is None else writer.submit(write, computed)
            del computed
        if writing is not None:
            wait_for(writing)
        ahead.close(waits=True)
    finally:
        ahead.close(waits=False)
        writer.shutdown(wait=True)
