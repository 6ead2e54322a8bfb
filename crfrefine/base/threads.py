"""The default number of threads: the cores that this process may use; and what its control groups (cgroups, version 2) allow."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from crfrefine.errors import ConfigError

ROOT = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class ThreadLimit:
    """The cores that this process may use."""

    number: int  # of cores, or of threads that get the time of so many
    source: str  # where the limit comes from, a phrase for messages


def thread_limit() -> ThreadLimit:
    """Return the cores that this process may use.

    A quota of the control group, as containers set it (`docker run --cpus`), is time and not cores: more threads than it pays for would all
    be halted together for a part of each period. A part of a core counts as one.
    """
    allowed = len(os.sched_getaffinity(0))
    quota = _quota()
    if quota is not None and math.ceil(quota) < allowed:
        return ThreadLimit(math.ceil(quota), "the CPU quota of the control group (cgroup) of this process")
    if allowed < (os.cpu_count() or 1):
        return ThreadLimit(allowed, "the affinity of this process, which taskset and batch systems set")
    return ThreadLimit(allowed, "the cores of this machine")


def check_threads(threads: int | None) -> None:
    """Raise ConfigError unless an argument is a number of threads, or None."""
    if threads is None:
        return
    if isinstance(threads, bool) or not hasattr(threads, "__index__") or threads < 1:
        raise ConfigError(f"threads: expected a whole number of at least 1, or None for all cores that may be used; got {threads!r}")


def available_threads() -> int:
    """Return the number of cores that this process may use."""
    return thread_limit().number


@cache
def _quota() -> float | None:
    """Return how many cores' time the control groups allow, such as 1.5, at the first call; None without a quota."""
    return min((own[0] / own[1] for own in group_numbers("cpu.max") if len(own) == 2 and min(own) > 0), default=None)


def group_numbers(name: str) -> list[list[int]]:
    """Return the numbers in a file of this process's control group and of those above it, a list per group; "max" ends a list.

    In a container only the mounted folder is known. Files that cannot be read or understood say nothing.
    """
    found = []
    for folder in control_groups():
        try:
            words = (folder / name).read_text(encoding="ascii").split()
            found.append([int(word) for word in words[: words.index("max") if "max" in words else None]])
        except (OSError, ValueError):
            continue
    return [own for own in found if own]


def control_groups() -> list[Path]:
    """Return the folders of this process's control group and of those above it."""
    try:
        lines = OWN_GROUP.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    path = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    group = ROOT / path if ".." not in Path(path).parts and (ROOT / path).is_dir() else ROOT
    return [folder for folder in (group, *group.parents) if folder.is_relative_to(ROOT)]
