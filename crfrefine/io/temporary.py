"""Hidden temporary files: their names, and the removal of those that killed processes left.

The name says how others find out whether the process that writes the file is alive:

- `.NAME.tmp-lock-RANDOM` on a disk of this machine: it holds a lock, which the system releases when the process ends in any way.
- `.NAME.tmp-SYSTEM-PID-START-RANDOM` elsewhere, as on network storage, where not every lock is seen by everybody: only a process of the
  same system (machine, start of the machine, container) can tell, and only that one removes the file.
- `.NAME.tmp-RANDOM` where `/proc` cannot be read: nobody removes the file but the process that writes it.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from crfrefine.io.system import lock

# Disks that one machine alone writes to, and whose locks all its processes see, in containers too.
_LOCAL_DISKS = frozenset({"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "tmpfs", "xfs", "zfs"})
_LOCK = "lock"
MAX_NAME = 255  # bytes, if the system does not tell
_NAME = re.compile(
    r"\..*\.tmp-(?:(?P<lock>lock)|(?P<system>[0-9a-f]{12})-(?P<pid>[0-9]{1,10})-(?P<start>[0-9]{1,20}))-[0-9a-f]{16}", re.DOTALL
)
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_cleaned: set[Path] = set()


def temporary_name(path: Path, *, may_lock: bool = True) -> Path:
    """Return a hidden name beside the target: unpredictable, without a known suffix, not too long for the disk.

    That of a file to write to says that it is locked, where this can be; that of a file to set aside, which nobody locks, does not.
    """
    mark = _LOCK if may_lock and _is_local(path.parent) else _this_process()
    ending = f".tmp-{mark}{'-' if mark else ''}{os.urandom(8).hex()}"
    try:
        longest = os.pathconf(path.parent, "PC_NAME_MAX")
    except (OSError, ValueError):  # A missing folder, which is reported when the file is opened.
        longest = MAX_NAME
    name = path.name
    while len(os.fsencode(f".{name}{ending}")) > longest:
        name = name[:-1]  # by letters: half a letter is not a legal name everywhere
    return path.with_name(f".{name}{ending}")


def open_temporary(target: Path, names: list[Path]) -> BinaryIO:
    """Open a new file beside the target; the first one in a folder removes what killed processes left there.

    `names` gets the name of the new file before there is one, so that an interrupt at any moment finds it.
    """
    if target.parent not in _cleaned:
        remove_leftovers(target.parent)
    while True:
        names.append(temporary_name(target))
        try:
            # The permissions of any new file: those that the umask leaves.
            descriptor = os.open(names[-1], _NEW, 0o666)
        except FileExistsError:
            names.pop()  # another process's file
            raise
        if not is_locked(names[-1]) or lock(descriptor):
            return os.fdopen(descriptor, "wb")
        os.close(descriptor)
        names.pop()  # Another process met the file before it was locked, and removes it.


def is_locked(name: Path) -> bool:
    """Return whether a temporary file is locked until it is closed."""
    return _marks(name).get("lock") is not None


def open_scratch(folder: Path) -> BinaryIO:
    """Open a new file without a name, on the disk of a folder, for writing and reading; it is gone when it is closed."""
    with suppress(OSError):  # Not every disk knows files without a name.
        return os.fdopen(os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600), "w+b")
    names: list[Path] = []
    try:
        with open_temporary(folder / "scratch", names) as file:
            return os.fdopen(os.dup(file.fileno()), "w+b")
    finally:
        for name in names:
            name.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of this user in a folder whose processes are known to have ended; leave all others alone."""
    _cleaned.add(folder)
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _marks(Path(entry.path)):
                with suppress(OSError):
                    _remove_if_left(Path(entry.path))


def _remove_if_left(path: Path) -> None:
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        return
    marks = _marks(path)
    if marks["lock"] is None:
        if marks["system"] == _this_system() and _start_of(int(marks["pid"])) != marks["start"]:
            path.unlink()
    elif _is_local(path.parent):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            # It may have got its final name meanwhile, and the lock is then that of a whole file.
            if lock(descriptor) and os.path.samestat(path.lstat(), os.fstat(descriptor)):
                path.unlink()
        finally:
            os.close(descriptor)


def _marks(path: Path) -> dict[str, Any]:
    """Return the parts of a temporary name; nothing for any other name."""
    found = _NAME.fullmatch(path.name)
    return {} if found is None else found.groupdict()


def _this_process() -> str:
    """Return what names this process among all others, or nothing if the system does not tell: such files are never removed by others."""
    system, start = _this_system(), _start_of(os.getpid())
    return f"{system}-{os.getpid()}-{start}" if system and start else ""


def _this_system() -> str:
    """Return a digest of what numbers of processes belong to: a start of a machine, and a container; empty if it is not known."""
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_bytes()
        container = bytes(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
    return hashlib.sha256(start + container).hexdigest()[:12]


def _start_of(pid: int) -> str | None:
    """Return when a process was started, in ticks of the system; None for one that has ended."""
    try:
        content = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    state, *fields = content.rpartition(b")")[2].split()  # The name of the program may hold anything.
    return None if state in (b"Z", b"X") else fields[18].decode()


def _is_local(folder: Path) -> bool:
    """Return whether a folder is known to be on a disk of this machine."""
    try:
        place = os.fsencode(os.path.realpath(folder))
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    best, kind = b"", ""
    for line in lines:
        before, _, after = line.partition(b" - ")
        point = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), before.split()[4])
        if (place + b"/").startswith(point.rstrip(b"/") + b"/") and len(point) >= len(best):
            best, kind = point, after.split()[0].decode()
    return kind in _LOCAL_DISKS
