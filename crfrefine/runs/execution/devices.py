"""Run a function on many items with a process per GPU: each takes the next item when it is done with one.

A GPU that stops working costs the item that it works on. Its process is started again; a GPU that cannot be opened then, or that is
lost on two items in a row, gets no more of them.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Generic, TypeVar

from crfrefine.errors import BackendUnavailableError
from crfrefine.runs.execution.executor import Item, Outcome, Result, Started, never
from crfrefine.runs.execution.process import LOOK_SECONDS, START_SECONDS, Limits, Surroundings, WorkerProcess

MOST_LOSSES = 2
"""Items in a row that a GPU may be lost on."""

ItemT_co = TypeVar("ItemT_co", covariant=True)


@dataclass(frozen=True)
class Placed(Generic[ItemT_co]):
    """What a process is given to do."""

    device: str
    item: ItemT_co | None = None  # None: only open the device, or raise
    ahead: ItemT_co | None = None  # what it will probably get next, which it may begin to read


@dataclass
class _Seat:
    """A device and its process."""

    device: str
    process: WorkerProcess
    number: int | None = None  # of the item that it works on; None: it is idle, or opens the device
    ahead: int | None = None  # number of the item that it reads ahead
    is_open: bool = False  # whether the process has opened the device
    is_new: bool = True  # whether no process has opened it yet
    opens_by: float = field(default_factory=lambda: time.monotonic() + START_SECONDS)
    num_losses: int = 0  # items in a row that it was lost on


class DeviceProcesses:
    """One item at a time on each of several devices. Items may write files: a process that is stopped gets time to remove unfinished ones.

    Args:
        devices: names, all different.
        limits: what an item may take; one that takes more is stopped.
        surroundings: of the processes.
        fallback: the device for the other items once none of `devices` works any more; None: they fail.
        fallback_note: what is told when `fallback` begins.
        note: told of a device that is lost.
    """

    def __init__(
        self,
        devices: Sequence[str],
        limits: Limits | None = None,
        surroundings: Surroundings | None = None,
        *,
        fallback: str | None = None,
        fallback_note: str = "",
        note: Callable[[str], object] = lambda text: None,
    ) -> None:
        self._devices, self._fallback, self._fallback_note, self._note = tuple(devices), fallback, fallback_note, note
        self._limits, self._surroundings = limits or Limits(), surroundings
        self._seats: list[_Seat] = []
        self._reasons: list[str] = []

    def map(
        self,
        function: Callable[[Placed[Item]], Result],
        items: Sequence[Item],
        started: Started[Item],
        is_lost: Callable[[Result], bool],
        stops: Callable[[Outcome[Result]], bool] = never,
    ) -> Generator[tuple[Item, Outcome[Result]]]:
        """Yield each item with its outcome, as they complete.

        Args:
            function: of what a process is given, from a module that it can import; what it returns without an item is not used.
            items: the items, which can be pickled.
            started: called with each item when work on it begins.
            is_lost: whether a result says that the device stopped working in this process.
            stops: whether no further item is begun after an outcome; those that have begun are finished, and have outcomes.

        Raises:
            BackendUnavailableError: a device cannot be opened at the start; no item has begun then.
        """
        pending = list(range(len(items)))
        content = pickle.dumps(function)
        try:
            for device in self._devices[: len(items)]:
                self._open(device, content)
            while pending or any(seat.number is not None for seat in self._seats):
                if not self._seats:
                    if self._fallback is None:
                        break
                    self._note(self._fallback_note)
                    self._open(self._fallback, content)
                if not any(seat.is_new for seat in self._seats):
                    self._give_out(items, pending, started)
                for seat, received in self._wait():
                    number, seat.number = seat.number, None
                    outcome: Outcome[Result] = pickle.loads(received)
                    if number is None:
                        self._opened(seat, outcome)
                        continue
                    if stops(outcome):
                        pending.clear()
                    loses_device = outcome.error is None and is_lost(outcome.get())
                    seat.num_losses = seat.num_losses + 1 if loses_device else 0
                    if loses_device or outcome.is_lost or not seat.process.is_running:
                        self._seats.remove(seat)
                        seat.process.end()
                        self._again(seat, content, has_more=bool(pending))
                    yield items[number], outcome
            for number in pending:
                text = f"not begun, as no GPU is left ({'; '.join(self._reasons)}); once they work, run again with --continue"
                yield items[number], Outcome(error=BackendUnavailableError(text))
        finally:
            self.close()

    def close(self) -> None:
        """Stop the processes, whatever they do."""
        for seat in self._seats:
            if seat.number is not None or not seat.is_open:
                seat.process.interrupt()
        while self._seats:
            self._seats.pop().process.end()

    def _open(self, device: str, content: bytes) -> _Seat:
        process = WorkerProcess(content, self._limits, self._surroundings, "; try fewer GPUs, or a machine with more memory")
        seat = _Seat(device, process)
        self._seats.append(seat)
        process.give(pickle.dumps(Placed[object](device)))
        return seat

    def _opened(self, seat: _Seat, outcome: Outcome[Result]) -> None:
        """Note that a process has opened its device, or could not: an error at the start, a loss later."""
        if outcome.error is None:
            seat.is_open, seat.is_new = True, False
            return
        self._seats.remove(seat)
        seat.process.end()
        reason = str(outcome.error)
        if seat.is_new:
            if isinstance(outcome.error, BackendUnavailableError):
                raise outcome.error
            raise BackendUnavailableError(f"--device {seat.device}: the device cannot be opened: {reason}; use another one, or cpu")
        self._drop(seat, f"it cannot be opened again: {reason}")

    def _again(self, seat: _Seat, content: bytes, *, has_more: bool) -> None:
        """Start another process for a device whose process is gone, unless there is no work for it, or it was lost too often."""
        most = MOST_LOSSES if self._fallback is None else 1
        if seat.num_losses >= most:
            self._drop(seat, f"it was lost on {most} cases in a row" if most > 1 else "it was lost")
        elif has_more:
            again = self._open(seat.device, content)
            again.is_new, again.num_losses = False, seat.num_losses

    def _drop(self, seat: _Seat, reason: str) -> None:
        self._reasons.append(f"{seat.device}: {reason}")
        self._note(f"{seat.device} gets no more cases: {reason}")

    def _give_out(self, items: Sequence[Item], pending: list[int], started: Started[Item]) -> None:
        """Give each idle process an item, first the one that it has read ahead; the others' only if nothing else is left."""
        for seat in self._seats:
            if not seat.is_open or seat.number is not None or not pending:
                continue
            of_others = {other.ahead for other in self._seats if other is not seat}
            free = [number for number in pending if number not in of_others]
            seat.number = seat.ahead if seat.ahead in pending else (free or pending)[0]
            pending.remove(seat.number)
            seat.ahead = next((number for number in pending if number not in of_others), None)
            started(items[seat.number])
            ahead = None if seat.ahead is None else items[seat.ahead]
            seat.process.give(pickle.dumps(Placed(seat.device, items[seat.number], ahead)))

    def _wait(self) -> list[tuple[_Seat, bytes]]:
        """Return the processes that have an outcome; perhaps none yet."""
        watched = [seat for seat in self._seats if seat.number is not None or not seat.is_open]
        is_timed = self._limits.are_set or any(not seat.is_open for seat in watched)
        ready = wait([seat.process.connection for seat in watched], LOOK_SECONDS if is_timed else None)
        found = []
        for seat in watched:
            if seat.process.connection not in ready and not seat.is_open and time.monotonic() > seat.opens_by:
                error = BackendUnavailableError(
                    f"it did not answer within {START_SECONDS:g} s; nvidia-smi and the system's log may say why"
                )
                found.append((seat, pickle.dumps(Outcome[object](error=error))))
            if seat.process.connection not in ready and not seat.is_open:
                continue
            content = seat.process.take() if seat.process.connection in ready else seat.process.over_limit()
            if content is not None:
                found.append((seat, content))
        return found
