"""Cases side by side: in threads where there are enough of them, else one after the other with all threads inside the engine.

On a GPU one case at a time: it keeps the GPU busy by itself, and several would share its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Runs a function on several items; the engine and torch release the interpreter's lock while they compute.

    Args:
        threads: how many may run at a time.
        one_by_one: whether what runs on the device runs one at a time.
    """

    def __init__(self, threads: int, *, one_by_one: bool = False) -> None:
        self.threads = threads
        self._one_by_one = one_by_one
        self._pool = ThreadPoolExecutor(threads, "train")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def run_on_device(self, function: Callable[[Item, int], Result], items: Sequence[Item]) -> list[Result]:
        """As `run`, for what the model computes."""
        return [function(item, self.threads) for item in items] if self._one_by_one else self.run(function, items)

    def run(self, function: Callable[[Item, int], Result], items: Sequence[Item]) -> list[Result]:
        """Return `function(item, threads)` of each item, in order; the second argument is how many threads that call may use."""
        if len(items) < self.threads or self.threads == 1:
            return [function(item, self.threads) for item in items]
        futures = [self._pool.submit(function, item, 1) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise
