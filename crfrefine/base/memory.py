"""How much memory a run may take: the limits of the user, the control groups and the machine; and sizes as text."""

from __future__ import annotations

import re
from dataclasses import dataclass

from crfrefine.base.text import counted, shorten_value
from crfrefine.base.threads import control_groups, group_numbers
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

RESERVED_SHARE = 20
MAX_RESERVED = 1 << 30

_SIZE = re.compile(r"([0-9]{1,19}(?:\.[0-9]{0,9})?|\.[0-9]{1,9}) ?(?:(B|bytes?)|([KMGT])(iB|B)?)?", re.ASCII | re.IGNORECASE)
_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class MemoryLimit:
    """The memory that this process may take, including its present memory."""

    bytes: int  # the limit
    source: str  # where it comes from, a phrase for messages


def parse_size(text: str) -> int:
    """Return the bytes of a size such as "8GiB", "8 GB", "512M" or "1.5G", or of a plain number of bytes.

    GiB and G are 2^30 bytes, as batch systems count; GB are 10^9. T, M and K follow the same rule; upper or lower case.

    Raises:
        InputError: the text has another form, or means less than one byte, or more than any machine has.
    """
    match = _SIZE.fullmatch(text.strip())
    size = 0
    if match is not None:
        whole, _, part = match[1].partition(".")
        scale = (1000 if (match[4] or "").upper() == "B" else 1024) ** _POWERS.get((match[3] or "").upper(), 0)
        size = int(whole or 0) * scale + int(part or 0) * scale // 10 ** len(part)
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

    Of the machine it is the memory that is free or can be freed, with what this process has, less a reserve of a twentieth, at most
    1 GiB, for everything else. Swap space does not count: a run that swaps does not end.
    """
    import psutil

    (_, own), machine = _own_use(), psutil.virtual_memory()
    reserve = min(machine.total // RESERVED_SHARE, MAX_RESERVED)
    limits = [(max(machine.available - reserve, 0) + own, "the memory available on this machine")]
    group = [size for name in ("memory.max", "memory.high") for size, *_ in group_numbers(name)]
    if group:
        limits.append((max(min(group) - _others_in_group(own), 0), "the control group (cgroup) of this process"))
    if given is not None:
        limits.insert(0, (given, OPTION))
    return MemoryLimit(*min(limits, key=lambda limit: limit[0]))


def memory_left(limit: MemoryLimit) -> int:
    """Return the bytes that this process may still take."""
    return max(0, limit.bytes - _own_use()[0])


def _others_in_group(rss: int) -> int:
    """Return the bytes that other processes of this one's control group use; cached files count as free."""
    try:
        stat = dict(line.split() for line in (control_groups()[0] / "memory.stat").read_text(encoding="ascii").splitlines())
        return max(0, int(stat["anon"]) - rss)
    except (OSError, ValueError, KeyError, IndexError):
        return 0


def _own_use() -> tuple[int, int]:
    """Return the bytes of this process in physical memory, and those of them that are not pages of files, which can be given back."""
    import psutil

    use = psutil.Process().memory_info()
    return int(use.rss), int(use.rss - use.shared)


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
