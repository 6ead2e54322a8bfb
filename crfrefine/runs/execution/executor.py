"""Run a function on many items: the outcome of each item, and the executor interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Generic, Self, TypeAlias, TypeVar, cast

from crfrefine.base.failures import Failure, describe_failure

Item = TypeVar("Item")
Result = TypeVar("Result")
Started: TypeAlias = Callable[[Item], object]
"""Called with an item when work on it begins."""


def ignore(*arguments: object) -> None:
    """Nobody is told."""


def never(outcome: object) -> bool:
    """No outcome is a reason to stop."""
    return False


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """The outcome of an item."""

    result: Result | None = None
    error: Exception | None = None  # what the function raised, or the fate of the worker
    is_lost: bool = False  # whether the worker died before it had a result

    @property
    def failure(self) -> Failure | None:
        """The error as a message."""
        return None if self.error is None else describe_failure(self.error)

    def get(self) -> Result:
        """Return the result, or raise the error."""
        if self.error is not None:
            raise self.error
        return cast("Result", self.result)


def attempt(function: Callable[[Item], Result], item: Item) -> Outcome[Result]:
    """Return the outcome of an item; only interrupts propagate."""
    try:
        return Outcome(function(item))
    except Exception as error:
        return Outcome(error=error)


class Executor(ABC):
    """Runs functions on items, in a `with` block.

    If the block ends early, by an error or Ctrl-C, pending work is dropped; work in progress is stopped if that loses nothing
    (processes), else waited for (threads).

    Attributes:
        threads_per_item: CPU threads that each item has; None: as many as the caller gives it.
        warnings: what the user must know of its security, one sentence each.
    """

    threads_per_item: int | None = None
    warnings: tuple[str, ...] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @abstractmethod
    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        started: Started[Item] = ignore,
        stops: Callable[[Outcome[Result]], bool] = never,
    ) -> Generator[tuple[Item, Outcome[Result]]]:
        """Yield each item with its outcome, as they complete; an error affects only its item.

        Args:
            function: function of one item; for processes, from a module that they can import.
            items: the items; for processes, they must be picklable.
            started: called with each item when work on it begins, perhaps in another thread, and again if it is tried again.
            stops: whether no further item is begun after an outcome, perhaps called in another thread; those that have begun, or were
                sent to a cluster, are finished, and have outcomes.
        """

    def results(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Return the results in the order of the items, or raise the error of the first one that failed."""
        results: list[Result] = []
        waiting: dict[int, Outcome[Result]] = {}
        with closing(self.map(partial(_of_numbered, function), list(enumerate(items)))) as outcomes:
            for (number, _), outcome in outcomes:
                waiting[number] = outcome
                while len(results) in waiting:
                    results.append(waiting.pop(len(results)).get())
        return results

    @abstractmethod
    def close(self) -> None:
        """Stop the remaining work."""


class Serial(Executor):
    """One item after the other, in the caller's thread."""

    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        started: Started[Item] = ignore,
        stops: Callable[[Outcome[Result]], bool] = never,
    ) -> Generator[tuple[Item, Outcome[Result]]]:
        """Yield each item with its outcome, in order."""
        for item in items:
            started(item)
            outcome = attempt(function, item)
            yield item, outcome
            if stops(outcome):
                return

    def close(self) -> None:
        """There is no remaining work."""


def _of_numbered(function: Callable[[Item], Result], numbered: tuple[int, Item]) -> Result:
    return function(numbered[1])
