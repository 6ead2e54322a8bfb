"""The threads of a training: items of work side by side, for parts of a run side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, wait
from typing import Self, TypeVar

from crfrefine.base.limits import thread_pool

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Threads that compute items of work, such as the gradients of the crops of a batch.

    Items run side by side, those of all parts of a run together, and share the threads evenly: an
    item gets more than one where there are fewer items than threads. With `one_by_one`, as on a
    GPU, models run one at a time.
    """

    def __init__(self, threads: int, *, one_by_one: bool = False) -> None:
        self.threads = threads
        self._one_by_one = one_by_one
        self._max_items = threads  # items that run at a time, at most
        self._pool = thread_pool(threads, "case")
        self._lock = threading.Lock()
        self._num_unfinished = 0  # items that wait or run
        self._is_alone = threading.RLock()  # held by the item that gets all threads
        self._is_over = threading.Event()  # set when a part has failed, or was interrupted

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._pool.shutdown(cancel_futures=True)

    def limit(self, num_items: int) -> None:
        """Let at most so many items run at a time, as memory may ask for; none may run now."""
        self._max_items = max(1, min(num_items, self.threads))
        self._pool.shutdown()
        self._pool = thread_pool(self._max_items, "case")

    def run_on_device(
        self, function: Callable[[Item, int], Result], items: Sequence[Item]
    ) -> list[Result]:
        """Like `run`, for computations of the model."""
        return self.run(function, items, one_by_one=self._one_by_one)

    def run(
        self,
        function: Callable[[Item, int], Result],
        items: Sequence[Item],
        *,
        one_by_one: bool = False,
    ) -> list[Result]:
        """Return `function(item, number of threads)` of each item, in order.

        The first item's error is raised.
        """
        return list(self.iterate(function, items, one_by_one=one_by_one))

    def iterate(
        self,
        function: Callable[[Item, int], Result],
        items: Sequence[Item],
        *,
        one_by_one: bool = False,
    ) -> Iterator[Result]:
        """Like `run`, for results that are looked at one after the other.

        Raise CancelledError if another part of the run has failed or was interrupted.
        """
        if one_by_one or self.threads == 1:
            for item in items:
                with self._is_alone:
                    self.check()
                    result = function(item, self.threads)
                yield result
            return

        with self._lock:  # All count before the first begins, so that it does not take all threads.
            self._num_unfinished += len(items)

        def compute(item: Item) -> Result:
            self.check()
            with self._lock:
                num_items = min(self._num_unfinished, self._max_items)
            # The threads are divided evenly between the items.
            return function(item, max(1, self.threads // max(1, num_items)))

        def end(_: Future[Result]) -> None:
            with self._lock:
                self._num_unfinished -= 1

        futures = []
        for item in items:
            future = self._pool.submit(compute, item)
            future.add_done_callback(end)
            futures.append(future)
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()

    def check(self) -> None:
        """Raise CancelledError if a part has failed, or the run was interrupted."""
        if self._is_over.is_set():
            raise CancelledError

    def run_parts(self, function: Callable[[Item], Result], parts: Sequence[Item]) -> list[Result]:
        """Return `function(part)` of each part of a run, in order.

        The parts run side by side, at most as many as there are threads; they only wait for their
        items, so that these may be parts of parts. If one fails, the others end before their next
        item, and its error is raised.
        """
        if self._one_by_one or self.threads == 1 or len(parts) < 2:
            return [function(part) for part in parts]
        with thread_pool(min(len(parts), self.threads), "part") as drivers:
            futures = [drivers.submit(function, part) for part in parts]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                for future in futures:
                    # The error of a part that failed by itself, not because another one did.
                    error = future.exception() if future.done() else None
                    if error is not None and not isinstance(error, CancelledError):
                        raise error
                return [future.result() for future in futures]
            except BaseException:
                self._is_over.set()
                for future in futures:
                    future.cancel()
                raise
