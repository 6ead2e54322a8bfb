"""The process of a command: its signals, its standard streams, and how it ends."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from crfrefine.cli.failures import tell


class _Output(io.FileIO):
    """Standard output, whose errors say that they are its own."""

    def write(self, data: Any) -> int:
        """Write bytes."""
        try:
            return super().write(data)
        except OSError as error:
            error.filename = "standard output"
            raise


def prepare_process() -> None:
    """Take signals as interrupts, and let the standard streams take any text."""
    # The interpreter would look for cycles among all objects when it ends, a tenth of a short run.
    atexit.register(gc.freeze)
    signal.signal(signal.SIGTERM, _raise_terminated)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # `nohup` ignores it.
        signal.signal(signal.SIGHUP, _raise_terminated)
    for name in ("stdout", "stderr"):
        # A closed stream (`>&-`, a service without a terminal) has no reader; that is not a reason
        # to fail. Neither is a character that the encoding lacks.
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout is sys.__stdout__ and isinstance(sys.stdout, io.TextIOWrapper):
        is_interactive = sys.stdout.line_buffering or sys.stdout.write_through
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(_Output(sys.stdout.fileno(), "w", closefd=False)),
            encoding=sys.stdout.encoding,
            errors=sys.stdout.errors,
            line_buffering=is_interactive,
        )


def run_to_its_end(command: Callable[[], object]) -> None:
    """Run a command that ends with SystemExit, and end the process at once if it is stopped.

    A signal stops it, and so does standard output that takes no more text.
    """
    # A thread that still reads the next case would delay an ordinary exit, which would also write
    # what is still buffered.
    try:
        try:
            command()
        except SystemExit as leave:
            if isinstance(leave.__context__, BrokenPipeError):  # rich has met it, in a help.
                raise leave.__context__ from None
            sys.stdout.flush()  # The interpreter would ignore an error of writing buffered text.
            raise
    except BrokenPipeError:  # The reader has gone, as `head` does, which is no error.
        os._exit(128 + signal.SIGPIPE)
    except OSError as error:
        tell(f"error: standard output: {error.strerror}")
        os._exit(1)
    except KeyboardInterrupt as interrupt:
        _exit_stopped(interrupt)
    except RuntimeError as error:
        # Python 3.11 makes one of an interrupt that comes while a class is made.
        if not isinstance(error.__cause__, KeyboardInterrupt):
            raise
        _exit_stopped(error.__cause__)


def _exit_stopped(interrupt: KeyboardInterrupt) -> None:
    """Write the buffered text, say that the command was stopped, and end the process at once."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # Ctrl-C is often hit twice.
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # Our handlers give the number of a signal; Ctrl-C has none.
    word = "interrupted"
    status = 128 + signal.SIGINT
    if interrupt.args:
        word = "terminated"
        status = 128 + interrupt.args[0]
    tell(": ".join([word, *getattr(interrupt, "__notes__", ())]))
    os._exit(status)


def _raise_terminated(signum: int, frame: FrameType | None) -> None:
    """Handle a signal like Ctrl-C.

    Job schedulers send SIGTERM before they kill; SIGHUP comes when the terminal closes.
    """
    raise KeyboardInterrupt(signum)
