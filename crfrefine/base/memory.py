"""How much memory a run may take, and sizes as text. What the system says is read in `crfrefine.base.memory_sources`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from crfrefine.base.control_groups import read_text
from crfrefine.base.memory_sources import (
    LARGEST,
    Limit,
    batch_limits,
    control_group_limits,
    machine_limit,
    own_use,
    reserve,
    resource_limits,
)
from crfrefine.base.text import counted, shorten_value
from crfrefine.errors import CapacityError, InputError

OPTION = "--max-memory"

SMALL = 1 << 24
"""Bytes of an array for which the system is not asked."""

_SIZE = re.compile(r"([0-9]{1,19}(?:\.[0-9]{0,9})?|\.[0-9]{1,9}) ?(?:(B|bytes?)|([KMGT])(iB|B)?)?", re.ASCII | re.IGNORECASE)
_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class MemoryLimit:
    """The memory that this process may take, what it has already included."""

    bytes: int  # the limit; `crfrefine.base.memory_sources.LARGEST` if none is known
    source: str  # where it comes from, a phrase for messages

    @property
    def is_known(self) -> bool:
        """Whether there is a limit."""
        return self.bytes < LARGEST


def parse_size(text: str) -> int:
    """Return the bytes of a size such as "8GiB", "8 GB", "512M" or "1.5G", or of a plain number of bytes.

    GiB and G are 2^30 bytes, as batch systems count; GB are 10^9. T, M and K stand for their powers alike; upper or lower case.

    Raises:
        InputError: it is no such text, less than one byte, or more than any machine has.
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
    """Return the memory that this process may take: the smallest of what the user has given and of what the system allows.

    It reads control groups (versions 1 and 2), batch systems (Slurm, PBS), resource limits (`ulimit`; Grid Engine and LSF set them), and
    the available memory of the machine; without `/proc`, such as on macOS, the physical memory; on Windows nothing.
    """
    limits = list(_system_limits())
    if given is not None:
        limits.insert(0, (given, OPTION))
    if not limits:
        return MemoryLimit(LARGEST, "no limit known on this system")
    return MemoryLimit(*min(limits, key=lambda limit: limit[0]))


def memory_left(limit: MemoryLimit) -> int | None:
    """Return the bytes that this process may still take; None: there is no limit, or the system does not tell what it has."""
    own = own_use(read_text(Path("/proc/self/status")))
    return max(0, limit.bytes - own.resident) if limit.is_known and own.resident else None


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


def _system_limits() -> Iterator[Limit]:
    own = own_use(read_text(Path("/proc/self/status")))
    yield from control_group_limits(read_text(Path("/proc/self/cgroup")), read_text(Path("/proc/self/mountinfo")), own)
    yield from batch_limits(os.environ)
    yield from resource_limits(_soft_limits(), own)
    machine = machine_limit(read_text(Path("/proc/meminfo")), own) or _physical_memory()
    if machine is not None:
        yield machine


def _soft_limits() -> dict[str, int]:
    try:
        import resource
    except ImportError:  # Windows
        return {}
    names = [name for name in ("RLIMIT_AS", "RLIMIT_DATA", "RLIMIT_RSS") if hasattr(resource, name)]
    limits = {name: resource.getrlimit(getattr(resource, name))[0] for name in names}
    return {name: limit for name, limit in limits.items() if limit != resource.RLIM_INFINITY}


def _physical_memory() -> Limit | None:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf; others may lack these names.
        return None
    return (total - reserve(total), "the memory of this machine") if total > 0 else None
