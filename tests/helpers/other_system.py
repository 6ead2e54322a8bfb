"""Commands in a Python that lacks what macOS or Windows lack, and whose files behave as there.

    python other_system.py windows demo -o out + doctor

What is taken away is taken away from Python's modules themselves, so the package's own code finds out as it does there. On Windows, files
that are open or mapped can be neither replaced nor removed, names have rules, and a file opened with `O_TEMPORARY` goes when it is closed.
"""

import atexit
import concurrent.futures.thread  # What the standard library imports on demand is there before things are taken away.
import contextlib
import errno
import multiprocessing.connection
import os
import platform
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from pathlib import Path

_LOADED = (concurrent.futures.thread, multiprocessing.connection, platform, subprocess, tempfile, uuid)

_LINUX_ALONE = "O_TMPFILE memfd_create posix_fadvise copy_file_range sched_getaffinity sched_setaffinity"
_NOT_ON_WINDOWS = (
    "O_NOFOLLOW O_CLOEXEC O_NONBLOCK O_NOCTTY O_DIRECTORY O_SYNC fork forkpty register_at_fork geteuid getuid getegid getgid getpgid "
    "getpgrp killpg setsid nice pathconf fpathconf sysconf set_blocking mkfifo chown fchown fchmod pread pwrite getloadavg wait"
)
_SIGNALS = "SIGHUP SIGQUIT SIGKILL SIGALRM SIGPIPE SIGUSR1 SIGUSR2 SIGCHLD SIGSTOP SIGCONT pthread_kill alarm setitimer"
LACKS = {"macos": {os: _LINUX_ALONE}, "windows": {os: f"{_LINUX_ALONE} {_NOT_ON_WINDOWS}", signal: _SIGNALS, select: "poll epoll"}}
MODULES = {"macos": (), "windows": ("fcntl", "resource", "pwd", "grp", "termios", "tty")}

O_TEMPORARY = 1 << 26  # A bit without a meaning on Linux.
_LINUX_FOLDERS = ("/proc/", "/sys/")
_BAD_NAME = re.compile(r'.*[<>:"|?*\\\x00-\x1f].*|.*[ .]|(?i:con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?')

_inside = threading.local()
_temporary = set()


def _held():
    """The files that this process has open or mapped, but for temporary ones."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(str(link.readlink()))
    with Path("/proc/self/maps").open(encoding="utf-8") as maps:
        found |= {line.split(maxsplit=5)[5].rstrip("\n") for line in maps if line.count("/")}
    return found - _temporary


def _refuse(path):
    if os.path.realpath(os.fspath(path)) in _held():
        raise PermissionError(errno.EACCES, "The process cannot access the file because it is being used", path)


def _on_opening(path, flags, *, is_windows):
    if isinstance(path, int):
        return
    name = os.fsdecode(path)
    if name.startswith(_LINUX_FOLDERS):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
    if is_windows and flags & (os.O_WRONLY | os.O_RDWR) and not name.startswith("/dev/") and _BAD_NAME.fullmatch(Path(name).name):
        raise OSError(errno.EINVAL, "The filename, directory name, or volume label syntax is incorrect", path)
    if flags & O_TEMPORARY:
        _temporary.add(os.path.realpath(name))


def _watch(event, arguments, *, is_windows):
    if getattr(_inside, "hook", False):
        return
    _inside.hook = True
    try:
        if event == "open":
            _on_opening(arguments[0], arguments[2] or 0, is_windows=is_windows)
        elif is_windows and event == "os.rename":
            _refuse(arguments[0])
            _refuse(arguments[1])
        elif is_windows and event == "os.remove":
            _refuse(arguments[0])
    finally:
        _inside.hook = False


def become(system):
    """Make this process one of another system."""
    for module, names in LACKS[system].items():
        for name in names.split():
            if hasattr(module, name):
                delattr(module, name)
    for name in MODULES[system]:
        sys.modules[name] = None
    if system == "windows":
        os.O_TEMPORARY = O_TEMPORARY
        atexit.register(lambda: [Path(path).unlink() for path in _temporary])
    tempfile._O_TMPFILE_WORKS = False
    sys.addaudithook(lambda event, arguments: _watch(event, arguments, is_windows=system == "windows"))


def main():
    """Run commands, which a `+` separates, until one fails."""
    become(sys.argv[1])
    from crfrefine.cli.main import main as command

    for arguments in " ".join(sys.argv[2:]).split(" + "):
        sys.argv = ["crfrefine", *arguments.split()]
        try:
            command()
        except SystemExit as end:
            if end.code:
                raise


if __name__ == "__main__":
    main()
