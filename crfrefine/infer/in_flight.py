"""Cases of a run side by side, each with its share of the threads, while memory allows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import suppress

from crfrefine.base.limits import available_threads, memory_left, thread_pool
from crfrefine.base.notes import NoteKind
from crfrefine.errors import DeviceLostError
from crfrefine.infer.options import InferenceOptions
from crfrefine.infer.plan import Task
from crfrefine.io.writing import naming_after
from crfrefine.records.records import CaseRecord, RunObserver

Stage = tuple[str, int, int]  # its name, its step and the number of steps
SECONDS_BETWEEN_STAGES = 0.2  # after which the shown stage is looked at again


class RunIsOverError(BaseException):
    """Ends a case in work after the run was interrupted; no error of the case, so not recorded."""


class BeginAgainError(BaseException):
    """Ends a case in work that gives its memory to another one, or lacks it beside others.

    It is begun again, and so this is not recorded.
    """


class CaseInFlight:
    """A case, and its share of the places, memory and threads that the cases of a run share.

    A case computes only in a place; a run has `num_jobs` places. Places and memory are given to
    the cases in their order. A case ends at its next stage if the run is over, or another case
    needs its memory. A case that takes more memory than there is runs by itself, as it would
    without others.
    """

    def __init__(self, task: Task, number: int, run: CasesInFlight) -> None:
        self.task = task
        self.device = ""  # as `get_backend` takes it
        self.input_bytes = 0  # of memory that its input takes, by an estimate
        self.stage: Stage | None = None
        self.num_bytes = 0  # of memory that the case has taken
        # Whether later cases wait for it: it has not begun, nor ended, or runs by itself.
        self.is_awaited = True
        # Whether there are no others, or it lacked memory and is begun again without them.
        self.is_alone = run.num_unfinished == 1
        self.has_lost_gpu = False  # as the first one
        # Set when the case has ended, or waits for those before: with its files, or for memory.
        self.is_ready = threading.Event()
        # what ends it at its next stage
        self.ending: type[RunIsOverError | BeginAgainError] | None = None
        self._number = number
        self._run = run
        self._has_place = False
        self._seconds_waited = 0.0  # for other cases

    def clock(self) -> float:
        """Return seconds that only count while the case does not wait for other cases."""
        return time.perf_counter() - self._seconds_waited

    def _wait(self) -> None:
        """Wait for a change of the shared state, which the caller holds."""
        started = time.perf_counter()
        self._run.changed.wait()
        self._seconds_waited += time.perf_counter() - started

    def take_memory(self, num_bytes: int) -> None:
        """Take memory until the case has this many bytes; the first call also takes a place.

        The first call waits until the cases before have theirs. A later call does not wait: raise
        BeginAgainError if other cases have the memory. Raise RunIsOverError if the run ends.
        """
        run = self._run
        with run.changed:
            more = num_bytes - self.num_bytes
            if not self._has_place:
                # The memory of other cases: nothing if this one runs by itself or does not fit.
                most_of_others = 0 if self.is_alone else max(0, run.max_bytes - num_bytes)
                earlier = run.cases[max(0, run.turn) : self._number]
                while True:
                    if self.ending is RunIsOverError:
                        raise RunIsOverError
                    is_first = not any(case.is_awaited for case in earlier)
                    if is_first and run.num_free_places and run.num_bytes_taken <= most_of_others:
                        break
                    self._wait()
                self.ending = None  # A case that has not begun has nothing to begin again.
                run.num_free_places -= 1
                self._has_place = True
                if not self.is_alone:
                    self.is_awaited = False
                    run.changed.notify_all()
            elif more <= 0:
                return
            elif not self.is_alone and run.num_bytes_taken + more > run.max_bytes:
                self.is_alone = True
                raise BeginAgainError
            run.num_bytes_taken += more
            self.num_bytes = num_bytes

    def share_of_threads(self) -> int:
        """Return how many threads the case may have, beside others with as much memory."""
        run = self._run
        with run.changed:
            num_cases = min(run.num_jobs, run.num_unfinished)
        if self.num_bytes:
            num_cases = min(num_cases, max(1, run.max_bytes // self.num_bytes))
        return max(1, run.num_threads // num_cases)

    def enter_stage(self, stage: str, step: int = 0, num_steps: int = 0) -> None:
        """Keep the stage; raise RunIsOverError or BeginAgainError if the case has to end."""
        if self.ending is not None:
            raise self.ending
        self.stage = (stage, step, num_steps)

    def end_computing(self) -> None:
        """Let another case compute: this one only has to be written."""
        with self._run.changed:
            if self._has_place:
                self._has_place = False
                self._run.num_free_places += 1
                self._run.changed.notify_all()

    def wait_to_name(self) -> None:
        """Wait until the files of the case, which are whole, may get their names.

        The cases before are recorded then; raises as `enter_stage` does.
        """
        run = self._run
        self.is_ready.set()
        with run.changed:
            while run.turn < self._number and self.ending is None:
                self._wait()
        if self.ending is not None:
            raise self.ending

    def give_back(self) -> None:
        """Give the case's share and its turn to other cases."""
        run = self._run
        with run.changed:
            self.end_computing()
            run.num_bytes_taken -= self.num_bytes
            self.num_bytes = 0
            self.is_awaited = False
            run.changed.notify_all()

    def begin_again(self) -> None:
        """Forget the work on the case; later cases that have not begun wait for it again.

        If it lacks memory, wait until the cases before are recorded, and ask later ones to end: it
        may then have all memory.
        """
        run = self._run
        with run.changed:
            self.give_back()
            self.is_awaited = True
        self.stage = None
        self.is_ready.clear()
        if not self.is_alone:
            return
        self.is_ready.set()
        with run.changed:
            while run.turn < self._number and self.ending is not RunIsOverError:
                run.changed.wait()
            if self.ending is not RunIsOverError:
                for later in run.cases[self._number + 1 :]:
                    later.ending = BeginAgainError
                run.changed.notify_all()


Refine = Callable[[CaseInFlight], CaseRecord]


class CasesInFlight:
    """The cases of a run, several of them in work at a time, with what they share.

    While some are read and refined, results of earlier ones are compressed. Their files get their
    names in the order of the cases, so that a run that ends early leaves what it would leave
    without others in flight. A case that lacks memory beside others is begun again by itself.

    Readers and writers of what cases share hold `changed`, and notify it of a change.
    """

    def __init__(self, tasks: Sequence[Task], options: InferenceOptions, device: str) -> None:
        self.num_threads = options.threads or available_threads()
        # The GPU's engine takes one case at a time, and refines it much more quickly than a thread
        # reads and writes it: as many cases as on a CPU keep it busy. PyTorch's operations use the
        # whole machine for one case.
        num_jobs = options.num_jobs or self.num_threads
        if device.startswith("torch"):
            num_jobs = 1
        self.num_jobs = max(1, min(num_jobs, len(tasks)))
        self.changed = threading.Condition()
        self.max_bytes = memory_left(options.max_memory)  # of memory, for all cases
        self.num_bytes_taken = 0
        self.num_free_places = self.num_jobs
        self.num_unfinished = len(tasks)
        self.turn = -1  # number of the last case whose files may get their names
        self._is_gpu_lost = False
        self.cases = [CaseInFlight(task, number, self) for number, task in enumerate(tasks)]

    def records(self, refine: Refine, observer: RunObserver) -> Generator[CaseRecord]:
        """Yield the record of each case in the order of the tasks, as `refine` returns it."""
        # As many threads again are for cases that have left their places and are only written.
        pool = thread_pool(2 * self.num_jobs, "case")
        try:
            futures = [pool.submit(self._work_on, case, refine) for case in self.cases]
            for number, (future, case) in enumerate(zip(futures, self.cases, strict=True)):
                shown = _show_stages(case, future, observer)
                # Only now, so that an interrupt while a case is shown leaves no file of it.
                with self.changed:
                    self.turn = number
                    self.changed.notify_all()
                    if case.is_alone:  # Its stages are still to come.
                        case.is_ready.clear()
                _show_stages(case, future, observer, shown)
                record = future.result()
                if case.has_lost_gpu:
                    observer.note(NoteKind.GPU_LOST(), case_id=record.case_id)
                yield record
        finally:
            with self.changed:
                for case in self.cases:
                    case.ending = RunIsOverError
                self.changed.notify_all()
            pool.shutdown(cancel_futures=True)

    def _work_on(self, case: CaseInFlight, refine: Refine) -> CaseRecord:
        """Refine a case, again if it has to give way, or lacks memory or a GPU."""
        try:
            while True:
                with suppress(BeginAgainError), naming_after(case.wait_to_name):
                    case.device = "cpu" if self._is_gpu_lost else case.task.device
                    record = refine(case)
                    if not record.failures:
                        return record
                    is_auto = case.task.options.device == "auto"
                    if is_auto and record.has_failed_by(DeviceLostError):
                        with self.changed:
                            case.has_lost_gpu = not self._is_gpu_lost
                            self._is_gpu_lost = True
                        if not case.has_lost_gpu:  # Another case met the loss first.
                            continue
                    if case.is_alone or not record.has_failed_by(MemoryError):
                        return record
                    case.is_alone = True
                case.begin_again()
        finally:
            case.give_back()
            case.is_ready.set()
            with self.changed:
                self.num_unfinished -= 1


def _show_stages(
    case: CaseInFlight,
    future: Future[CaseRecord],
    observer: RunObserver,
    shown: Stage | None = None,
) -> Stage | None:
    """Show the stages of a case until it waits for those before, or has ended.

    Begin after the last shown one; return the new last one.
    """
    is_ready = False
    while not is_ready:
        is_ready = case.is_ready.wait(SECONDS_BETWEEN_STAGES) or future.done()
        if case.stage is not None and case.stage != shown:
            shown = case.stage
            observer.stage_changed(case.task.files.case_id, *shown)
    return shown
