"""A pipeline of three stages: the next items are read while one is computed and the previous one is written.

Few items are in memory: those that `ReadAhead` allows, one that is computed and one that is being written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from crfrefine.runs.execution.read_ahead import Admit, ReadAhead

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
Computed = TypeVar("Computed")


def pipeline(
    items: Iterable[Item],
    read: Callable[[Item, Admit], Loaded | None],
    compute: Callable[[Loaded], Computed | None],
    write: Callable[[Computed], None],
    *,
    stop: threading.Event,
    waiting: Callable[[str], None],
    most_readers: int = 1,
    most_bytes: int = 0,
) -> None:
    """Run the items through the stages; a stage that returns None ends the processing of its item.

    Args:
        items: in the order in which they are read.
        read: the first stage, in other threads.
        compute: the second one, in the caller's thread.
        write: the last one, in a separate thread. An item that it has begun is finished, even after an interrupt.
        stop: when set, no further item is started.
        waiting: called with "reading" or "writing" while computing waits for it.
        most_readers: items that may be read ahead; more than one only where reading is the bottleneck.
        most_bytes: what they may take together; see `ReadAhead`.
    """

    def wait_for(writing: Future[None]) -> None:
        if not writing.done():
            waiting("writing")
        writing.result()

    writer = ThreadPoolExecutor(1, "write")
    ahead = ReadAhead(items, read, stop, most_readers=most_readers, most_bytes=most_bytes)
    try:
        # Start the thread before there is anything to interrupt: an exception while it starts would lose it, and the pool would not
        # wait for the file that it writes.
        writer.submit(int).result()
        writing: Future[None] | None = None
        ahead.start()
        while (loaded := ahead.take(partial(waiting, "reading"))) is not None and not stop.is_set():
            computed = compute(loaded)
            del loaded  # free it while waiting for the next item
            if writing is not None:
                wait_for(writing)
            writing = None if computed is None else writer.submit(write, computed)
            del computed
        if writing is not None:
            wait_for(writing)
        ahead.close(waits=True)
    finally:
        ahead.close(waits=False)
        writer.shutdown(wait=True)
