"""The control groups (cgroups, versions 1 and 2) that hold this process: their folders, their numbers, and the share of cores they allow.

Functions of texts and folders, so that made-up systems can be tested. A text that cannot be understood limits nothing.
`crfrefine.base.memory_sources` reads their memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def control_groups(groups: str, mounts: str, controller: str = "memory") -> list[tuple[int, PurePosixPath]]:
    """Return version and folder of the control groups that limit this process's "memory" or "cpu", its own before the ones above it.

    In a container the group's path may lie outside of what is mounted, or hold `..`; then only the mounted folder itself is known.
    """
    found = []
    for version, group in _paths_of(groups, controller):
        for mounted_root, mount_point in _mounts_of(version, mounts, controller):
            folder = mount_point
            if group.is_relative_to(mounted_root) and ".." not in group.parts:
                folder = mount_point / group.relative_to(mounted_root)
            inside = (folder, *folder.parents)
            found += [(version, part) for part in inside[: len(folder.parts) - len(mount_point.parts) + 1]]
            break  # The same hierarchy may be mounted twice.
    return found


def core_quota(groups: str, mounts: str, root: Path = Path("/")) -> float | None:
    """Return how many cores' time the control groups allow, such as 1.5; None: there is no quota.

    Source: the kernel's documentation of cgroup v2 (`cpu.max`) and of CFS bandwidth control.
    """
    quotas = []
    for version, group in control_groups(groups, mounts, "cpu"):
        folder = root / str(group).lstrip("/")
        names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        numbers = re.findall(r"\S+", " ".join(read_text(folder / name) for name in names))
        if len(numbers) == 2 and all(re.fullmatch(r"[0-9]{1,15}", number, re.ASCII) for number in numbers):  # "max" and -1: no quota
            quota, period = map(int, numbers)
            if quota and period:
                quotas.append(quota / period)
    return min(quotas, default=None)


def number_in(path: Path) -> int | None:
    """Return the number in a file; None if there is none, such as for "max"."""
    text = read_text(path).strip()
    return int(text) if re.fullmatch(r"[0-9]{1,30}", text, re.ASCII) else None


def read_text(path: Path) -> str:
    """Return the beginning of a small file; "" if it cannot be read."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(1 << 20)
    except (OSError, ValueError):
        return ""


def _paths_of(groups: str, controller: str) -> Iterator[tuple[int, PurePosixPath]]:
    for line in groups.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not path.startswith("/"):
            continue
        if number == "0" and not controllers:
            yield 2, PurePosixPath(path)
        elif controller in controllers.split(","):
            yield 1, PurePosixPath(path)


def _mounts_of(version: int, mounts: str, controller: str) -> Iterator[tuple[PurePosixPath, PurePosixPath]]:
    """Yield what is mounted, and where."""
    for line in mounts.splitlines():
        place, _, kind = line.partition(" - ")
        words, kinds = place.split(" "), kind.split(" ")
        if len(words) < 5 or kinds[0] != ("cgroup2" if version == 2 else "cgroup"):
            continue
        mounted_root, mount_point = PurePosixPath(_unescaped(words[3])), PurePosixPath(_unescaped(words[4]))
        if mount_point.is_absolute() and ".." not in mount_point.parts and (version == 2 or controller in kinds[-1].split(",")):
            yield mounted_root, mount_point


def _unescaped(path: str) -> str:
    """Return a path of mountinfo, where blanks and the like are octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
