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
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_START = "import sys; sys.path[:] = sys.argv[2:]; from crfrefine.execution.processes import serve; serve(int(sys.argv[1]))"

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Lost:
    """The process died before it had a result.

    Attributes:
        exit_code: of the process; negative: the signal that ended it.
    """

    exit_code: int | None

    def __str__(self) -> str:
        if self.exit_code is not None and self.exit_code < 0:
            name = signal.Signals(-self.exit_code).name if -self.exit_code in set(signal.Signals) else str(-self.exit_code)
            reason = "; the system does so when memory runs out: try fewer --processes" if name == "SIGKILL" else ""
            return f"its process was ended by {name}{reason}"
        return f"its process ended with status {self.exit_code} before it was measured"


def map_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], num_processes: int
) -> Generator[tuple[Item, Result | Lost], None, None]:
    """Yield each item with its result as they come; with one process, everything happens in this one.

    Args:
        function: of a module that can be imported, so that other processes find it.
        items: that can be pickled.
        num_processes: that work at a time.

    Raises:
        Exception: whatever the function raises, with a note that says where.
    """
    num_processes = min(num_processes, len(items))
    if num_processes <= 1:
        for item in items:
            yield item, function(item)
        return
    pending = deque(items)
    workers: list[_Worker[Item, Result]] = []
    try:
        while pending or workers:
            while pending and len(workers) < num_processes:
                workers.append(_Worker(function))
                workers[-1].give(pending.popleft())
            ready = wait([worker.connection for worker in workers])
            for worker in [worker for worker in workers if worker.connection in ready]:
                item, result = worker.take()
                if isinstance(result, Lost) or not pending:
                    workers.remove(worker)
                    worker.end()
                else:
                    worker.give(pending.popleft())
                yield item, result
    finally:
        for worker in workers:
            worker.kill()


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

    def take(self) -> tuple[Item, Result | Lost]:
        """Return the item and its result, or that the process is lost."""
        item: Any = self._item
        try:
            is_well, value = self.connection.recv()
        except (EOFError, OSError):
            return item, Lost(self._process.wait())
        if not is_well:
            error, where = value
            error.add_note(where)
            raise error
        return item, value

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
            item = connection.recv()
            try:
                answer: Any = (True, function(item))
            except Exception as error:
                answer = (False, (error, traceback.format_exc()))
            connection.send(answer)
