"""Run cases in parallel threads if there are enough of them; else one after the other, with all threads inside the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers(ThreadPoolExecutor):
    """Divides threads between items and the computation of each; the engine and torch release the interpreter's lock while they compute.

    With `one_by_one`, computations of the model run one at a time: a case keeps a GPU busy, and several would share its memory.
    """

    def __init__(self, threads: int, *, one_by_one: bool = False) -> None:
        super().__init__(threads, "case")
        self.threads, self._one_by_one = threads, one_by_one

    def run_on_device(self, function: Callable[[Item, int], Result], items: Sequence[Item]) -> list[Result]:
        """Like `run`, for computations of the model."""
        return self.run(function, items, one_by_one=self._one_by_one)

    def run(self, function: Callable[[Item, int], Result], items: Sequence[Item], *, one_by_one: bool = False) -> list[Result]:
        """Return `function(item, threads)` of each item, in order; the second argument is the number of threads that the call may use.

        If several items fail, the error of the first item is raised; items that have not begun are dropped.
        """
        if one_by_one or len(items) < self.threads or self.threads == 1:
            return [function(item, self.threads) for item in items]
        return list(self.map(lambda item: function(item, 1), items))
