"""Run a function on many items: the outcome of each item, where and how long it is computed, and the executor interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Placement:
    """Where the cases of a run are computed, and how long each may take: the same for all commands."""

    workers: int | None = None  # processes of a Dask cluster that the run starts on this machine and stops
    dask: str | None = None  # address of a running Dask scheduler, `tcp://…` or `tls://…`, or its scheduler file
    case_timeout: float | None = None  # seconds after which a case is given up
    threads: int | None = None  # per case; None: the share that the worker has
    max_memory: int | None = None  # bytes of the run, which local workers share; on another cluster, per case. None: what is there
    one_per_device: bool = False  # whether cases are computed on GPUs, of which each gets one case at a time

    @property
    def is_cluster(self) -> bool:
        """Whether the cases are tasks of a Dask cluster."""
        return self.workers is not None or self.dask is not None


HERE = Placement()
"""In this process, or as the command chooses."""


class Executor(ABC):
    """Runs functions on items, in a `with` block.

    If the block ends early, by an error or Ctrl-C, pending work is dropped, and work in progress is stopped.

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

    @abstractmethod
    def close(self) -> None:
        """Stop the remaining work."""
