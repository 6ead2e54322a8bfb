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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Generic

from distributed import KilledWorker

import crfrefine
from crfrefine.base.text import MOST_OF_A_REASON, listed, shorten
from crfrefine.errors import CapacityError, InputError
from crfrefine.runs.execution.cluster.connection import Connection, check_devices, check_version
from crfrefine.runs.execution.cluster.on_worker import Reply, Start, TaskSettings, end_run, work
from crfrefine.runs.execution.executor import Item, Outcome, Placement, Result, Started
from crfrefine.runs.execution.process import GRACE_SECONDS
from crfrefine.runs.execution.records import Record

if TYPE_CHECKING:
    from distributed import Future

    from crfrefine.runs.execution.cluster.connection import Connection
    from crfrefine.runs.execution.cluster.on_worker import Description, Reply

HUNG_SECONDS = 10.0
"""A worker that has not given up an item this long after its time limit hangs itself."""

_ENDED = b""
"""In place of an event of a worker: Dask says that a task has ended."""


class ClusterRun(Generic[Item, Result]):
    """One call of `Cluster.map`.

    Args:
        connection: the cluster.
        placement: what each item may take.
        function: of one item; pickled.
        items: pickled one by one when they are sent.
        started: told of items that begin.
        stops: whether nothing more is sent after an outcome.
    """

    def __init__(
        self,
        connection: Connection,
        placement: Placement,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        started: Started[Item],
        stops: Callable[[Outcome[Result]], bool],
    ) -> None:
        self._connection, self._client, self._items, self._started = connection, connection.client, items, started
        self._stops, self._num_items = stops, len(items)
        self._seconds = placement.case_timeout
        self._settings = TaskSettings(
            f"crfrefine-{uuid.uuid4().hex}",
            connection.topic,
            crfrefine.__version__,
            pickle.dumps(function),
            str(Path.cwd()),
            {name: value for name, value in os.environ.items() if name.startswith("CRFREFINE_")},
            placement.case_timeout,
            # Workers of a cluster on this machine share its cores; others know their own.
            connection.threads_per_item if connection.cluster is not None else placement.threads,
        )
        self._workers = ClusterWorkers(connection, one_per_device=placement.one_per_device)
        self._num_begun = 0  # Items before this one have been sent at least once.
        self._again: list[SentItem] = []
        self._flights: dict[int, SentItem] = {}
        self._events: SimpleQueue[tuple[int, int, bytes]] = SimpleQueue()
        connection.receivers[self._settings.run] = lambda *event: self._events.put(event)

    def outcomes(self) -> Iterator[tuple[Item, Outcome[Result]]]:
        """Yield each item with its outcome."""
        while self._num_begun < self._num_items or self._again or self._flights:
            if self._workers.look():
                self._release_items()
            self._send_items()
            for item, outcome in self._collect():
                if self._stops(outcome):
                    self._num_items = self._num_begun
                yield self._items[item.number], outcome

    def close(self) -> None:
        """Cancel what is pending, and stop what is running."""
        futures = [item.future for item in self._flights.values() if item.future is not None]
        self._flights.clear()
        ending = threading.Thread(target=self._end, args=(futures,), daemon=True)
        ending.start()
        ending.join(2 * GRACE_SECONDS)  # A worker that hangs does not answer.
        self._connection.receivers.pop(self._settings.run, None)

    def _end(self, futures: list[Future[Reply]]) -> None:
        try:
            if futures:
                self._client.cancel(futures, force=True)
            self._client.run(end_run, self._settings.run, on_error="ignore")
        except Exception:  # The scheduler is gone: nothing is left to be cancelled there.
            return

    def _release_items(self) -> None:
        """Let items go anywhere again if all workers with enough memory for them have gone."""
        for item in [*self._again, *self._flights.values()]:
            if item.only_on and self._workers.are_gone(item.only_on):
                item.only_on = frozenset()
                if item.number in self._flights:
                    self._cancel(item)
                    self._again.append(item)

    def _send_items(self) -> None:
        """Send what the workers can begin soon: those that were sent before come first."""
        for item in self._again.copy():
            if self._has_room(item.only_on):
                self._again.remove(item)
                self._send(item)
        while self._num_begun < self._num_items and self._has_room():
            self._send(SentItem(self._num_begun))
            self._num_begun += 1

    def _has_room(self, only_on: frozenset[str] = frozenset()) -> bool:
        """Return whether another item can be sent; those that wait for large workers keep no other worker idle."""
        flying = sum(bool(item.only_on) == bool(only_on) for item in self._flights.values())
        return flying < self._workers.capacity(only_on)

    def _send(self, item: SentItem) -> None:
        item.attempt += 1
        item.future, item.begun_on, item.began, item.reply = None, [], 0.0, None
        number, attempt = item.number, item.attempt
        item.future = self._client.submit(
            work,
            self._settings,
            number,
            attempt,
            pickle.dumps(self._items[number]),
            key=(self._settings.run, number, attempt),
            pure=False,
            workers=list(item.only_on) or None,
        )
        self._flights[number] = item
        item.future.add_done_callback(lambda _: self._events.put((number, attempt, _ENDED)))

    def _cancel(self, item: SentItem) -> None:
        del self._flights[item.number]
        self._client.cancel([item.future], force=True)

    def _collect(self) -> Iterator[tuple[SentItem, Outcome[Result]]]:
        """Wait for something to happen, and yield the outcomes of items that have ended with it."""
        try:
            events = [self._events.get(timeout=LOOK_SECONDS)]
            while not self._events.empty():
                events.append(self._events.get_nowait())
        except Empty:
            events = []
        for number, attempt, content in events:
            item = self._flights.get(number)
            if item is None or item.attempt != attempt:
                continue  # It was given up.
            outcome = self._ended(item) if content == _ENDED else self._told(item, pickle.loads(content))
            if outcome is not None:
                yield item, outcome
        yield from self._hung()

    def _told(self, item: SentItem, event: Start | Reply) -> Outcome[Result] | None:
        """Note what a worker says of an item; if it begins again, Dask has seen that the worker before was lost."""
        if isinstance(event, Reply):
            item.reply = event
            return None
        if item.reply is not None:  # Dask has lost the result with its worker, and computes it again.
            self._client.cancel([item.future], force=True)
            return self._ended(item)
        self._workers.check(event.worker, event.about)
        item.begun_on.append(event.worker)
        item.began = time.monotonic()
        self._started(self._items[item.number])
        if len(item.begun_on) > 1 and item.loses(item.begun_on[-2]):
            self._cancel(item)
            return item.lost_worker()
        return None

    def _ended(self, item: SentItem) -> Outcome[Result] | None:
        """Return the outcome of an item whose task has ended; None: it is to be tried again."""
        del self._flights[item.number]
        outcome = self._outcome(item)
        item.future = None
        if outcome is None:
            self._again.append(item)
        return outcome

    def _outcome(self, item: SentItem) -> Outcome[Result] | None:
        assert item.future is not None
        reply = item.reply
        if reply is None:  # It is large, or there is none.
            try:
                reply = item.future.result()
            except KilledWorker as error:
                where = item.begun_on[-1] if item.begun_on else str(error.last_worker.address)
                given_up = item.loses(where) if item.begun_on else not item.may_be_sent_again
                return item.lost_worker() if given_up else None
            except Exception as error:
                if not self._connection.is_alive or item.future.status in ("cancelled", "lost"):
                    raise self._connection.lost() from error
                raise InputError(f"a worker cannot do the work of this run: {shorten(error, MOST_OF_A_REASON)}") from error
        if not reply.content:
            check_version(reply.worker, reply.version)
        outcome: Outcome[Result] = pickle.loads(reply.content)
        if outcome.is_lost:
            if not item.loses(reply.worker):
                return None
            # The error says how the process died, the last time.
            return Outcome(error=InputError(f"{outcome.error}; tried {MOST_LOSSES} times, on {item.where_lost}"), is_lost=True)
        record = outcome.result if isinstance(outcome.result, Record) else None
        lacks_memory = isinstance(outcome.error, (CapacityError, MemoryError)) or (record is not None and record.failed_by(CapacityError))
        if lacks_memory and item.may_be_sent_again:
            item.only_on = self._workers.larger_than(reply)
            return None if item.only_on else outcome
        return outcome

    def _hung(self) -> Iterator[tuple[SentItem, Outcome[Result]]]:
        """Give up items whose worker itself hangs, so that it does not even end them after their time; restart it, if it has a nanny."""
        if self._seconds is None:
            return
        latest = time.monotonic() - self._seconds - GRACE_SECONDS - HUNG_SECONDS
        for item in [item for item in self._flights.values() if item.begun_on and item.began < latest]:
            worker = item.begun_on[-1]
            self._cancel(item)
            threading.Thread(target=self._restart, args=(worker,), daemon=True).start()
            text = f"took longer than the {self._seconds:g} s of --case-timeout; its worker {worker} hangs"
            yield item, Outcome(error=InputError(text))

    def _restart(self, worker: str) -> None:
        try:
            self._client.restart_workers([worker], timeout=HUNG_SECONDS, raise_for_error=False)
        except Exception:  # It has no nanny: the scheduler forgets it when it has been silent for long.
            return


# What a run knows of an item that it has sent to the cluster: how often, where it began, and which workers were lost with it.

MOST_LOSSES = 2
"""An item that loses its process or worker this often is given up."""

MOST_ATTEMPTS = 3
"""An item is sent at most this often, even if it only waited for the workers that were lost."""


@dataclass
class SentItem:
    """An item without an outcome yet."""

    number: int  # its place among the items
    attempt: int = 0  # how often it has been sent
    future: Future[Reply] | None = None  # of its task in this attempt
    begun_on: list[str] = field(default_factory=list)  # workers where it has begun in this attempt, the last one at the end
    began: float = 0.0  # by this machine's clock
    reply: Reply | None = None  # what the worker said of its outcome, before its task was seen to end
    lost_with: list[str] = field(default_factory=list)  # workers that were lost with it, or lost its process, in all attempts
    only_on: frozenset[str] = frozenset()  # the workers with enough memory for it; empty: any

    def loses(self, worker: str) -> bool:
        """Note that it has lost its process or worker; return whether that is often enough to give it up."""
        self.lost_with.append(worker)
        return len(self.lost_with) >= MOST_LOSSES

    @property
    def may_be_sent_again(self) -> bool:
        """Whether it has attempts left."""
        return self.attempt < MOST_ATTEMPTS

    @property
    def where_lost(self) -> str:
        """The workers of its losses as text."""
        return listed(list(dict.fromkeys(self.lost_with)))

    def lost_worker(self) -> Outcome[Any]:
        """Return the outcome of an item whose worker was lost too often."""
        text = f"its worker was lost {MOST_LOSSES} times, on {self.where_lost}: the machine or the job ended, or its memory ran out"
        return Outcome(error=InputError(text), is_lost=True)


# The workers of a cluster as a run sees them: who is there, how many items they take, and who has more memory.

LOOK_SECONDS = 1.0
"""Time between two looks at the cluster."""

NO_WORKER_SECONDS = 120.0
"""A cluster that was started for the run has lost its workers for good if there are none for this long."""


class ClusterWorkers:
    """The workers of a cluster."""

    def __init__(self, connection: Connection, *, one_per_device: bool) -> None:
        self._connection = connection
        self._one_per_device = one_per_device
        self._threads: Mapping[str, int] = {}
        self._described: dict[str, Description] = {}
        self._looked = float("-inf")
        self._last_seen = time.monotonic()
        self._is_waiting = False

    def look(self) -> bool:
        """Ask the scheduler, if the last time was a while ago; return whether it was asked."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return False
        self._threads = self._connection.num_threads()
        self._looked = time.monotonic()
        if self._threads:
            self._last_seen, self._is_waiting = self._looked, False
        elif self._connection.cluster is None and not self._is_waiting:
            self._is_waiting = True
            warnings.warn(f"{self._connection.name} has no workers: waiting for them", RuntimeWarning, stacklevel=2)
        elif self._connection.cluster is not None and self._looked - self._last_seen > NO_WORKER_SECONDS:
            raise InputError("all processes of --workers were lost, and none could be started again")
        return True

    def capacity(self, only_on: Collection[str] = ()) -> int:
        """Return how many items workers can take: one per thread, and one more per worker, to begin without delay."""
        threads = [number for name, number in self._threads.items() if name in only_on or not only_on]
        return max(1, sum(threads) + len(threads))

    def are_gone(self, workers: Collection[str]) -> bool:
        """Return whether none of the workers is there any more."""
        return not set(workers) & set(self._threads)

    def check(self, worker: str, about: Description) -> None:
        """Refuse a worker that begins an item and must not: one that came later than the check of all others."""
        if not self._one_per_device or worker in self._described:
            return
        present = self._connection.num_threads()  # One that was restarted has another address, and its old one is gone.
        self._described = {name: known for name, known in self._described.items() if name in present} | {worker: about}
        check_devices(self._described)

    def larger_than(self, reply: Reply) -> frozenset[str]:
        """Return the workers with more memory per item than the one that replied."""
        if reply.memory is None:
            return frozenset()
        workers = self._connection.client.scheduler_info(n_workers=-1)["workers"]
        # A worker without a limit says 0.
        shares = {name: (about["memory_limit"] or float("inf")) / max(1, about["nthreads"]) for name, about in workers.items()}
        least = shares.get(reply.worker, reply.memory)
        return frozenset(name for name, share in shares.items() if share > least)
