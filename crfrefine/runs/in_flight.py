"""Cases of a run side by side, each with its share of the threads, as far as memory allows."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import suppress
from dataclasses import replace

from crfrefine.base.limits import available_threads, memory_left, memory_limit
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.observer import Observer
from crfrefine.base.workers import thread_pool
from crfrefine.errors import DeviceLostError
from crfrefine.io.atomic import naming_after
from crfrefine.runs.case_work import finish_case, read_case
from crfrefine.runs.plan import RunPlan
from crfrefine.runs.records import CaseRecord
from crfrefine.runs.task import ALONE, Task, Turns

SECONDS_BETWEEN_STAGES = 0.2  # after which the shown stage is looked at again


class RunIsOverError(BaseException):
    """Ends a case in work after the run was interrupted; no error of the case, so not recorded."""


class BeginAgainError(BaseException):
    """Ends a case in work that gives its memory to another one, or lacks it beside others.

    It is begun again, and so this is not recorded.
    """


class Places:
    """The places of a run for cases in work, its memory, and the turns of the cases.

    Places and memory are given to the cases in their order. A case that takes more memory than
    there is runs alone, as it would without others.
    """

    def __init__(self, num_places: int, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._num_free = num_places
        self._taken = 0  # bytes
        self._next = 0  # number of the case that is begun next
        self._served: set[int] = set()  # numbers of later cases that wait no longer
        self._turn = -1  # number of the last case whose files may get their names
        self._alone: set[int] = set()  # numbers of cases that are begun again without others
        self._yielding: set[int] = set()  # numbers of cases that such a case has asked to end
        self._changed = threading.Condition()
        self._is_over = False

    def take(self, number: int, num_bytes: int) -> None:
        """Wait until a case has its turn, and a place and memory are free for it.

        A case never waits for a later one. Raise RunIsOverError after `close`.
        """
        with self._changed:
            while not self._is_over and not self._is_free_for(number, num_bytes):
                self._changed.wait()
            if self._is_over:
                raise RunIsOverError
            self._yielding.discard(number)
            self._num_free -= 1
            self._taken += num_bytes
            if number == self._next:
                self._pass_turn(number)

    def _is_free_for(self, number: int, num_bytes: int) -> bool:
        if self._num_free == 0 or number > self._next:
            return False
        if self._alone and number > min(self._alone):
            return False
        if number not in self._alone and self._taken + num_bytes <= self.num_bytes:
            return True
        return self._taken == 0

    def take_more(self, number: int, num_bytes: int) -> bool:
        """Take memory for a case in work; return whether others have left it."""
        with self._changed:
            fits = self._taken + num_bytes <= self.num_bytes
            if fits or number in self._alone:
                self._taken += num_bytes
                return True
            return False

    def _pass_turn(self, number: int) -> None:
        """Note that a case waits no longer, and wake the others."""
        self._served.add(number)
        while self._next in self._served:
            self._served.remove(self._next)
            self._next += 1
        self._changed.notify_all()

    def leave(self) -> None:
        """Let another case have a place that was taken."""
        with self._changed:
            self._num_free += 1
            self._changed.notify_all()

    def give_back(self, number: int, num_bytes: int) -> None:
        """Let other cases have the memory of a case that has ended, and its turn."""
        with self._changed:
            self._taken -= num_bytes
            if number >= self._next:
                self._pass_turn(number)
            self._changed.notify_all()

    def give_turn(self, number: int) -> None:
        """Let the files of a case get their names, since those before are recorded."""
        with self._changed:
            self._turn = number
            self._changed.notify_all()

    def await_turn(self, number: int) -> None:
        """Wait until the files of a case may get their names; raises as `check` does."""
        with self._changed:
            while self._turn < number:
                self.check(number)
                self._changed.wait()
        self.check(number)

    def await_others(self, number: int) -> None:
        """Wait until the cases before are recorded, and ask those in work to end.

        The case, which has given back its memory, takes it next, and has all of it.
        """
        with self._changed:
            self._alone.add(number)
            while self._turn < number and not self._is_over:
                self._changed.wait()
            self._yielding.update(range(number + 1, self._next))
            self._changed.notify_all()

    def end_alone(self, number: int) -> None:
        """Let others run again beside a case that has ended."""
        with self._changed:
            self._alone.discard(number)
            self._changed.notify_all()

    def check(self, number: int) -> None:
        """Raise RunIsOverError or BeginAgainError if a case in work has to end."""
        if self._is_over:
            raise RunIsOverError
        if number in self._yielding:
            raise BeginAgainError

    def close(self) -> None:
        """Let no further case begin."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()


class CaseInFlight(Observer, Turns):
    """A case in flight: its notes and its stage until they are shown, and what it waits for.

    It ends at its next stage if the run is over, or another case needs its memory.
    """

    def __init__(self, number: int, places: Places) -> None:
        self.notes: list[Note] = []
        self.stage: tuple[str, int, int] | None = None  # with its step and the number of steps
        self.num_bytes = 0  # of memory that the case has taken
        self.lacks_memory = False  # beside others
        self.is_alone = False  # whether it was begun again without others
        # Set when the case has ended, or waits for those before: with its files, or for memory.
        self.is_ready = threading.Event()
        self._number = number
        self._places = places
        self._has_place = False

    def note(self, note: Note, *, case_id: str = "") -> None:
        """Keep a note."""
        self.notes.append(note)

    def stage_changed(self, case_id: str, stage: str, step: int = 0, num_steps: int = 0) -> None:
        """Keep the stage; raise RunIsOverError or BeginAgainError if the case has to end."""
        self._places.check(self._number)
        self.stage = (stage, step, num_steps)

    def take_memory(self, num_bytes: int) -> None:
        """Wait until there is a place for the case, and it fits beside those in work."""
        self._places.take(self._number, num_bytes)
        self.num_bytes = num_bytes
        self._has_place = True

    def take_more(self, num_bytes: int) -> None:
        """Take so much memory in all; raise BeginAgainError if others have it."""
        if num_bytes <= self.num_bytes:
            return
        if not self._places.take_more(self._number, num_bytes - self.num_bytes):
            self.lacks_memory = True
            raise BeginAgainError
        self.num_bytes = num_bytes

    def end_computing(self) -> None:
        """Let another case compute."""
        if self._has_place:
            self._has_place = False
            self._places.leave()

    def wait_to_name(self) -> None:
        """Wait until the cases before are recorded; raises as `stage_changed` does."""
        self.is_ready.set()
        self._places.await_turn(self._number)

    def give_back(self) -> None:
        """Let other cases have what the case has taken."""
        self.end_computing()
        self._places.give_back(self._number, self.num_bytes)
        self.num_bytes = 0

    def begin_again(self) -> None:
        """Forget what the case has done; if it lacks memory, wait until it may have all."""
        self.give_back()
        self.notes.clear()
        self.stage = None
        self.is_ready.clear()
        if self.lacks_memory:
            self.lacks_memory = False
            self.is_alone = True
            self.is_ready.set()
            self._places.await_others(self._number)
            self.is_ready.clear()

    def end(self) -> None:
        """Let other cases have what the case has taken; show that it has ended."""
        self.give_back()
        self._places.end_alone(self._number)
        self.is_ready.set()


def num_cases_in_flight(plan: RunPlan) -> int:
    """Return how many cases are in work at a time if there is memory for them.

    The GPU engine takes one case at a time, much more quickly than a thread reads and writes it:
    only as many threads as on a CPU keep it busy. The operations of PyTorch take all of a machine.
    """
    options = plan.options
    if plan.summary.device.startswith("torch"):
        return 1
    num_jobs = options.num_jobs or options.threads or available_threads()
    return max(1, min(num_jobs, len(plan.tasks)))


class CasesInFlight:
    """The cases of a run, several of them in work at a time.

    While some are read and refined, results of earlier ones are compressed. Their files get their
    names in the order of the cases, so that a run that ends early leaves what it would leave
    without others in flight. A case that lacks memory beside others is begun again alone.
    """

    def __init__(self, plan: RunPlan) -> None:
        options = plan.options
        self._is_gpu_lost = False
        self._tasks = plan.tasks
        self._num_jobs = num_cases_in_flight(plan)
        self._num_threads = options.threads or available_threads()
        self._places = Places(self._num_jobs, memory_left(memory_limit(options.max_memory)))
        self._cases = [CaseInFlight(number, self._places) for number in range(len(plan.tasks))]
        self._num_unfinished = len(plan.tasks)
        self._lock = threading.Lock()

    def records(self, observer: Observer) -> Generator[CaseRecord]:
        """Yield the record of each case in the order of the tasks, after its notes."""
        pool = thread_pool(2 * self._num_jobs, "case")
        try:
            pairs = list(zip(self._tasks, self._cases, strict=True))
            futures = [pool.submit(self._work_on, task, case) for task, case in pairs]
            for number, (future, (task, case)) in enumerate(zip(futures, pairs, strict=True)):
                _show_stages(case, task.files.case_id, observer)
                # Only now, so that an interrupt while a case is shown leaves no file of it.
                self._places.give_turn(number)
                if case.is_alone:
                    _show_stages(case, task.files.case_id, observer)
                record = future.result()
                for note in case.notes:
                    observer.note(note, case_id=record.case_id)
                yield record
        finally:
            self._places.close()
            pool.shutdown(cancel_futures=True)

    def _work_on(self, task: Task, case: CaseInFlight) -> CaseRecord:
        """Read, refine and write a case, again if it has to give way or lacks memory."""
        try:
            while True:
                with suppress(BeginAgainError):
                    record = self._refine_with_device(task, case)
                    if case.is_alone or not record.has_failed_by(MemoryError):
                        return record
                    case.lacks_memory = True
                case.begin_again()
        finally:
            case.end()
            with self._lock:
                self._num_unfinished -= 1

    def _refine_with_device(self, task: Task, case: CaseInFlight) -> CaseRecord:
        """Read, refine and write a case; on the CPU after the loss of a GPU in another one."""
        record = self._refine(task, case, turns=case)
        if task.options.device == "auto" and record.has_failed_by(DeviceLostError):
            with self._lock:
                has_lost_gpu = not self._is_gpu_lost
                self._is_gpu_lost = True
            if has_lost_gpu:
                case.note(Note.of(NoteKind.GPU_LOST))
            else:  # The case has only met the loss in another one.
                case.notes.clear()
                record = self._refine(task, case, turns=ALONE)
        return record

    def _refine(self, task: Task, case: CaseInFlight, turns: Turns) -> CaseRecord:
        """Read, refine and write a case; it waits for memory if `turns` is the case."""
        work = read_case(self._with_share(task, 0), turns)
        work.task = self._with_share(task, case.num_bytes)
        with naming_after(case.wait_to_name):
            return finish_case(work, case, case)

    def _with_share(self, task: Task, num_bytes: int) -> Task:
        """Return a case that takes so much memory with its share of threads, and its device."""
        with self._lock:
            num_cases = min(self._num_jobs, self._num_unfinished)
        if num_bytes:
            num_cases = min(num_cases, max(1, self._places.num_bytes // num_bytes))
        threads = max(1, self._num_threads // num_cases)
        device = "cpu" if self._is_gpu_lost else task.device
        return replace(task, options=replace(task.options, threads=threads), device=device)


def _show_stages(case: CaseInFlight, case_id: str, observer: Observer) -> None:
    """Show the stages of a case until it waits for the cases before, or has ended."""
    shown = None
    is_ready = False
    while not is_ready:
        is_ready = case.is_ready.wait(SECONDS_BETWEEN_STAGES)
        if case.stage is not None and case.stage != shown:
            shown = case.stage
            observer.stage_changed(case_id, *shown)
