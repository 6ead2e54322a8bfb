"""Run a function on many items in separate processes, one item at a time each: if a process dies, only its item is lost.

The pools of the standard library lose all items when one process dies, their processes outlive a killed parent, and they run
the user's script again, which may not be written for that.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, TypeVar

from crfrefine.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")

_START = "import sys; sys.path[:] = sys.argv[2:]; from crfrefine.runs.processes import serve; serve(int(sys.argv[1]))"

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def map_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], num_processes: int
) -> Generator[tuple[Item, Result | Exception]]:
    """Yield each item with its result or error, as they complete. Closing the generator ends the processes, whatever they do.

    Args:
        function: function of one item, from a module that the processes can import. It writes no files.
        items: the items, which can be pickled.
        num_processes: processes at a time; with one of them, or a single item, everything runs in the caller's thread.
    """
    if min(num_processes, len(items)) <= 1:
        for item in items:
            yield item, _attempt(function, item)
        return
    content, pending, busy = pickle.dumps(function), deque(items), dict[_Process, Item]()
    try:
        while pending or busy:
            while pending and len(busy) < num_processes:
                _give(busy, _Process(content), pending.popleft())
            ready = wait([process.connection for process in busy])
            for process in [process for process in busy if process.connection in ready]:
                item = busy.pop(process)
                outcome: Result | Exception = process.take()
                if pending and process.is_running:
                    _give(busy, process, pending.popleft())
                else:
                    process.end()
                yield item, outcome
    finally:
        for process in busy:
            process.end()


def _give(busy: dict[_Process, Item], process: _Process, item: Item) -> None:
    busy[process] = item
    process.send(pickle.dumps(item))


def _attempt(function: Callable[[Item], Result], item: Item) -> Result | Exception:
    try:
        return function(item)
    except Exception as error:
        return error


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
        """Return the result or the error of its item."""
        try:
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            return InputError(_describe_end(self._process.wait()))

    @property
    def is_running(self) -> bool:
        """Whether the process may get another item."""
        return self._process.poll() is None

    def end(self) -> None:
        """Stop the process, also in the middle of its work."""
        self._process.kill()
        self.connection.close()
        self._process.wait()


def serve(handle: int) -> None:
    """Work until the pipe ends. Runs in the process; the first message is the function, the others are items."""
    threading.Thread(target=_end_with_parent, args=(handle,), daemon=True).start()
    with contextlib.suppress(EOFError, OSError), Connection(handle) as connection:
        function = connection.recv()
        while True:
            outcome = _attempt(function, connection.recv())
            if isinstance(outcome, Exception):  # The traceback object cannot be sent.
                outcome.add_note("".join(traceback.format_exception(outcome)))
            connection.send_bytes(_pickled(outcome))


def _pickled(outcome: object) -> bytes:
    """Return an outcome to be sent; a result or an error that cannot be pickled and restored becomes an error that can."""
    try:
        content = pickle.dumps(outcome)
        if isinstance(outcome, Exception):
            pickle.loads(content)  # Some exceptions cannot be made again from their arguments.
    except Exception as reason:
        is_error = isinstance(outcome, Exception)
        error = RuntimeError(f"{type(outcome).__name__}: {outcome}" if is_error else f"its result cannot be sent: {reason}")
        error.__notes__ = list(map(str, getattr(outcome, "__notes__", ())))
        content = pickle.dumps(error)
    return content


def _end_with_parent(handle: int) -> None:
    """End the process in the middle of its work when the other end of the pipe has gone: a killed parent cannot do so itself."""
    waiting = select.poll()
    waiting.register(handle, 0)  # nothing but the end
    waiting.poll()
    os._exit(0)


def _describe_end(exit_code: int) -> str:
    """Describe the end of a process without a result; a negative code is the signal that ended it."""
    if exit_code >= 0:
        return f"its process ended with status {exit_code} before it was done"
    name = signal.Signals(-exit_code).name if -exit_code in set(signal.Signals) else str(-exit_code)
    reason = "; the system does so when memory runs out; try fewer --processes" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{reason}"
