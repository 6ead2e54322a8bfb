"""A separate process that works on one item at a time: if it dies, or takes more than it may, only its item is lost.

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
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Pipe
from pathlib import Path
from types import FrameType
from typing import Any

from crfrefine.base.memory import format_size
from crfrefine.errors import CapacityError, InputError
from crfrefine.runs.execution.executor import Outcome, attempt

if sys.platform == "win32":
    from multiprocessing.connection import PipeConnection as PipeEnd
else:
    from multiprocessing.connection import Connection as PipeEnd

_START = "import sys; sys.path[:] = sys.argv[2:]; from crfrefine.runs.execution.process import serve; serve(int(sys.argv[1]))"

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

LOOK_SECONDS = 0.2
"""Time between two looks at what a process takes."""

START_SECONDS = 600.0
"""Longest time for a process to start; it does not count as time of its first item."""

READY = b""
"""What a process sends once it has imported the function."""

GRACE_SECONDS = 3.0
"""Time for a process to remove the file that it is writing before it is killed."""


@dataclass(frozen=True)
class Limits:
    """What an item may take before its process is ended; None: no limit."""

    seconds: float | None = None  # from the start of the item
    memory: int | None = None  # bytes of the process in physical memory
    memory_source: str = ""  # what sets this limit, a phrase for messages

    @property
    def are_set(self) -> bool:
        """Whether there is a limit."""
        return self.seconds is not None or self.memory is not None


@dataclass(frozen=True)
class Surroundings:
    """Where a process runs."""

    folder: str | None = None  # the working folder; None: that of this process
    environment: Mapping[str, str] = field(default_factory=dict)  # variables besides those of this process


class WorkerProcess:
    """A process, and this end of the pipe to it. It ends when this process does.

    Args:
        function: pickled function of one item, from a module that the process can import.
        limits: of each item.
        surroundings: where it runs.
        advice: what to do where the system killed the process, such as "; try fewer cases at a time".

    Raises:
        InputError: the process cannot be started, such as in a folder that does not exist.
    """

    def __init__(self, function: bytes, limits: Limits | None = None, surroundings: Surroundings | None = None, advice: str = "") -> None:
        self._advice = advice
        self._limits = limits or Limits()
        surroundings = surroundings or Surroundings()
        self._ends = 0.0
        self._is_ready = False
        self.connection, other = Pipe()
        with other:  # Closed here, so that the pipe ends when the process does.
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _START, str(other.fileno()), *sys.path],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env={**os.environ, **_ONE_THREAD, **surroundings.environment},
                    cwd=surroundings.folder,
                    **_in_group_of_its_own(other.fileno()),
                )
            except OSError as error:
                self.connection.close()
                raise InputError(f"{error.filename or sys.executable}: no process can be started there: {error.strerror}") from error
        self._send(function)

    def give(self, item: bytes) -> None:
        """Hand over the next item, pickled."""
        if self._limits.seconds is not None:
            self._ends = time.monotonic() + (self._limits.seconds if self._is_ready else START_SECONDS)
        self._send(item)

    def take(self) -> bytes | None:
        """Return the pickled outcome of the item, or None if the process has only begun with it; wait if there is neither."""
        try:
            content = self.connection.recv_bytes()
            if content == READY:
                self._is_ready = True
                self._ends = time.monotonic() + (self._limits.seconds or 0.0)
                return None
            return content
        except (EOFError, OSError):
            return pickle.dumps(Outcome[object](error=InputError(_describe_end(self._process.wait(), self._advice)), is_lost=True))

    def run(self, item: bytes) -> bytes:
        """Return the pickled outcome of an item; the process is ended if the item takes more than it may."""
        self.give(item)
        outcome = None
        while outcome is None:
            has_message = self.connection.poll(LOOK_SECONDS if self._limits.are_set else None)
            outcome = self.take() if has_message else self.over_limit()
        return outcome

    def over_limit(self) -> bytes | None:
        """Return the pickled outcome of an item that takes more than it may, and end the process; None: it may go on."""
        limits = self._limits
        error: Exception
        if limits.seconds is not None and time.monotonic() > self._ends:
            error = InputError(f"took longer than the {limits.seconds:g} s of --case-timeout and was stopped")
        elif limits.memory is not None and (taken := _resident(self._process.pid)) > limits.memory:
            most = f"{format_size(limits.memory)} of {limits.memory_source}"
            error = CapacityError(f"took {format_size(taken)} of memory, more than the {most}, and was stopped")
        else:
            return None
        self.stop()
        return pickle.dumps(Outcome[object](error=error))

    @property
    def is_running(self) -> bool:
        """Whether the process may get another item."""
        return not self.connection.closed and self._process.poll() is None

    def end(self) -> None:
        """Release the process: it exits at the end of the pipe."""
        self.connection.close()
        self._process.wait()

    def stop(self) -> None:
        """Stop the process in the middle of its work, with a little time to remove a file that it is writing."""
        self._process.terminate()
        try:
            self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self.end()

    def interrupt(self) -> None:
        """Tell the process to stop, from any thread; it removes a file that it is writing. Killed soon if it does not."""
        self._process.terminate()
        killing = threading.Timer(GRACE_SECONDS, self._process.kill)
        killing.daemon = True
        killing.start()

    def kill(self) -> None:
        """Stop the process in the middle of its work, if it writes no files."""
        self._process.kill()
        self.end()

    def _send(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # It died while idle: `take` will notice.
            self.connection.send_bytes(message)


def _in_group_of_its_own(handle: int) -> dict[str, Any]:
    """Return the arguments of a process that gets one end of a pipe, and that a Ctrl-C in the terminal does not reach."""
    if sys.platform == "win32":
        os.set_handle_inheritable(handle, True)
        inherited = subprocess.STARTUPINFO(lpAttributeList={"handle_list": [handle]})
        return {"startupinfo": inherited, "creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    else:
        return {"pass_fds": [handle], "process_group": 0}


def serve(handle: int) -> None:
    """Work until the pipe ends. Runs in the process; the first message is the function, the others are items."""
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_end_with_parent, args=(handle,), daemon=True).start()
    with contextlib.suppress(EOFError, OSError), PipeEnd(handle) as connection:
        function = connection.recv()
        connection.send_bytes(READY)
        while True:
            outcome = attempt(function, connection.recv())
            if outcome.error is not None:  # The traceback object cannot be sent.
                outcome.error.add_note("".join(traceback.format_exception(outcome.error)))
            connection.send_bytes(_pickled(outcome))


def _pickled(outcome: Outcome[object]) -> bytes:
    """Return an outcome to be sent; a result or an error that cannot be pickled and restored becomes an error that can."""
    try:
        content = pickle.dumps(outcome)
        if outcome.error is not None:
            pickle.loads(content)  # Some exceptions cannot be made again from their arguments.
    except Exception as reason:
        failed = outcome.error
        told = RuntimeError(f"{type(failed).__name__}: {failed}" if failed is not None else f"its result cannot be sent: {reason}")
        told.__notes__ = list(map(str, getattr(failed, "__notes__", ())))
        content = pickle.dumps(Outcome[object](error=told))
    return content


def _leave(signum: int, frame: FrameType | None) -> None:
    """Unwind, so that the file being written is removed."""
    raise SystemExit(128 + signum)


def _end_with_parent(handle: int) -> None:
    """End the process in the middle of its work when the other end of the pipe has gone: a killed parent cannot do so itself."""
    if hasattr(select, "poll"):
        waiting = select.poll()
        waiting.register(handle, 0)  # nothing but the end
        waiting.poll()
        os._exit(0)


def _resident(process: int) -> int:
    """Return the bytes that a process has in physical memory; 0 where the system does not tell."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _describe_end(exit_code: int, advice: str) -> str:
    """Describe the end of a process without a result; a negative code is the signal that ended it."""
    if exit_code >= 0:
        return f"its process ended with status {exit_code} before it was done"
    name = signal.Signals(-exit_code).name if -exit_code in set(signal.Signals) else str(-exit_code)
    reason = f"; the system does so when memory runs out{advice}" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{reason}"
