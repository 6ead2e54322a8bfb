"""Run a function on many items in separate processes; if a process dies, its item is tried again.

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
from collections import deque
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, TypeVar

from crfrefine.base.failures import Failure, describe_failure
from crfrefine.base.limits import run_beside

Item = TypeVar("Item")
Result = TypeVar("Result")

_WORKER_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from crfrefine.evaluate.processes import serve; serve(int(sys.argv[1]))"
)
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def map_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], num_processes: int
) -> Generator[tuple[Item, Result | Failure]]:
    """Yield each item with its result or failure, as they complete.

    An item whose process died is tried once more, after those that wait: memory may have run out
    beside others. The function must be importable and write no files. Closing the generator ends
    the processes.
    """
    # One process or one item needs no worker process.
    if min(num_processes, len(items)) <= 1:
        for item in items:
            yield item, _attempt(function, item)
        return
    pickled_function = pickle.dumps(function)
    pending = deque((item, True) for item in items)  # with whether it may be tried again
    busy: dict[_Process, tuple[Item, bool]] = {}
    idle: list[_Process] = []
    try:
        while pending or busy:
            while pending and len(busy) < num_processes:
                process = idle.pop() if idle else _Process(pickled_function)
                busy[process] = pending.popleft()
                process.send(pickle.dumps(busy[process][0]))
            ready = wait([process.connection for process in busy])
            for process in list(busy):
                if process.connection not in ready:
                    continue
                item, may_try_again = busy.pop(process)
                try:
                    outcome = process.take()
                    idle.append(process)
                except (EOFError, OSError):
                    outcome = process.describe_death()
                    process.end()
                    if may_try_again:
                        pending.append((item, False))
                        continue
                yield item, outcome
    finally:
        for process in (*busy, *idle):
            process.end()


def _attempt(function: Callable[[Item], Result], item: Item) -> Result | Failure:
    """Return the result of a function, or its exception as a failure."""
    try:
        return function(item)
    except Exception as error:
        return describe_failure(error)


class _Process:
    """A worker process, and our end of the pipe to it. The worker ends when this process does."""

    def __init__(self, pickled_function: bytes) -> None:
        self.connection, worker_end = Pipe()
        with worker_end:  # Closed here, so that the pipe ends when the worker does.
            self._process = subprocess.Popen(
                [sys.executable, "-c", _WORKER_PROGRAM, str(worker_end.fileno()), *sys.path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, **_ONE_THREAD},
                pass_fds=[worker_end.fileno()],
                process_group=0,  # A Ctrl-C in the terminal does not reach the worker.
            )
        self.send(pickled_function)

    def send(self, message: bytes) -> None:
        """Hand over the function, or an item."""
        with contextlib.suppress(OSError):  # The worker died while idle: `take` will notice.
            self.connection.send_bytes(message)

    def take(self) -> Any:
        """Return the result of the worker's item, or its failure.

        Raise EOFError or OSError if the worker has died.
        """
        return pickle.loads(self.connection.recv_bytes())

    def describe_death(self) -> Failure:
        """Return the failure of the item at which the worker died."""
        code = self._process.wait()
        why = "below 0: by this signal, as if memory runs out: try fewer --processes"
        return Failure(f"its process ended with status {code} ({why})", "InputError")

    def end(self) -> None:
        """Stop the process, also in the middle of its work."""
        self._process.kill()
        self.connection.close()
        self._process.wait()


def serve(handle: int) -> None:
    """Work as a worker until the pipe ends; the first message is the function, others are items."""

    def end_with_parent() -> None:
        """End the worker, even at work, once the parent has closed its end of the pipe or died."""
        waiting = select.poll()
        waiting.register(handle, 0)  # 0: only the end of the pipe is waited for
        waiting.poll()
        os._exit(0)

    run_beside(end_with_parent)
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
