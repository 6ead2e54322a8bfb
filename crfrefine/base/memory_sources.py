"""What the operating system and batch systems say of the memory that this process may use; `crfrefine.base.memory` takes the smallest.

Functions of texts, folders and numbers, so that made-up systems can be tested. A text that cannot be understood limits nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from crfrefine.base.control_groups import control_groups, number_in, read_text

Limit = tuple[int, str]
"""Bytes, and the phrase that names where they come from in messages."""

WORKER_MEMORY = "CRFREFINE_WORKER_MEMORY"
"""Variable of the environment: bytes that the worker of a cluster gives to each of its cases."""
OF_WORKER = "the cluster's worker"

SHARED_MEMORY = "CRFREFINE_MEMORY_SHARE"
"""Variable of the environment: bytes that each of a run's processes has, one for each of several GPUs."""
OF_SHARE = "this process's share of the run's memory"

MIB = 1 << 20
LARGEST = 1 << 60
"""Limits from here on mean that there is none: cgroups write 2^63 rounded to pages, `getrlimit` 2^64 - 1."""

RESERVED_SHARE = 20
MOST_RESERVED = 1 << 30


@dataclass(frozen=True)
class OwnUse:
    """The memory that this process uses, in bytes."""

    resident: int = 0  # in physical memory
    anonymous: int = 0  # of it, what is not the content of a file
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
    """Return what is left to others of a machine's memory."""
    return min(total // RESERVED_SHARE, MOST_RESERVED)


def resource_limits(limits: Mapping[str, int], own: OwnUse) -> Iterator[Limit]:
    """Yield the limits of `ulimit`, soft ones by name, each as resident memory.

    Address space and data count what is mapped, used or not, so what this process has mapped without using it is subtracted.
    Grid Engine (`h_vmem`), PBS (`pvmem`) and LSF (`bsub -M`) set these limits.
    """
    unused = {"RLIMIT_AS": own.address_space - own.resident, "RLIMIT_DATA": own.data - own.anonymous}
    options = {"RLIMIT_AS": "-v", "RLIMIT_DATA": "-d", "RLIMIT_RSS": "-m"}
    for name, option in options.items():
        limit = limits.get(name, -1)
        if 0 <= limit < LARGEST:
            yield max(limit - max(unused.get(name, 0), 0), 0), f"the resource limit {name} (ulimit {option})"


def batch_limits(environment: Mapping[str, str]) -> Iterator[Limit]:
    """Yield what a batch system has given the job on this node: Slurm's `--mem`, `--mem-per-cpu`, `--mem-per-gpu`; PBS's total memory.

    The worker of a Dask cluster gives its cases a share of its own limit, and a run on several GPUs gives each process one.
    LSF, Grid Engine and Torque set no such variable; they set resource limits or control groups, which are read too.
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
    for name, source in ((WORKER_MEMORY, OF_WORKER), (SHARED_MEMORY, OF_SHARE)):
        share = environment.get(name, "")
        if re.fullmatch(r"[0-9]{1,18}", share, re.ASCII) and 0 < int(share) < LARGEST:
            yield int(share), source
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
