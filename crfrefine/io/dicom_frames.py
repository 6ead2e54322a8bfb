"""Frames of compressed DICOM files, decoded in a process of their own.

A decoder that crashes or hangs costs one file, not the run.
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.text import shorten
from crfrefine.errors import UnsupportedFormatError

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray

_PROGRAM = Path(__file__).with_name("dicom_decoder.py")


class FrameDecoder:
    """A context manager whose process starts with the first frame, and serves a whole series."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> FrameDecoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._end()

    def frame(self, path: Path, number: int, shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return the stored numbers of a frame, numbered from 0, (rows, columns).

        Args:
            path: the file.
            number: the frame's, 0 in a file with one frame.
            shape: (rows, columns) of the header.
            dtype: type of the stored numbers, in any byte order.

        Raises:
            UnsupportedFormatError: damaged, cut off, or of another size than the header says;
                or its decoding takes too much memory or time for its size.
        """
        if self._process is None:
            command = [sys.executable, "-P", str(_PROGRAM)]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        process, num_bytes = self._process, math.prod(shape) * dtype.itemsize
        assert process.stdin is not None
        assert process.stdout is not None
        # If the process has ended, its answer or its status says why.
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps([str(path), number]).encode() + b"\n")
            process.stdin.flush()
        start = process.stdout.read(1)
        if start == b"+":
            content = process.stdout.read(num_bytes)
            if len(content) == num_bytes:
                return np.frombuffer(content, dtype.newbyteorder("=")).reshape(shape)
        said = process.stdout.read().decode(errors="replace") if start == b"-" else ""
        status = process.wait()
        self._end()
        raise UnsupportedFormatError(f"{path}: damaged DICOM file, frame {number + 1}: {shorten(said, 300) or _reason(status)}")

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with suppress(BrokenPipeError), process:
                process.kill()


def _reason(status: int) -> str:
    """Say why the process ended without an answer."""
    if status == -signal.SIGPROF:
        return "its decoding takes far longer than that of its size should"
    return f"its decoder ended with {'signal' if status < 0 else 'status'} {abs(status)}"
