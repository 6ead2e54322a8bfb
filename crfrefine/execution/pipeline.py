"""A pipeline of three stages: the next item is read while one is computed and the previous one is written.

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
    """Run the items through the stages; a stage that returns None ends the processing of its item.

    Args:
        items: in the order in which they are read.
        read: the first stage, in a separate thread.
        compute: the second one, in the caller's thread.
        write: the last one, in a separate thread. An item that it has begun is finished, even after an interrupt.
        stop: when set, no further item is started.
        waiting: called with "reading" or "writing" while computing waits for it.
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
        # Start the thread before there is anything to interrupt: an exception while it starts would lose it, and the pool would not
        # wait for the file that it writes.
        writer.submit(int).result()
        writing: Future[None] | None = None
        ahead = reader.submit(read_next)
        while (loaded := result(ahead, "reading")) is not None and not stop.is_set():
            ahead = reader.submit(read_next)
            computed = compute(loaded)
            del loaded  # free it while waiting for the next item
            if writing is not None:
                result(writing, "writing")
            writing = None if computed is None else writer.submit(write, computed)
            del computed
        if writing is not None:
            result(writing, "writing")
    finally:
        # Do not wait for an item that is being read: it is no longer needed.
        reader.shutdown(wait=False, cancel_futures=True)
        writer.shutdown(wait=True)
