"""The one place that chooses the executor for the cases."""

from __future__ import annotations

from crfrefine.execution.executor import Executor, Serial
from crfrefine.execution.processes import Processes
from crfrefine.execution.threads import Threads


def make_executor(kind: str, num_workers: int) -> Executor:
    """Return the executor for the cases. An external scheduler gets an entry here; nothing else in the package changes.

    Args:
        kind: "threads", which share memory and suit work that releases the interpreter's lock; or "processes", which may die one by one.
        num_workers: items at a time; with one, everything runs in the caller's thread.
    """
    kinds = {"threads": Threads, "processes": Processes}
    if kind not in kinds:
        raise ValueError(f"unknown executor {kind!r}")
    return kinds[kind](num_workers) if num_workers > 1 else Serial()
