"""How much memory a run may take: the limits of the user, the control group and the machine; and sizes as text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from crfrefine.base.text import counted, shorten_value
from crfrefine.base.threads import group_numbers
from crfrefine.errors import CapacityError, InputError

OPTION = "--max-memory"

SMALL = 1 << 24
"""Bytes of an array for which the system is not asked."""

PROCESS = 64 << 20
"""Bytes of the program itself: the interpreter, numpy and the engine."""

RUN_BYTES = 14
"""Bytes per voxel and label of a run on all labels: refined logits, marginals and messages."""

LARGEST = 1 << 60
"""Larger than the memory of any machine."""

_SIZE = re.compile(r"([0-9]{1,19}(?:\.[0-9]{0,9})?|\.[0-9]{1,9}) ?(?:B|bytes?|([KMGT])(iB|B)?)?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class MemoryLimit:
    """The memory that this process may take, including its present memory."""

    bytes: int  # the limit
    source: str  # where it comes from, a phrase for messages


def parse_size(text: str) -> int:
    """Return the bytes of a size such as "8GiB", "8 GB", "512M" or "1.5G", or of a plain number of bytes.

    GiB and G are 2^30 bytes, as batch systems count; GB are 10^9; T, M and K likewise. Raises InputError for another text.
    """
    match = _SIZE.fullmatch(text.strip())
    size = 0
    if match is not None:
        power = " KMGT".index((match[2] or " ").upper())
        size = int(Decimal(match[1]) * (1000 if (match[3] or "").upper() == "B" else 1024) ** power)
    if not 1 <= size < LARGEST:
        raise InputError(f"{shorten_value(text)} is not a size of memory; expected one such as 8GiB, 512MiB, 8GB, or a number of bytes")
    return size


def format_size(size: float) -> str:
    """Return a number of bytes as text with three digits, such as "4.66 GiB"."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        value = size / 1024**power
        if value >= 0.9995:
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
    return counted(int(size), "byte")


def memory_limit(given: int | None = None) -> MemoryLimit:
    """Return the memory that this process may take: the smallest of the user's limit, its control groups' and the machine's.

    The machine's is its free memory and that of this process, less a reserve for everything else: a twentieth, at most 1 GiB.
    Swap space does not count: a run that swaps does not end.
    """
    import psutil

    use, machine = psutil.Process().memory_info(), psutil.virtual_memory()
    own = use.rss - use.shared  # Pages of files can be given back.
    free = max(machine.available - min(machine.total // 20, 1 << 30), 0) + own
    limits = [] if given is None else [(given, OPTION)]
    limits += [(int(free), "the memory available on this machine")]
    limits += [(size, "the control group (cgroup) of this process") for size, *_ in group_numbers("memory.max")]
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
