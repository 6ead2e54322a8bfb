"""A function on many items in processes of their own, one item at a time each: a process that is killed costs its item and no other.

The pools of the standard library give up all items when one process dies, their processes outlive a parent that was killed, and they run
the user's script again, which need not be written for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, Generic

from crfrefine.errors import InputError
from crfrefine.execution.executor import Executor, Item, Outcome, Result, Serial, attempt

_START = "import sys; sys.path[:] = sys.argv[2:]; from crfrefine.execution.processes import serve; serve(int(sys.argv[1]))"

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Processes(Executor):
    """Several items at a time, none of which writes files: closing ends them in the middle of their work.

    Args:
        num_workers: processes at a time; for a single item, everything happens in this one.
    """

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._workers: list[_Worker[Any, Any]] = []

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Generator[tuple[Item, Outcome[Result]]]:
        """Yield each item with what came of it, as they come; an error has a note that says where it was raised."""
        num_workers = min(self._num_workers, len(items))
        if num_workers <= 1:
            yield from Serial().map(function, items)
            return
        pending = deque(items)
        workers = self._workers
        try:
            while pending or workers:
                while pending and len(workers) < num_workers:
                    workers.append(_Worker(function))
                    workers[-1].give(pending.popleft())
                ready = wait([worker.connection for worker in workers])
                for worker in [worker for worker in workers if worker.connection in ready]:
                    item, outcome = worker.take()
                    if outcome.is_lost or not pending:
                        workers.remove(worker)
                        worker.end()
                    else:
                        worker.give(pending.popleft())
                    yield item, outcome
        finally:
            self.close()

    def close(self) -> None:
        """End the processes, whatever they do."""
        while self._workers:
            self._workers.pop().kill()


class _Worker(Generic[Item, Result]):
    """A process, and this end of the pipe to it."""

    def __init__(self, function: Callable[[Item], Result]) -> None:
        self.connection, other = Pipe()
        self._item: Item | None = None
        with other:  # Closed here, so that the pipe ends when the process does.
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(other.fileno()), *sys.path],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, **_ONE_THREAD},
                process_group=0,  # Ctrl-C goes to all of a terminal's group: what becomes of the others is decided here.
            )
        self._send(function)

    def give(self, item: Item) -> None:
        self._item = item
        self._send(item)

    def take(self) -> tuple[Item, Outcome[Result]]:
        """Return the item and what came of it."""
        item: Any = self._item
        try:
            return item, self.connection.recv()
        except (EOFError, OSError):
            return item, Outcome(error=InputError(_describe_end(self._process.wait())), is_lost=True)

    def end(self) -> None:
        """Let the process go: at the end of the pipe it ends by itself."""
        self.connection.close()
        self._process.wait()

    def kill(self) -> None:
        """End the process in the middle of its work; it writes no files."""
        self._process.kill()
        self.end()

    def _send(self, message: object) -> None:
        with contextlib.suppress(OSError):  # It died while it had nothing to do: `take` will see it.
            self.connection.send(message)


def serve(handle: int) -> None:
    """Work until the pipe ends. Runs in the process; the first message is the function, the others are items."""
    with contextlib.suppress(EOFError, OSError), Connection(handle) as connection:
        function = connection.recv()
        while True:
            outcome = attempt(function, connection.recv())
            if outcome.error is not None:  # Its traceback stays behind.
                outcome.error.add_note("".join(traceback.format_exception(outcome.error)))
            connection.send(outcome)


def _describe_end(exit_code: int) -> str:
    """Return what became of a process before it had a result; negative: the signal that ended it."""
    if exit_code >= 0:
        return f"its process ended with status {exit_code} before it was measured"
    name = signal.Signals(-exit_code).name if -exit_code in set(signal.Signals) else str(-exit_code)
    reason = "; the system does so when memory runs out: try fewer --processes" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{reason}"
