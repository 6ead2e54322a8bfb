"""The tasks of one call of `Cluster.map`: sent a few at a time, tried again where a worker was lost, given up where that happens twice.

Only as many tasks are sent as the workers can begin soon. So scheduler and client hold few of them however many items there are, and a
worker that is lost costs no items that were only waiting for it.
"""

from __future__ import annotations

import os
import pickle
import threading
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Generic

from distributed import KilledWorker

import crfrefine
from crfrefine.errors import CapacityError, InputError
from crfrefine.execution.cluster.connection import Connection, describe_workers, other_version
from crfrefine.execution.cluster.on_worker import Reply, TaskSettings, end_run, work
from crfrefine.execution.executor import Item, Outcome, Result, Started
from crfrefine.execution.placement import Placement
from crfrefine.execution.process import GRACE_SECONDS
from crfrefine.execution.records import Record
from crfrefine.text import MOST_OF_A_REASON, shorten

if TYPE_CHECKING:
    from distributed import Future

MOST_LOSSES = 2
"""An item that loses its process or worker this often is given up."""

MOST_ATTEMPTS = 3
"""An item is sent at most this often, even if it only waited for the workers that were lost."""

NO_WORKER_SECONDS = 120.0
"""A cluster that was started for the run has lost its workers for good if there are none for this long."""

LOOK_SECONDS = 1.0
"""Time between two looks at the cluster while nothing happens."""

HUNG_SECONDS = 10.0
"""A worker that has not given up an item this long after its time limit hangs itself."""


@dataclass
class _Flight:
    """An item that is with the cluster.

    Attributes:
        future: of its task.
        attempt: how often the item has been sent.
        workers: where it has begun in this attempt, the last one at the end.
        began: when, by this machine's clock.
    """

    future: Future[Reply]
    attempt: int
    workers: list[str] = field(default_factory=list)
    began: float = 0.0


class ClusterRun(Generic[Item, Result]):
    """One call of `Cluster.map`.

    Args:
        connection: the cluster.
        placement: what each item may take.
        function: of one item; pickled.
        items: pickled one by one when they are sent.
        started: told of items that begin.
    """

    def __init__(
        self,
        connection: Connection,
        placement: Placement,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        started: Started[Item],
    ) -> None:
        self._connection, self._client, self._items, self._started = connection, connection.client, items, started
        self._seconds = placement.case_timeout
        environment = {name: value for name, value in os.environ.items() if name.startswith("CRFREFINE_")}
        self._settings = TaskSettings(
            f"crfrefine-{uuid.uuid4().hex}",
            crfrefine.__version__,
            pickle.dumps(function),
            str(Path.cwd()),
            environment,
            placement.case_timeout,
            # Workers of a cluster on this machine share its cores; others know their own.
            connection.threads_per_item if connection.cluster is not None else placement.threads,
        )
        self._pending = deque(range(len(items)))
        self._flights: dict[int, _Flight] = {}
        self._losses: dict[int, list[str]] = {}
        self._attempts: dict[int, int] = {}
        self._only_on: dict[int, list[str]] = {}
        self._events: SimpleQueue[tuple[str, int, int, str]] = SimpleQueue()
        self._capacity = 1
        self._looked = float("-inf")
        self._with_workers = time.monotonic()
        self._is_waiting = False
        self._client.subscribe_topic(self._settings.run, self._note_start)

    def outcomes(self) -> Iterator[tuple[Item, Outcome[Result]]]:
        """Yield each item with its outcome."""
        while self._pending or self._flights:
            self._look()
            while self._pending and len(self._flights) < self._capacity:
                self._send(self._pending.popleft())
            for number, outcome in self._collect():
                self._attempts.pop(number, None)
                self._losses.pop(number, None)
                self._only_on.pop(number, None)
                yield self._items[number], outcome

    def close(self) -> None:
        """Cancel what is pending, and stop what is running."""
        futures = [flight.future for flight in self._flights.values()]
        self._flights.clear()
        ending = threading.Thread(target=self._end, args=(futures,), daemon=True)
        ending.start()
        ending.join(2 * GRACE_SECONDS)  # A worker that hangs does not answer.

    def _end(self, futures: list[Future[Reply]]) -> None:
        try:
            if futures:
                self._client.cancel(futures, force=True)
            self._client.unsubscribe_topic(self._settings.run)
            self._client.run(end_run, self._settings.run, on_error="ignore")
        except Exception:  # The scheduler is gone: nothing is left to be cancelled there.
            return

    def _note_start(self, event: tuple[float, Any]) -> None:
        """Receive the event of a task that begins; runs in Dask's thread."""
        number, attempt, worker = event[1]
        self._events.put(("began", number, attempt, worker))

    def _look(self) -> None:
        """Ask from time to time how many items the workers can take: one per thread, and one more per worker, to begin without delay."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        threads = self._connection.num_threads()
        self._looked = time.monotonic()
        self._capacity = max(1, sum(threads.values()) + len(threads))
        if threads:
            self._with_workers, self._is_waiting = self._looked, False
        elif self._connection.cluster is None and not self._is_waiting:
            self._is_waiting = True
            warnings.warn(f"{self._connection.name} has no workers: waiting for them", RuntimeWarning, stacklevel=2)
        elif self._connection.cluster is not None and self._looked - self._with_workers > NO_WORKER_SECONDS:
            raise InputError("all processes of --workers were lost, and none could be started again")
        for number, names in list(self._only_on.items()):
            if number in self._flights and not set(names) & set(threads):  # All of the larger workers have gone.
                self._client.cancel([self._flights.pop(number).future], force=True)
                del self._only_on[number]
                self._pending.appendleft(number)

    def _send(self, number: int) -> None:
        attempt = self._attempts[number] = self._attempts.get(number, 0) + 1
        future = self._client.submit(
            work,
            self._settings,
            number,
            attempt,
            pickle.dumps(self._items[number]),
            key=(self._settings.run, number, attempt),
            pure=False,
            workers=self._only_on.get(number),
        )
        self._flights[number] = _Flight(future, attempt)
        future.add_done_callback(lambda _: self._events.put(("ended", number, attempt, "")))

    def _collect(self) -> Iterator[tuple[int, Outcome[Result]]]:
        """Wait for something to happen, and yield the outcomes of items that have ended with it."""
        try:
            events = [self._events.get(timeout=LOOK_SECONDS)]
            while not self._events.empty():
                events.append(self._events.get_nowait())
        except Empty:
            events = []
        ended: list[int] = []
        for kind, number, attempt, worker in events:
            flight = self._flights.get(number)
            if flight is None or flight.attempt != attempt:
                continue  # It was given up.
            if kind == "ended":
                ended.append(number)
            elif (outcome := self._begun(number, flight, worker)) is not None:
                yield number, outcome
        yield from self._gather([number for number in ended if number in self._flights])
        yield from self._hung()

    def _begun(self, number: int, flight: _Flight, worker: str) -> Outcome[Result] | None:
        """Note that an item begins; if it does so again, Dask has seen that the worker before was lost."""
        flight.workers.append(worker)
        flight.began = time.monotonic()
        self._started(self._items[number])
        if len(flight.workers) > 1 and self._lose(number, flight.workers[-2]):
            self._client.cancel([self._flights.pop(number).future], force=True)
            return self._lost(number)
        return None

    def _gather(self, numbers: Sequence[int]) -> Iterator[tuple[int, Outcome[Result]]]:
        """Fetch the replies of tasks that have ended."""
        flights = {number: self._flights.pop(number) for number in numbers}
        whole = {number: flight.future for number, flight in flights.items() if flight.future.status == "finished"}
        replies: dict[int, Reply] = {}
        try:
            replies = dict(zip(whole, self._client.gather(list(whole.values())), strict=True)) if whole else {}
        except Exception:  # One by one, below.
            replies = {}
        for number, flight in flights.items():
            outcome = self._outcome(number, flight, replies.get(number))
            if outcome is None:
                self._pending.appendleft(number)
            else:
                yield number, outcome

    def _outcome(self, number: int, flight: _Flight, reply: Reply | None) -> Outcome[Result] | None:
        """Return the outcome of a task that has ended; None: the item is to be tried again."""
        if reply is None:
            try:
                reply = flight.future.result()
            except KilledWorker as error:
                where = flight.workers[-1] if flight.workers else str(error.last_worker.address)
                given_up = self._lose(number, where) if flight.workers else flight.attempt >= MOST_ATTEMPTS
                return self._lost(number) if given_up else None
            except Exception as error:
                if not self._connection.is_alive or flight.future.status in ("cancelled", "lost"):
                    raise self._connection.lost() from error
                raise InputError(f"a worker cannot do the work of this run: {shorten(error, MOST_OF_A_REASON)}") from error
        if not reply.content:
            raise other_version(reply.worker, reply.version)
        outcome: Outcome[Result] = pickle.loads(reply.content)
        if outcome.is_lost:
            if not self._lose(number, reply.worker):
                return None
            return Outcome(error=InputError(f"{outcome.error}; tried {MOST_LOSSES} times, on {self._where(number)}"), is_lost=True)
        if _lacks_memory(outcome) and self._find_larger(number, reply):
            return None
        return outcome

    def _lose(self, number: int, worker: str) -> bool:
        """Note that an item has lost its worker or process; return whether that is often enough to give it up."""
        self._losses.setdefault(number, []).append(worker)
        return len(self._losses[number]) >= MOST_LOSSES

    def _lost(self, number: int) -> Outcome[Result]:
        error = InputError(
            f"its worker was lost {MOST_LOSSES} times, on {self._where(number)}: the machine or the job ended, or its memory ran out"
        )
        return Outcome(error=error, is_lost=True)

    def _where(self, number: int) -> str:
        return describe_workers(self._losses.get(number, []))

    def _find_larger(self, number: int, reply: Reply) -> bool:
        """Return whether there are workers with more memory for an item; it is tried again on one of these."""
        if reply.memory is None or self._attempts[number] >= MOST_ATTEMPTS:
            return False
        workers = self._client.scheduler_info(n_workers=-1)["workers"]
        shares = {name: about["memory_limit"] // max(1, about["nthreads"]) for name, about in workers.items()}
        least = shares.get(reply.worker, reply.memory)
        self._only_on[number] = [name for name, share in shares.items() if share > least]
        return bool(self._only_on[number])

    def _hung(self) -> Iterator[tuple[int, Outcome[Result]]]:
        """Give up items whose worker itself hangs, so that it does not even end them after their time; restart it, if it has a nanny."""
        if self._seconds is None:
            return
        latest = time.monotonic() - self._seconds - GRACE_SECONDS - HUNG_SECONDS
        for number, flight in list(self._flights.items()):
            if flight.workers and flight.began < latest:
                worker = flight.workers[-1]
                self._client.cancel([self._flights.pop(number).future], force=True)
                threading.Thread(target=self._restart, args=(worker,), daemon=True).start()
                yield (
                    number,
                    Outcome(error=InputError(f"took longer than the {self._seconds:g} s of --case-timeout; its worker {worker} hangs")),
                )

    def _restart(self, worker: str) -> None:
        try:
            self._client.restart_workers([worker], timeout=HUNG_SECONDS, raise_for_error=False)
        except Exception:  # It has no nanny: the scheduler forgets it when it has been silent for long.
            return


def _lacks_memory(outcome: Outcome[Any]) -> bool:
    result = outcome.result
    return isinstance(outcome.error, (CapacityError, MemoryError)) or (isinstance(result, Record) and result.lacks_memory)
