"""Limits of a run: labels, cores and memory that this process may use (cgroups version 2); threads, sizes."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from crfrefine.base.text import counted, shorten_value
from crfrefine.errors import CapacityError, ConfigError, InputError

MAX_LABEL = 65535  # they are read and written as 16-bit integers at most
MAX_THREADS = 1024  # More than the cores of any machine; a typing error beyond it would exhaust the system's threads.
MAX_LABELS = 4096  # different labels of a case: the model has a penalty for each pair of them


def require_few_labels(num_labels: int, owner: str) -> None:
    """Raise CapacityError, with the name of the file or array, if there are more than MAX_LABELS."""
    if num_labels > MAX_LABELS:
        raise CapacityError(
            f"{owner}: {num_labels} labels; at most {MAX_LABELS} can be refined together\n"
            "  Merge labels, or split the case. If it is no output of a network, name another file."
        )


T = TypeVar("T")

ROOT = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


def available_threads() -> int:
    """Return the number of cores that this process may use."""
    # A quota of the control group, as of `docker run --cpus`, is time: all threads would be halted
    # together if they were more than it pays for. A part of a core counts as one.
    quotas = [own[0] / own[1] for own in group_numbers("cpu.max") if len(own) == 2 and min(own) > 0]
    return min([len(os.sched_getaffinity(0)), *map(math.ceil, quotas)])


def check_threads(threads: int | None) -> None:
    """Raise ConfigError unless an argument is a number of threads, or None."""
    if threads is not None and (
        isinstance(threads, bool)
        or not hasattr(threads, "__index__")
        or not 1 <= threads <= MAX_THREADS
    ):
        raise ConfigError(
            f"threads: expected a whole number from 1 to {MAX_THREADS}, or None for all available cores; got {threads!r}"
        )


def group_numbers(name: str) -> list[list[int]]:
    """Return the numbers in a file of this process's control group and of those above it; "max" ends the list of a group."""
    # In a container only the mounted folder is known. Files that cannot be read or understood say nothing.
    try:
        lines = OWN_GROUP.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    own = next((Path(line[3:].lstrip("/")) for line in lines if line.startswith("0::")), Path())
    group = ROOT / own if ".." not in own.parts and (ROOT / own).is_dir() else ROOT
    numbers = []
    for folder in (folder for folder in (group, *group.parents) if folder.is_relative_to(ROOT)):
        with suppress(OSError, ValueError):
            words = (folder / name).read_text(encoding="ascii").partition("max")[0].split()
            numbers.append([int(word) for word in words])
    return [own for own in numbers if own]


def run_all(jobs: Sequence[Callable[[], None]], threads: int) -> None:
    """Run the jobs, started in the order given, on at most `threads` threads; raise the error of the first failed job."""
    if threads <= 1 or len(jobs) <= 1:
        for job in jobs:
            job()
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(threads, len(jobs))) as pool:
        for _ in pool.map(
            lambda job: job(), jobs
        ):  # An error cancels the jobs that have not begun.
            pass


def run_ahead(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """Yield the items of a generator that runs in a thread and is one item ahead; its error is raised at the item where it occurred."""
    # At most two items exist, a third one only while the caller asks for the next and still holds
    # the last one. The thread ends, and the generator is closed, when the items end, when one
    # raises, and when the returned generator is closed or forgotten.
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


OPTION = "--max-memory"
SMALL = 1 << 24  # bytes of an array for which the system is not asked
PROCESS = 64 << 20  # bytes of the program itself: the interpreter, numpy and the engine
RUN_BYTES = 14  # per voxel and label of a run on all labels: refined logits, marginals and messages
LARGEST = 1 << 60  # larger than the memory of any machine
_SIZE = re.compile(
    r"([0-9]{1,19}(?:\.[0-9]{0,9})?|\.[0-9]{1,9}) ?(?:B|bytes?|([KMGT])(iB|B)?)?",
    re.ASCII | re.IGNORECASE,
)


@dataclass(frozen=True)
class MemoryLimit:
    """The memory that this process may take, including its present memory."""

    bytes: int  # the limit
    source: str  # where it comes from, a phrase for messages


def parse_size(text: str) -> int:
    """Return the bytes of a size such as "8GiB", "8 GB", "512M" or "1.5G", or of a plain number of bytes."""
    # GiB and G are 2^30 bytes, as batch systems count; GB are 10^9. Raises InputError for another text.
    match = _SIZE.fullmatch(text.strip())
    size = 0
    if match is not None:
        power = " KMGT".index((match[2] or " ").upper())
        size = int(Decimal(match[1]) * (1000 if (match[3] or "").upper() == "B" else 1024) ** power)
    if not 1 <= size < LARGEST:
        raise InputError(
            f"{shorten_value(text)} is not a size of memory; expected one such as 8GiB, 512MiB, 8GB, or a number of bytes"
        )
    return size


def format_size(size: float) -> str:
    """Return a number of bytes as text with three digits, such as "4.66 GiB"."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        value = size / 1024**power
        if value >= 0.9995:
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
    return counted(int(size), "byte")


def memory_limit(given: int | None = None) -> MemoryLimit:
    """Return the memory that this process may take: the smallest of the user's limit, its control groups' and the machine's."""
    # The machine's is its free memory and that of this process, less a reserve for everything else:
    # a twentieth, at most 1 GiB. Swap space does not count: a run that swaps does not end.
    import psutil

    use, machine = psutil.Process().memory_info(), psutil.virtual_memory()
    own = use.rss - use.shared  # Pages of files can be given back.
    free = max(machine.available - min(machine.total // 20, 1 << 30), 0) + own
    limits = [] if given is None else [(given, OPTION)]
    limits += [(int(free), "the memory available on this machine")]
    limits += [
        (size, "the control group (cgroup) of this process")
        for size, *_ in group_numbers("memory.max")
    ]
    return MemoryLimit(*min(limits, key=lambda limit: limit[0]))


def memory_left(limit: MemoryLimit) -> int:
    """Return the bytes that this process may still take."""
    import psutil

    return max(0, limit.bytes - int(psutil.Process().memory_info().rss))


def require_memory(needed: int, message: str, limit: MemoryLimit) -> None:
    """Raise CapacityError if more memory is needed than allowed; the error starts with `message`, such as "a.nii: its voxels take"."""
    if needed <= limit.bytes:
        return
    first, _, details = message.partition("\n")
    where = "raise it" if limit.source == OPTION else "use a machine or a job with more memory"
    raise CapacityError(
        f"{first} {format_size(needed)} of memory, more than the {format_size(limit.bytes)} of {limit.source}\n"
        + (f"{details}\n" if details else "")
        + f"  Crop the volume, or {where}; if the volume is not that large, the header is damaged: export the file again."
    )
