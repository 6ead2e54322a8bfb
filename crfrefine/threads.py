"""The default number of threads."""

from __future__ import annotations

import os

SHARE = "CRFREFINE_WORKER_THREADS"
"""Variable of the environment: the share of the cores that the worker of a cluster gives to each of its cases."""


def available_threads() -> int:
    """Return the number of cores that this process may use, or its share of them."""
    share = os.environ.get(SHARE, "")
    if share.isdecimal() and int(share) > 0:
        return int(share)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
