"""The one place that chooses the executor for the cases."""

from __future__ import annotations

from crfrefine.runs.execution.executor import Executor, Serial
from crfrefine.runs.execution.placement import HERE, Placement
from crfrefine.runs.execution.process import Limits
from crfrefine.runs.execution.processes import Processes
from crfrefine.runs.execution.threads import Threads


def make_executor(kind: str, num_workers: int, placement: Placement = HERE, *, writes_files: bool = False) -> Executor:
    """Return the executor for the cases. An external scheduler gets an entry here; nothing else in the package changes.

    Args:
        kind: "threads", which share memory and suit work that releases the interpreter's lock; or "processes", which may die one by one.
        num_workers: items at a time; with one, everything runs in the caller's thread.
        placement: a Dask cluster, or a time limit, which needs separate processes.
        writes_files: whether items write files, so that one that is stopped gets time to remove unfinished ones.

    Raises:
        CrfRefineError: the cluster cannot be used: no `distributed`, nobody at the address, other versions of this package.
    """
    if placement.is_cluster:
        from crfrefine.runs.execution.cluster.executor import Cluster

        return Cluster(placement)
    if placement.case_timeout is not None:
        return Processes(num_workers, Limits(placement.case_timeout), writes_files=writes_files)
    if kind not in ("threads", "processes"):
        raise ValueError(f"unknown executor {kind!r}")
    if num_workers <= 1:
        return Serial()
    return Threads(num_workers) if kind == "threads" else Processes(num_workers, writes_files=writes_files)
