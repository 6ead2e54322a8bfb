"""The one place that chooses the executor for the cases."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import wait

from crfrefine.runs.execution.executor import HERE, Executor, Item, Outcome, Placement, Result, Started, attempt, ignore, never
from crfrefine.runs.execution.process import LOOK_SECONDS, Limits, WorkerProcess


def make_executor(num_workers: int, placement: Placement = HERE, *, writes_files: bool = False) -> Executor:
    """Return the executor for the cases. An external scheduler gets an entry here; nothing else in the package changes.

    Args:
        num_workers: items at a time.
        placement: a Dask cluster, or a time limit, which needs separate processes.
        writes_files: whether items write files, so that one that is stopped gets time to remove unfinished ones.

    Raises:
        CrfRefineError: the cluster cannot be used: no `distributed`, nobody at the address, other versions of this package.
    """
    if placement.is_cluster:
        return Cluster(placement)
    return Processes(num_workers, Limits(placement.case_timeout), writes_files=writes_files)


# Run a function on many items in separate processes, one item at a time each: if a process is killed, only its item is lost.


class Processes(Executor):
    """Several items at a time.

    Args:
        num_workers: processes at a time; without limits, with one of them or for a single item, everything runs in the caller's thread.
        limits: what an item may take; one that takes more is stopped.
        writes_files: whether items write files: then closing gives them time to remove unfinished ones.
    """

    def __init__(self, num_workers: int, limits: Limits | None = None, *, writes_files: bool = False) -> None:
        self._num_workers = num_workers
        self._limits = limits or Limits()
        self._writes_files = writes_files
        self._workers: list[WorkerProcess] = []

    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        started: Started[Item] = ignore,
        stops: Callable[[Outcome[Result]], bool] = never,
    ) -> Generator[tuple[Item, Outcome[Result]]]:
        """Yield each item with its outcome, as they complete; errors have a note with their traceback."""
        num_workers = min(self._num_workers, len(items))
        if num_workers <= 1 and not self._limits.are_set:
            for item in items:
                started(item)
                outcome: Outcome[Result] = attempt(function, item)
                yield item, outcome
                if stops(outcome):
                    return
            return
        pickled = pickle.dumps(function)
        pending = deque(items)
        given: dict[WorkerProcess, Item] = {}

        def give(worker: WorkerProcess) -> None:
            given[worker] = pending.popleft()
            started(given[worker])
            worker.give(pickle.dumps(given[worker]))

        try:
            while pending or given:
                while pending and len(given) < num_workers:
                    self._workers.append(WorkerProcess(pickled, self._limits, advice="; try fewer --processes" if num_workers > 1 else ""))
                    give(self._workers[-1])
                for worker, content in self._wait(given):
                    item, outcome = given.pop(worker), pickle.loads(content)
                    if stops(outcome):
                        pending.clear()
                    if not worker.is_running or outcome.is_lost or not pending:
                        self._workers.remove(worker)
                        worker.end()
                    else:
                        give(worker)
                    yield item, outcome
        finally:
            self.close()

    def _wait(self, given: dict[WorkerProcess, Item]) -> list[tuple[WorkerProcess, bytes]]:
        """Return the workers that have an outcome; perhaps none yet."""
        ready = wait([worker.connection for worker in given], LOOK_SECONDS if self._limits.are_set else None)
        contents = ((worker, worker.take() if worker.connection in ready else worker.over_limit()) for worker in given)
        return [(worker, content) for worker, content in contents if content is not None]

    def close(self) -> None:
        """Stop the processes, whatever they do."""
        while self._workers:
            worker = self._workers.pop()
            (worker.stop if self._writes_files else worker.kill)()


class Cluster(Executor):
    """One item at a time per thread of the cluster's workers.

    Items may write files: one that is stopped gets time to remove unfinished ones. An item whose worker is lost is tried once more.
    """

    def __init__(self, placement: Placement) -> None:
        from crfrefine.runs.execution.cluster.connection import connect

        self._placement = placement
        self._connection = connect(placement)
        self.threads_per_item = self._connection.threads_per_item
        self.warnings = self._connection.warnings

    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        started: Started[Item] = ignore,
        stops: Callable[[Outcome[Result]], bool] = never,
    ) -> Generator[tuple[Item, Outcome[Result]]]:
        """Yield each item with its outcome, as they complete."""
        from crfrefine.runs.execution.cluster.run import (
            ClusterRun,  # It imports `distributed`, of which `connect` says whether it is there.
        )

        run = ClusterRun(self._connection, self._placement, function, items, started, stops)
        try:
            yield from run.outcomes()
        finally:
            run.close()

    def close(self) -> None:
        """Disconnect; a cluster that was started for this run ends."""
        self._connection.close()
