"""Run a function on many items in separate processes; if a process dies, only its item is lost.

The standard library's pools lose all items when a process dies, outlive a killed parent, and run
the user's script again.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, TypeVar

from crfrefine.base.failures import Failure, describe_failure

Item = TypeVar("Item")
Result = TypeVar("Result")

_START = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from crfrefine.evaluate.processes import serve; serve(int(sys.argv[1]))"
)
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def map_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], num_processes: int
) -> Generator[tuple[Item, Result | Failure]]:
    """Yield each item with its result or failure, as they complete.

    The function is importable and writes no files. Closing the generator ends the processes.
    """
    # One process, or one item, needs no other process.
    if min(num_processes, len(items)) <= 1:
        for item in items:
            yield item, _attempt(function, item)
        return
    content = pickle.dumps(function)
    pending = deque(items)
    busy: dict[_Process, Item] = {}
    idle: list[_Process] = []
    try:
        while pending or busy:
            while pending and len(busy) < num_processes:
                process = idle.pop() if idle else _Process(content)
                process.send(pickle.dumps(pending[0]))
                busy[process] = pending.popleft()
            ready = wait([process.connection for process in busy])
            for process in list(busy):
                if process.connection not in ready:
                    continue
                item = busy.pop(process)
                outcome = process.take()
                if process.is_running():
                    idle.append(process)
                else:
                    process.end()
                yield item, outcome
    finally:
        for process in (*busy, *idle):
            process.end()


def _attempt(function: Callable[[Item], Result], item: Item) -> Result | Failure:
    """Return the result of a function, or the failure that its exception is."""
    try:
        return function(item)
    except Exception as error:
        return describe_failure(error)


class _Process:
    """A process, and this end of the pipe to it. It ends when this process does."""

    def __init__(self, function: bytes) -> None:
        self.connection, other = Pipe()
        with other:  # Closed here, so that the pipe ends when the process does.
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(other.fileno()), *sys.path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, **_ONE_THREAD},
                pass_fds=[other.fileno()],
                process_group=0,  # A Ctrl-C in the terminal does not reach it.
            )
        self.send(function)

    def send(self, message: bytes) -> None:
        """Hand over the function, or an item."""
        with contextlib.suppress(OSError):  # It died while idle: `take` will notice.
            self.connection.send_bytes(message)

    def take(self) -> Any:
        """Return the result or the failure of its item."""
        try:
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            code = self._process.wait()
        why = "below 0: by this signal, as if memory runs out: try fewer --processes"
        return Failure(f"its process ended with status {code} ({why})", "InputError")

    def is_running(self) -> bool:
        """Return whether the process may get another item."""
        return self._process.poll() is None

    def end(self) -> None:
        """Stop the process, also in the middle of its work."""
        self._process.kill()
        self.connection.close()
        self._process.wait()


def serve(handle: int) -> None:
    """Work, in the process, until the pipe ends: the first message is the function, then items."""

    def end_with_parent() -> None:
        """End, even at work, when the other end of the pipe has gone: its parent was killed."""
        waiting = select.poll()
        waiting.register(handle, 0)  # nothing but the end
        waiting.poll()
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError), Connection(handle) as connection:
        function = connection.recv()
        while True:
            outcome = _attempt(function, connection.recv())
            try:
                content = pickle.dumps(outcome)
            except Exception as error:
                failure = Failure(f"its result cannot be sent: {error}", type(error).__name__)
                content = pickle.dumps(failure)
            connection.send_bytes(content)
