"""Pipes with readers, and devices, for the tests of outputs that are no regular files."""

from __future__ import annotations

import os
import stat
import threading
import time
from pathlib import Path

import pytest


def kind_of(path: Path) -> int:
    return stat.S_IFMT(path.lstat().st_mode)


def make_pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def make_device(path: Path, kind: int, major: int, minor: int) -> Path:
    try:
        os.mknod(path, kind | 0o666, os.makedev(major, minor))
        if kind == stat.S_IFCHR:
            path.write_bytes(b"")
    except PermissionError:
        pytest.skip("needs the right to make devices")
    return path


class Reader:
    """Reads a pipe to its end in a thread of its own."""

    def __init__(self, path: Path) -> None:
        self.content = b""
        self._thread = threading.Thread(target=self._read, args=(os.open(path, os.O_RDONLY | os.O_NONBLOCK),), daemon=True)
        self._thread.start()

    def _read(self, descriptor: int) -> None:
        os.set_blocking(descriptor, True)
        # Until somebody opens the other end, reading finds the end of the file.
        while not self.content:
            time.sleep(0.01)
            self.content += os.read(descriptor, 1 << 16)
        with os.fdopen(descriptor, "rb") as file:
            self.content += file.read()

    def result(self) -> bytes:
        self._thread.join(30)
        assert not self._thread.is_alive(), "nothing came"
        return self.content
