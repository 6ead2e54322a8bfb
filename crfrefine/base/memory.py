"""How much memory a run may take: the limits of the user, the operating system and batch systems; and sizes as text."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from crfrefine.base.control_groups import control_groups, number_in, read_text
from crfrefine.base.text import counted, shorten_value
from crfrefine.errors import CapacityError, InputError

OPTION = "--max-memory"

SMALL = 1 << 24
"""Bytes of an array for which the system is not asked."""

PROCESS = 64 << 20
"""Bytes of the program itself: the interpreter, numpy and the engine."""

RUN_BYTES = 14
"""Bytes per voxel and label of a run on all labels: refined logits, marginals and messages."""

Limit = tuple[int, str]
"""Bytes, and the phrase that names where they come from in messages."""

MIB = 1 << 20
LARGEST = 1 << 60
"""Limits from here on mean no limit: cgroups write 2^63 rounded to pages, `getrlimit` 2^64 - 1."""

RESERVED_SHARE = 20
MAX_RESERVED = 1 << 30

_SIZE = re.compile(r"([0-9]{1,19}(?:\.[0-9]{0,9})?|\.[0-9]{1,9}) ?(?:(B|bytes?)|([KMGT])(iB|B)?)?", re.ASCII | re.IGNORECASE)
_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class MemoryLimit:
    """The memory that this process may take, including its present memory."""

    bytes: int  # the limit; `LARGEST` if none is known
    source: str  # where it comes from, a phrase for messages

    @property
    def is_known(self) -> bool:
        """Whether there is a limit."""
        return self.bytes < LARGEST


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
    """Return the memory that this process may take: the smallest of the user's limit and the system's limits.

    It reads control groups (versions 1 and 2), batch systems (Slurm, PBS), resource limits (`ulimit`; Grid Engine and LSF set them), and
    the available memory of the machine.
    """
    limits = list(_system_limits())
    if given is not None:
        limits.insert(0, (given, OPTION))
    if not limits:
        return MemoryLimit(LARGEST, "no limit known on this system")
    return MemoryLimit(*min(limits, key=lambda limit: limit[0]))


def memory_left(limit: MemoryLimit) -> int | None:
    """Return the bytes that this process may still take; None without a limit, or where the system does not show its memory."""
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
    machine = machine_limit(read_text(Path("/proc/meminfo")), own)
    if machine is not None:
        yield machine


def _soft_limits() -> dict[str, int]:
    import resource

    limits = {name: resource.getrlimit(getattr(resource, name))[0] for name in ("RLIMIT_AS", "RLIMIT_DATA", "RLIMIT_RSS")}
    return {name: limit for name, limit in limits.items() if limit != resource.RLIM_INFINITY}


# The limits of the system: functions of texts, folders and numbers, so that made-up systems can be tested. A text that cannot be understood
# limits nothing.


@dataclass(frozen=True)
class OwnUse:
    """The memory that this process uses, in bytes."""

    resident: int = 0  # in physical memory
    anonymous: int = 0  # the part that is not the content of a file
    address_space: int = 0  # mapped, used or not
    data: int = 0  # of it, private and writable


def own_use(status: str) -> OwnUse:
    """Return what `/proc/self/status` says; zeros where it says nothing."""
    sizes = _kilobytes(status)
    resident = sizes.get("VmRSS", 0)
    return OwnUse(resident, sizes.get("RssAnon", resident), sizes.get("VmSize", resident), sizes.get("VmData", resident))


def machine_limit(meminfo: str, own: OwnUse) -> Limit | None:
    """Return the memory that is free or can be freed on this machine, with what this process has, less a reserve for everything else.

    The reserve is a twentieth of the memory, at most 1 GiB. Swap space does not count: a run that swaps does not end.
    """
    sizes = _kilobytes(meminfo)
    total = sizes.get("MemTotal", 0)
    available = sizes.get("MemAvailable", sizes.get("MemFree", 0) + sizes.get("Cached", 0))
    if not total or not available:
        return None
    return max(available - reserve(total), 0) + own.anonymous, "the memory available on this machine"


def reserve(total: int) -> int:
    """Return the part of a machine's memory that is left to others."""
    return min(total // RESERVED_SHARE, MAX_RESERVED)


def resource_limits(limits: Mapping[str, int], own: OwnUse) -> Iterator[Limit]:
    """Yield the limits of `ulimit`, soft ones by name, each as resident memory.

    Address space and data count mapped memory, used or not, so the unused part is subtracted.
    Grid Engine (`h_vmem`), PBS (`pvmem`) and LSF (`bsub -M`) set these limits.
    """
    unused = {"RLIMIT_AS": own.address_space - own.resident, "RLIMIT_DATA": own.data - own.anonymous}
    options = {"RLIMIT_AS": "-v", "RLIMIT_DATA": "-d", "RLIMIT_RSS": "-m"}
    for name, option in options.items():
        limit = limits.get(name, -1)
        if 0 <= limit < LARGEST:
            yield max(limit - max(unused.get(name, 0), 0), 0), f"the resource limit {name} (ulimit {option})"


def batch_limits(environment: Mapping[str, str]) -> Iterator[Limit]:
    """Yield the memory that a batch system gives this job here: Slurm's `--mem`, `--mem-per-cpu`, `--mem-per-gpu`; PBS's total memory.

    LSF, Grid Engine and Torque set no variable; they set resource limits or control groups, which are read too.
    """

    def in_megabytes(name: str) -> int:
        found = re.fullmatch(r"([0-9]{1,15})([KMGT]?)B?", environment.get(name, ""), re.ASCII | re.IGNORECASE)
        scale = {"K": 1 << 10, "": MIB, "M": MIB, "G": 1 << 30, "T": 1 << 40}
        return int(found[1]) * scale[found[2].upper()] if found else 0

    def count(name: str) -> int:
        text = environment.get(name, "")
        return int(text) if re.fullmatch(r"[0-9]{1,9}", text, re.ASCII) else 0

    found = {
        "SLURM_MEM_PER_NODE": in_megabytes("SLURM_MEM_PER_NODE"),  # 0: all of the node's
        "SLURM_MEM_PER_CPU": in_megabytes("SLURM_MEM_PER_CPU") * count("SLURM_CPUS_ON_NODE"),
        "SLURM_MEM_PER_GPU": in_megabytes("SLURM_MEM_PER_GPU") * count("SLURM_GPUS_ON_NODE"),
    }
    total = environment.get("PBS_RESC_TOTAL_MEM", "")  # Bytes, where PBS Professional sets it.
    if re.fullmatch(r"[0-9]{1,18}", total, re.ASCII):
        found["PBS_RESC_TOTAL_MEM"] = int(total)
    for name, size in found.items():
        if 0 < size < LARGEST:
            yield size, f"the batch system ({name})"


def control_group_limits(groups: str, mounts: str, own: OwnUse, root: Path = Path("/")) -> Iterator[Limit]:
    """Yield the limits of the control groups that hold this process: its own group, and all above it that can be seen.

    What other processes of a group use is not free for this one: limit - usage + own usage. Cached files count as free.
    """
    for version, folder in control_groups(groups, mounts):
        limit = _group_limit(version, root / str(folder).lstrip("/"), own)
        if limit is not None:
            yield limit, "the control group (cgroup) of this process"


def _group_limit(version: int, folder: Path, own: OwnUse) -> int | None:
    names = ("memory.max", "memory.high") if version == 2 else ("memory.limit_in_bytes",)
    limits = [limit for limit in (number_in(folder / name) for name in names) if limit is not None and limit < LARGEST]
    if not limits:
        return None
    usage = number_in(folder / ("memory.current" if version == 2 else "memory.usage_in_bytes")) or 0
    prefix = "" if version == 2 else "total_"
    cached = {f"{prefix}active_file", f"{prefix}inactive_file"}
    stat = re.findall(r"^(\w+) ([0-9]{1,18})$", read_text(folder / "memory.stat"), re.ASCII | re.MULTILINE)
    others = usage - sum(int(size) for name, size in stat if name in cached) - own.anonymous
    return max(min(limits) - max(others, 0), 0)


def _kilobytes(text: str) -> dict[str, int]:
    """Return the sizes of lines such as "VmRSS:   1234 kB" in bytes."""
    return {name: int(size) << 10 for name, size in re.findall(r"^(\w+):\s+([0-9]{1,18}) kB$", text, re.ASCII | re.MULTILINE)}
