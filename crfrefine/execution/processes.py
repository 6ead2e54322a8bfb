"""Run a function on many items in separate processes, one item at a time each: if a process is killed, only its item is lost.

The pools of the standard library lose all items when one process dies, their processes outlive a killed parent, and they run
the user's script again, which may not be written for that.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
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
    """Several items at a time. The items write no files, so closing stops them in the middle of their work.

    Args:
        num_workers: processes at a time; a single item runs in this process.
    """

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._workers: list[_Worker[Any, Any]] = []

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Generator[tuple[Item, Outcome[Result]]]:
        """Yield each item with its outcome, as they complete; errors have a note with their traceback."""
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
        """Stop the processes, whatever they do."""
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
                process_group=0,  # Ctrl-C reaches the terminal's whole process group; this process decides about the workers.
            )
        self._send(function)

    def give(self, item: Item) -> None:
        self._item = item
        self._send(item)

    def take(self) -> tuple[Item, Outcome[Result]]:
        """Return the item and its outcome."""
        item: Any = self._item
        try:
            return item, self.connection.recv()
        except (EOFError, OSError):
            return item, Outcome(error=InputError(_describe_end(self._process.wait())), is_lost=True)

    def end(self) -> None:
        """Release the process: it exits at the end of the pipe."""
        self.connection.close()
        self._process.wait()

    def kill(self) -> None:
        """Stop the process in the middle of its work; it writes no files."""
        self._process.kill()
        self.end()

    def _send(self, message: object) -> None:
        with contextlib.suppress(OSError):  # It died while idle: `take` will notice.
            self.connection.send(message)


def serve(handle: int) -> None:
    """Work until the pipe ends. Runs in the process; the first message is the function, the others are items."""
    threading.Thread(target=_end_with_parent, args=(handle,), daemon=True).start()
    with contextlib.suppress(EOFError, OSError), Connection(handle) as connection:
        function = connection.recv()
        while True:
            outcome = attempt(function, connection.recv())
            if outcome.error is not None:  # The traceback object cannot be sent.
                outcome.error.add_note("".join(traceback.format_exception(outcome.error)))
            connection.send(outcome)


def _end_with_parent(handle: int) -> None:
    """End the process in the middle of its work when the other end of the pipe has gone: a killed parent cannot do so itself."""
    if hasattr(select, "poll"):
        waiting = select.poll()
        waiting.register(handle, 0)  # nothing but the end
        waiting.poll()
        os._exit(0)


def _describe_end(exit_code: int) -> str:
    """Describe the end of a process without a result; a negative code is the signal that ended it."""
    if exit_code >= 0:
        return f"its process ended with status {exit_code} before it was measured"
    name = signal.Signals(-exit_code).name if -exit_code in set(signal.Signals) else str(-exit_code)
    reason = "; the system does so when memory runs out; try fewer --processes" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{reason}"
