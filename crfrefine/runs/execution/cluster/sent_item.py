"""What a run knows of an item that it has sent to the cluster: how often, where it began, and which workers were lost with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from crfrefine.base.text import listed
from crfrefine.errors import InputError
from crfrefine.runs.execution.executor import Outcome

if TYPE_CHECKING:
    from distributed import Future

    from crfrefine.runs.execution.cluster.on_worker import Reply

MOST_LOSSES = 2
"""An item that loses its process or worker this often is given up."""

MOST_ATTEMPTS = 3
"""An item is sent at most this often, even if it only waited for the workers that were lost."""


@dataclass
class SentItem:
    """An item without an outcome yet.

    Attributes:
        number: its place among the items.
        attempt: how often it has been sent.
        future: of its task in this attempt.
        begun_on: workers where it has begun in this attempt, the last one at the end.
        began: when, by this machine's clock.
        reply: what the worker said of its outcome, before its task was seen to end.
        lost_with: workers that were lost with it, or lost its process, in all attempts.
        only_on: the workers with enough memory for it; empty: any.
    """

    number: int
    attempt: int = 0
    future: Future[Reply] | None = None
    begun_on: list[str] = field(default_factory=list)
    began: float = 0.0
    reply: Reply | None = None
    lost_with: list[str] = field(default_factory=list)
    only_on: frozenset[str] = frozenset()

    def begin_attempt(self) -> None:
        """It is sent once more."""
        self.attempt += 1
        self.future, self.begun_on, self.began, self.reply = None, [], 0.0, None

    def loses(self, worker: str) -> bool:
        """Note that it has lost its process or worker; return whether that is often enough to give it up."""
        self.lost_with.append(worker)
        return len(self.lost_with) >= MOST_LOSSES

    @property
    def may_be_sent_again(self) -> bool:
        """Whether it has attempts left."""
        return self.attempt < MOST_ATTEMPTS

    @property
    def where_lost(self) -> str:
        """The workers of its losses as text."""
        return listed(list(dict.fromkeys(self.lost_with)))

    def lost_worker(self) -> Outcome[Any]:
        """Return the outcome of an item whose worker was lost too often."""
        text = f"its worker was lost {MOST_LOSSES} times, on {self.where_lost}: the machine or the job ended, or its memory ran out"
        return Outcome(error=InputError(text), is_lost=True)

    def lost_process(self, error: Exception | None) -> Outcome[Any]:
        """Return the outcome of an item whose process died too often; the error says how, the last time."""
        return Outcome(error=InputError(f"{error}; tried {MOST_LOSSES} times, on {self.where_lost}"), is_lost=True)
