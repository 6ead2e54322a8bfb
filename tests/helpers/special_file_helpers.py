"""Pipes, for the tests of outputs that are not regular files."""

import os
import stat


def kind_of(path):
    return stat.S_IFMT(path.lstat().st_mode)


def make_pipe(path):
    os.mkfifo(path)
    return path
