"""Pipes with readers, and devices, for the tests of outputs that are no regular files."""

import os
import stat
import threading
import time

import pytest


def kind_of(path):
    return stat.S_IFMT(path.lstat().st_mode)


def make_pipe(path):
    os.mkfifo(path)
    return path


def make_device(path, kind, major, minor):
    try:
        os.mknod(path, kind | 0o666, os.makedev(major, minor))
        if kind == stat.S_IFCHR:
            path.write_bytes(b"")
    except PermissionError:
        pytest.skip("needs the right to make devices")
    return path


class Reader:
    """Reads a pipe to its end in a thread of its own."""

    def __init__(self, path):
        self.content = b""
        self._thread = threading.Thread(target=self._read, args=(os.open(path, os.O_RDONLY | os.O_NONBLOCK),), daemon=True)
        self._thread.start()

    def _read(self, descriptor):
        os.set_blocking(descriptor, True)
        # Until somebody opens the other end, reading finds the end of the file.
        while not self.content:
            time.sleep(0.01)
            self.content += os.read(descriptor, 1 << 16)
        with os.fdopen(descriptor, "rb") as file:
            self.content += file.read()

    def result(self):
        self._thread.join(30)
        assert not self._thread.is_alive(), "nothing came"
        return self.content
