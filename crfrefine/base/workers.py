"""Threads: every one that this package starts is one of these."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

T = TypeVar("T")

_NICENESS = 10  # more than that of others: of threads whose results are not waited for


def thread_pool(num_threads: int, name: str, *, gives_way: bool = False) -> ThreadPoolExecutor:
    """Return a pool of threads, whose name debuggers show.

    One that gives way takes the time that other threads and processes leave.
    """
    # The import takes a hundredth of a second, and `--help` does without.
    from concurrent.futures import ThreadPoolExecutor

    # In Linux niceness is a property of each thread, which those that it starts inherit.
    niceness = _NICENESS if gives_way else 0
    return ThreadPoolExecutor(num_threads, name, os.nice, (niceness,))


def run_beside(function: Callable[[], object]) -> None:
    """Run a function in a thread that nothing waits for, not even the end of the program."""
    threading.Thread(target=function, daemon=True).start()


def run_all(jobs: Sequence[Callable[[], object]], threads: int) -> None:
    """Run the jobs on at most `threads` threads, started in their order.

    Raises the error of the first job that failed; jobs that have not begun by then do not run.
    """
    if threads <= 1 or len(jobs) <= 1:
        for job in jobs:
            job()
        return
    with thread_pool(min(threads, len(jobs)), "job") as pool:
        for _ in pool.map(lambda job: job(), jobs):
            pass


def run_ahead(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """Yield the items of a generator that runs one item ahead in a thread, and raise its error."""
    # At most two items exist, a third one only while the caller asks for the next and still holds
    # the last one. The thread ends, and the generator is closed, when the items end, when one
    # raises, and when the returned generator is closed or forgotten.
    end: Any = object()
    pool = thread_pool(1, "one ahead")
    next_item: Any = None
    try:
        next_item = pool.submit(next, items, end)
        while (item := next_item.result()) is not end:
            next_item = pool.submit(next, items, end)
            yield item
    finally:
        next_item = None  # The traceback of an error in it would keep an item alive.
        pool.shutdown()
        items.close()
