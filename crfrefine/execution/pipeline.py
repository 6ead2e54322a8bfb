"""Items through three stages at the same time: the next is read while one is computed and the last is written.

At most one item is read ahead and one is being written, so that few are in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
Computed = TypeVar("Computed")
Value = TypeVar("Value")


def pipeline(
    items: Iterable[Item],
    read: Callable[[Item], Loaded | None],
    compute: Callable[[Loaded], Computed | None],
    write: Callable[[Computed], None],
    *,
    stop: threading.Event,
    waiting: Callable[[str], None],
) -> None:
    """Take the items through the stages; a stage that returns None has done with its item.

    Args:
        items: in the order in which they are read.
        read: the first stage, in a thread of its own.
        compute: the second one, in the caller's thread.
        write: the last one, in a thread of its own. What it has begun is finished, also after an interrupt.
        stop: when set, no further item is begun.
        waiting: told "reading" or "writing" when nothing can be computed because of it.
    """
    pending = iter(items)

    def read_next() -> Loaded | None:
        for item in pending:
            if stop.is_set():
                return None
            loaded = read(item)
            if loaded is not None:
                return loaded
        return None

    def result(future: Future[Value], stage: str) -> Value:
        if not future.done():
            waiting(stage)
        return future.result()

    reader = ThreadPoolExecutor(1, "read")
    writer = ThreadPoolExecutor(1, "write")
    try:
        # The thread must be known to the pool before there is anything to interrupt: an exception while it starts would lose it, and
        # nobody would wait for the file that it writes.
        writer.submit(int).result()
        writing: Future[None] | None = None
        ahead = reader.submit(read_next)
        while (loaded := result(ahead, "reading")) is not None and not stop.is_set():
            ahead = reader.submit(read_next)
            computed = compute(loaded)
            del loaded  # not to be held while the next item is waited for
            if writing is not None:
                result(writing, "writing")
            writing = None if computed is None else writer.submit(write, computed)
            del computed
        if writing is not None:
            result(writing, "writing")
    finally:
        # An item that is being read is left to itself: nobody will take it.
        reader.shutdown(wait=False, cancel_futures=True)
        writer.shutdown(wait=True)
