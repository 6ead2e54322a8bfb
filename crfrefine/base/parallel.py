"""Threads for the files of a case: inflating, decoding and arithmetic release Python's lock."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def run_all(jobs: Sequence[Callable[[], None]], threads: int) -> None:
    """Run the jobs, started in the order given, on at most `threads` threads; raise the error of the first failed job."""
    if threads <= 1 or len(jobs) <= 1:
        for job in jobs:
            job()
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(threads, len(jobs))) as pool:
        for _ in pool.map(lambda job: job(), jobs):  # An error cancels the jobs that have not begun.
            pass


def run_ahead(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """Yield the items of a generator that runs in a thread and is one item ahead; its error is raised at the item where it occurred.

    At most two items exist, a third one only while the caller asks for the next and still holds the last one. The thread ends, and the
    generator is closed, when the items end, when one raises, and when the returned generator is closed or forgotten.
    """
    from concurrent.futures import ThreadPoolExecutor

    end: Any = object()
    pool = ThreadPoolExecutor(1, "crfrefine-ahead")
    coming: Any = None
    try:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item
    finally:
        coming = None  # Else the traceback of an error, which it has, would keep an item alive.
        pool.shutdown()
        items.close()
