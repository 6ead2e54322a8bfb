"""The limits of a run, its labels, cores and memory (cgroups version 2), and its threads."""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from crfrefine.base.numerics import MAX_THREADS
from crfrefine.base.text import counted, shorten_value
from crfrefine.errors import CapacityError, ConfigError, InputError

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

T = TypeVar("T")
Job = Callable[[], object]  # that a thread runs

MAX_LABEL = 65535  # labels are read and written as 16-bit integers at most
MAX_LABELS = 4096  # different labels of a case: the model has a penalty for each pair of them
MAX_PARTS = 1_000_000  # processes that share cases; folds and steps of a training

ROOT = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


def require_few_labels(num_labels: int, owner: str) -> None:
    """Raise CapacityError, which names the file or array, if there are more than MAX_LABELS."""
    if num_labels > MAX_LABELS:
        raise CapacityError(
            f"{owner}: {num_labels} labels; at most {MAX_LABELS} can be refined together\n"
            "  Merge labels, or split the case. If it is no output of a network, name another file."
        )


# ---- Cores and threads


def available_threads() -> int:
    """Return the number of cores that this process may use."""
    num_threads = len(os.sched_getaffinity(0))
    # A control group's quota, as of `docker run --cpus`, is time: more threads than it pays for are
    # all halted together. A part of a core counts as a core.
    for numbers in group_numbers("cpu.max"):
        if len(numbers) == 2 and min(numbers) > 0:
            quota, period = numbers
            num_threads = min(num_threads, math.ceil(quota / period))
    return num_threads


def check_threads(threads: int | None) -> None:
    """Raise ConfigError unless an argument is a number of threads, or None."""
    if threads is None:
        return
    is_whole_number = hasattr(threads, "__index__") and not isinstance(threads, bool)
    if not is_whole_number or not 1 <= threads <= MAX_THREADS:
        raise ConfigError(
            f"threads: expected a whole number from 1 to {MAX_THREADS}, "
            f"or None for all available cores; got {threads!r}"
        )


def group_numbers(name: str) -> list[list[int]]:
    """Return the numbers in a file of this process's control group and of those above it.

    A list ends before "max", which means no limit. Files that have no numbers, or cannot be read,
    are left out.
    """
    try:
        lines = OWN_GROUP.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    group = ROOT  # In a container only the mounted folder is known.
    for line in lines:
        own = re.fullmatch("0::/*(.*)", line)
        if own is not None:
            place = Path(own[1])
            if ".." not in place.parts and (ROOT / place).is_dir():
                group = ROOT / place
            break

    numbers_by_group = []
    for folder in (group, *group.parents):
        if not folder.is_relative_to(ROOT):
            break
        with suppress(OSError, ValueError):
            limited, _, _ = (folder / name).read_text(encoding="ascii").partition("max")
            numbers = list(map(int, limited.split()))
            if numbers:
                numbers_by_group.append(numbers)
    return numbers_by_group


# Every thread that this package starts is one of these.

_NICENESS = 10  # more than that of others: of threads whose results are not waited for


def thread_pool(num_threads: int, name: str, *, gives_way: bool = False) -> ThreadPoolExecutor:
    """Return a pool of threads, whose name debuggers show.

    One that gives way takes the time that other threads and processes leave.
    """
    # The import takes a hundredth of a second, and `--help` does without.
    from concurrent.futures import ThreadPoolExecutor

    # In Linux niceness is a property of each thread, which those that it starts inherit.
    niceness = _NICENESS if gives_way else 0
    return ThreadPoolExecutor(num_threads, name, os.nice, (niceness,))


def run_beside(function: Job) -> None:
    """Run a function in a thread that nothing waits for, not even the end of the program."""
    threading.Thread(target=function, daemon=True).start()


def run_all(jobs: Sequence[Callable[[], T]], threads: int) -> list[T]:
    """Run the jobs on at most `threads` threads, started in their order; return their results.

    Raises the error of the first job that failed; jobs that have not begun by then do not run.
    """
    if threads <= 1 or len(jobs) <= 1:
        return [job() for job in jobs]
    with thread_pool(min(threads, len(jobs)), "job") as pool:
        return list(pool.map(lambda job: job(), jobs))


def run_ahead(items: Generator[T]) -> Generator[T]:
    """Yield the items of a generator that runs one item ahead in a thread, and raise its error."""
    # At most two items exist, a third one only while the caller asks for the next and still holds
    # the last one. The thread ends, and the generator is closed, when the items end, when one
    # raises, and when the returned generator is closed or forgotten.
    end = object()
    pool = thread_pool(1, "one ahead")
    next_item: Any = None
    try:
        next_item = pool.submit(next, items, end)
        while (item := next_item.result()) is not end:
            next_item = pool.submit(next, items, end)
            yield item
    finally:
        next_item = None  # The traceback of an error in it would keep an item alive.
        pool.shutdown()
        items.close()


# ---- Memory

OPTION = "--max-memory"
SMALL = 1 << 24  # bytes of an array up to which the memory limit is not looked up
PROCESS = 64 << 20  # bytes of the program itself: the interpreter, numpy and the engine
REFINING_PROCESS = 96 << 20  # bytes of the program once it refines: all libraries, threads, buffers
RUN_BYTES = 14  # per voxel and label of a run on all labels: refined logits, marginals and messages
LARGEST = 1 << 60  # larger than the memory of any machine
_SIZE = re.compile(
    r"([0-9]{1,19}(?:\.[0-9]{0,9})?|\.[0-9]{1,9}) ?(?:B|bytes?|([KMGT])(iB|B)?)?",
    re.ASCII | re.IGNORECASE,
)


def parse_jobs(text: str) -> int | None:
    """Return a number of cases; None for "auto"."""
    if text == "auto":
        return None
    if text.isdecimal() and 1 <= int(text) <= MAX_THREADS:
        return int(text)
    raise InputError(f"expected auto, or a number of cases from 1 to {MAX_THREADS}; got {text!r}")


def parse_size(text: str) -> int:
    """Return the bytes of a size such as "8GiB", "8 GB", "512M" or "1.5G", or of a number of bytes.

    GiB and G are 2^30 bytes, as for batch systems; GB are 10^9. Raises InputError for other texts.
    """
    size = 0
    match = _SIZE.fullmatch(text.strip())
    if match is not None:
        number, letter, suffix = match.groups(default="")
        base = 1000 if suffix.upper() == "B" else 1024
        power = " KMGT".index(letter.upper() or " ")
        size = int(Decimal(number) * base**power)
    if not 1 <= size < LARGEST:
        raise InputError(
            f"{shorten_value(text)} is not a size of memory; "
            "expected one such as 8GiB, 512MiB, 8GB, or a number of bytes"
        )
    return size


def format_size(size: float) -> str:
    """Return a number of bytes as text with three digits, such as "4.66 GiB"."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        value = size / 1024**power
        if value >= 99.95:
            return f"{value:.0f} {unit}"
        if value >= 9.995:
            return f"{value:.1f} {unit}"
        if value >= 0.9995:
            return f"{value:.2f} {unit}"
    return counted(int(size), "byte")


def _own_memory() -> Any:
    """Return the numbers of bytes that this process has, as psutil tells them."""
    import psutil

    return psutil.Process().memory_info()


def memory_limit(max_memory: int | None = None) -> tuple[int, str]:
    """Return the bytes that this process may take, and where the limit comes from, for messages.

    Its present memory is among them. The limit is the smallest of the user's, `max_memory`, its
    control groups' and the machine's. The machine's is its free memory plus that of this process,
    less a reserve for everything else: a twentieth of all memory, at most 1 GiB. Swap space does
    not count: a run that swaps never ends.
    """
    import psutil

    process = _own_memory()
    machine = psutil.virtual_memory()
    reserve = min(machine.total // 20, 1 << 30)
    held = process.rss - process.shared  # The system can take back pages of files.
    available = max(machine.available - reserve, 0) + held

    limits = []
    if max_memory is not None:
        limits.append((max_memory, OPTION))
    limits.append((int(available), "the memory available on this machine"))
    for size, *_ in group_numbers("memory.max"):
        limits.append((size, "the control group (cgroup) of this process"))
    return min(limits, key=lambda limit: limit[0])


def memory_left(max_memory: int | None = None) -> int:
    """Return the bytes that this process may take beyond its present memory."""
    limit, _ = memory_limit(max_memory)
    return max(0, limit - _own_memory().rss)


def require_memory(
    needed: int, subject: str, max_memory: int | None = None, details: Sequence[str] = ()
) -> None:
    """Raise CapacityError if more memory is needed than allowed.

    The error starts with the subject and its verb, such as "a.nii: its voxels take"; lines of
    details come before the advice.
    """
    limit, source = memory_limit(max_memory)
    if needed <= limit:
        return
    lines = "".join(f"{line}\n  " for line in details)
    remedy = "use a machine or a job with more memory"
    if source == OPTION:
        remedy = "raise it"
    raise CapacityError(
        f"{subject} {format_size(needed)} of memory, "
        f"more than the {format_size(limit)} of {source}\n  {lines}"
        f"Crop the volume, or {remedy}; "
        "if the volume is not that large, the header is damaged: export the file again."
    )


def case_too_large(needed: int, left: int, least: str = "") -> CapacityError:
    """Return the error on a case for which too little memory is left, even with the `least`."""
    return CapacityError(
        f"the case needs about {format_size(needed)} beyond what is in memory already{least}; "
        f"{format_size(max(0, left))} are left; allow more memory (--max-memory), or use a mask or "
        "a smaller region"
    )
