"""Run cases in parallel threads if there are enough of them; else one after the other, with all threads inside the engine.

A GPU gets one case at a time: one keeps it busy, and several would share its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Divides threads between items and the computation of each; the engine and torch release the interpreter's lock while they compute.

    Args:
        threads: number of threads.
        one_by_one: whether device computations run one at a time.
        check: called before each item, perhaps in another thread; its exception ends the work.
    """

    def __init__(self, threads: int, *, one_by_one: bool = False, check: Callable[[], None] = lambda: None) -> None:
        self.threads = threads
        self._one_by_one = one_by_one
        self._check = check
        self._pool = ThreadPoolExecutor(threads, "case")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def run_on_device(self, function: Callable[[Item, int], Result], items: Sequence[Item]) -> list[Result]:
        """Like `run`, for computations of the model."""
        return self.run_one_by_one(function, items) if self._one_by_one else self.run(function, items)

    def run_one_by_one(self, function: Callable[[Item, int], Result], items: Sequence[Item]) -> list[Result]:
        """Like `run`, one item after the other with all threads."""
        return [self._checked(function, item, self.threads) for item in items]

    def run(self, function: Callable[[Item, int], Result], items: Sequence[Item]) -> list[Result]:
        """Return `function(item, threads)` of each item, in order; the second argument is the number of threads that the call may use.

        If several items fail, the error of the first item is raised; items that have not begun are dropped.
        """
        if len(items) < self.threads or self.threads == 1:
            return self.run_one_by_one(function, items)
        return list(self._pool.map(lambda item: self._checked(function, item, 1), items))

    def _checked(self, function: Callable[[Item, int], Result], item: Item, threads: int) -> Result:
        self._check()
        return function(item, threads)
