"""The control groups (cgroups, versions 1 and 2) that hold this process: their folders, their numbers, and the share of cores they allow.

Functions of texts and folders, so that made-up systems can be tested. A text that cannot be understood limits nothing.
`crfrefine.base.memory` reads their memory.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath


def control_groups(groups: str, mounts: str, controller: str = "memory") -> list[tuple[int, PurePosixPath]]:
    """Return version and folder of the control groups that limit this process's "memory" or "cpu", its own before the ones above it.

    In a container the group's path may lie outside the mounted folder, or hold `..`; then only the mounted folder itself is known.
    """
    found = []
    for line in groups.splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        version = 2 if number == "0" and not controllers else 1
        if path.startswith("/") and (version == 2 or controller in controllers.split(",")):
            found += [(version, folder) for folder in _folders_of(PurePosixPath(path), version, mounts, controller)]
    return found


def _folders_of(group: PurePosixPath, version: int, mounts: str, controller: str) -> tuple[PurePosixPath, ...]:
    """Return the folders of a group and of those above it, where its hierarchy is mounted first: that may be at several places."""
    for line in mounts.splitlines():
        place, _, kind = line.partition(" - ")
        words, kinds = place.split(" "), kind.split(" ")
        if len(words) < 5 or kinds[0] != ("cgroup2" if version == 2 else "cgroup"):
            continue
        # Blanks and the like are octal numbers.
        mounted, point = (PurePosixPath(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), word)) for word in words[3:5])
        if point.is_absolute() and ".." not in point.parts and (version == 2 or controller in kinds[-1].split(",")):
            is_inside = group.is_relative_to(mounted) and ".." not in group.parts
            folder = point / group.relative_to(mounted) if is_inside else point
            return (folder, *folder.parents)[: len(folder.parts) - len(point.parts) + 1]
    return ()


def core_quota(groups: str, mounts: str, root: Path = Path("/")) -> float | None:
    """Return how many cores' time the control groups allow, such as 1.5; None without a quota.

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
    """Return the number in a file; None for "max" and the like."""
    text = read_text(path).strip()
    return int(text) if re.fullmatch(r"[0-9]{1,30}", text, re.ASCII) else None


def read_text(path: Path) -> str:
    """Return the beginning of a small file; "" if it cannot be read."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(1 << 20)
    except (OSError, ValueError):
        return ""
