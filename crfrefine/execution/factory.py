"""The one place that chooses who runs the cases."""

from __future__ import annotations

from crfrefine.execution.executor import Executor, Serial
from crfrefine.execution.processes import Processes
from crfrefine.execution.threads import Threads


def make_executor(kind: str, num_workers: int) -> Executor:
    """Return whoever runs the cases; an external scheduler gets its entry here, and nothing else in the package changes.

    Args:
        kind: "threads", which share memory and suit work that releases the interpreter's lock; or "processes", one of which may die.
        num_workers: items at a time; with one, everything happens where the caller is.
    """
    kinds = {"threads": Threads, "processes": Processes}
    if kind not in kinds:
        raise ValueError(f"unknown executor {kind!r}")
    return kinds[kind](num_workers) if num_workers > 1 else Serial()
