"""The workers of a cluster as a run sees them: who is there, how many items they take, and who has more memory."""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from crfrefine.errors import InputError
from crfrefine.runs.execution.cluster.connection import check_devices

if TYPE_CHECKING:
    from crfrefine.runs.execution.cluster.connection import Connection
    from crfrefine.runs.execution.cluster.on_worker import Description, Reply

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
