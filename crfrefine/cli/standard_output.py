"""Standard output whose reader may go, as `head` does: the command ends then, without a message."""

from __future__ import annotations

import io
import os
import signal
import sys

# What the shell reports of a program that the closed pipe ended.
CLOSED_STATUS = 128 + signal.SIGPIPE


class OutputClosedError(BaseException):
    """The reader of standard output has gone.

    It is no `Exception`, since a case whose line cannot be printed has not failed.
    """


class StandardOutput(io.TextIOWrapper):
    """Standard output; writing to a closed pipe raises OutputClosedError."""

    def write(self, text: str) -> int:
        """Write text."""
        try:
            return super().write(text)
        except BrokenPipeError:
            raise OutputClosedError from None

    def flush(self) -> None:
        """Write what is buffered."""
        try:
            super().flush()
        except BrokenPipeError:
            raise OutputClosedError from None


def prepare_streams() -> None:
    """Make sure that neither a closed stream nor an odd character causes a traceback.

    Standard output then raises OutputClosedError, unless it was replaced by another object.
    """
    for name in ("stdout", "stderr"):
        # A closed stream (`>&-`, a service without a terminal) has no reader; that is not a reason
        # to fail.
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper):
        return
    encoding = stream.encoding
    errors = stream.errors
    line_buffering = stream.line_buffering
    write_through = stream.write_through
    sys.stdout = StandardOutput(
        stream.detach(),
        encoding,
        errors,
        line_buffering=line_buffering,
        write_through=write_through,
    )
