"""Run a function on many items on a Dask cluster. `run.py` has the tasks of a call, `connection.py` the cluster, `on_worker.py` its end."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from crfrefine.runs.execution.cluster.connection import connect
from crfrefine.runs.execution.executor import Executor, Item, Outcome, Result, Started, ignore, never
from crfrefine.runs.execution.placement import Placement


class Cluster(Executor):
    """One item at a time per thread of the cluster's workers.

    Items may write files: one that is stopped gets time to remove unfinished ones. An item whose worker is lost is tried once more.
    """

    def __init__(self, placement: Placement) -> None:
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
