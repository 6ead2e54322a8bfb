"""Let a thread prepare the next item while the present one is used."""

from __future__ import annotations

import threading
from collections.abc import Generator
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


class _End:
    """Comes after the last item."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def raise_error(self) -> None:
        """Raise the error, if there is one; nothing here refers to it afterwards, else its traceback would keep an item alive."""
        error, self.error = self.error, None
        try:
            if error is not None:
                raise error
        finally:
            del error


def run_ahead(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """Yield the items of a generator, which runs in a thread and is one item ahead.

    So at most two items exist, a third one only while the caller still holds the last one and asks for the next. The thread ends, and the
    generator is closed, when the items end, when one raises, and when the returned generator is closed or forgotten.

    Args:
        items: not started yet.

    Raises:
        Exception: whatever the generator raises, at the item where it did.
    """
    done: SimpleQueue[T | _End] = SimpleQueue()
    wanted = threading.Semaphore()
    stopped = threading.Event()
    # A daemon: an interpreter that ends does not wait for a caller who forgot to close the generator.
    worker = threading.Thread(target=_work, args=(items, done, wanted, stopped), name="crfrefine-ahead", daemon=True)
    worker.start()
    try:
        while True:
            item = done.get()
            wanted.release()
            if isinstance(item, _End):
                item.raise_error()
                return
            yield item
    finally:
        stopped.set()
        wanted.release()
        worker.join()


def _work(items: Generator[T, None, None], done: SimpleQueue[T | _End], wanted: threading.Semaphore, stopped: threading.Event) -> None:
    end = _End(None)
    try:
        while wanted.acquire() and not stopped.is_set():
            item = next(items, end)
            done.put(item)
            if item is end:
                return
    except BaseException as error:
        end.error = error
        done.put(end)
    finally:
        items.close()
