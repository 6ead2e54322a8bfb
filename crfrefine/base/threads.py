"""The default number of threads: the cores that this process may use, and where the number comes from."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cache

from crfrefine.base.control_groups import numbers
from crfrefine.errors import ConfigError


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
    return min((own[0] / own[1] for own in numbers("cpu.max") if len(own) == 2 and min(own) > 0), default=None)
