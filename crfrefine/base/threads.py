"""Threads for the files of a case, the cores that this process may use, and the files of its control groups (cgroups, version 2)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from crfrefine.errors import ConfigError

T = TypeVar("T")

ROOT = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


def available_threads() -> int:
    """Return the number of cores that this process may use."""
    return thread_limit()[0]


def thread_limit() -> tuple[int, str]:
    """Return the cores that this process may use, and what limits them, a phrase for messages.

    A quota of the control group, as containers set it (`docker run --cpus`), is time and not cores: more threads than it pays
    for would all be halted together for a part of each period. A part of a core counts as one.
    """
    allowed, quota = len(os.sched_getaffinity(0)), _quota()
    if quota is not None and math.ceil(quota) < allowed:
        return math.ceil(quota), "the CPU quota of the control group (cgroup) of this process"
    if allowed < (os.cpu_count() or 1):
        return allowed, "the affinity of this process, which taskset and batch systems set"
    return allowed, "the cores of this machine"


def check_threads(threads: int | None) -> None:
    """Raise ConfigError unless an argument is a number of threads, or None."""
    if threads is not None and (isinstance(threads, bool) or not hasattr(threads, "__index__") or threads < 1):
        raise ConfigError(f"threads: expected a whole number of at least 1, or None for all cores that may be used; got {threads!r}")


@cache
def _quota() -> float | None:
    """Return how many cores' time the control groups allow, such as 1.5; None without a quota."""
    return min((own[0] / own[1] for own in group_numbers("cpu.max") if len(own) == 2 and min(own) > 0), default=None)


def group_numbers(name: str) -> list[list[int]]:
    """Return the numbers in a file of this process's control group and of those above it; "max" ends the list of a group.

    In a container only the mounted folder is known. Files that cannot be read or understood say nothing.
    """
    try:
        lines = OWN_GROUP.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    own = next((Path(line[3:].lstrip("/")) for line in lines if line.startswith("0::")), Path())
    group = ROOT / own if ".." not in own.parts and (ROOT / own).is_dir() else ROOT
    numbers = []
    for folder in (group, *group.parents):
        try:
            words = (folder / name).read_text(encoding="ascii").partition("max")[0].split() if folder.is_relative_to(ROOT) else ()
            numbers.append([int(word) for word in words])
        except (OSError, ValueError):
            continue
    return [own for own in numbers if own]


def run_all(jobs: Sequence[Callable[[], None]], threads: int) -> None:
    """Run the jobs, started in the order given, on at most `threads` threads; raise the error of the first failed job."""
    if threads <= 1 or len(jobs) <= 1:
        for job in jobs:
            job()
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(threads, len(jobs))) as pool:
        for _ in pool.map(lambda job: job(), jobs):  # An error cancels the jobs that have not begun.
            pass


def run_ahead(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """Yield the items of a generator that runs in a thread and is one item ahead; its error is raised at the item where it occurred.

    At most two items exist, a third one only while the caller asks for the next and still holds the last one. The thread ends, and the
    generator is closed, when the items end, when one raises, and when the returned generator is closed or forgotten.
    """
    from concurrent.futures import ThreadPoolExecutor

    end: Any = object()
    pool = ThreadPoolExecutor(1, "crfrefine-ahead")
    coming: Any = None
    try:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item
    finally:
        coming = None  # Else the traceback of an error, which it has, would keep an item alive.
        pool.shutdown()
        items.close()
