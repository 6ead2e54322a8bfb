"""The control groups (cgroups, version 2) that hold this process: what they allow of memory and of the cores' time."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


def numbers(name: str) -> list[list[int]]:
    """Return the numbers in a file of this process's group and of those above it, a list per group; "max" ends a list.

    In a container only the mounted folder is known. Files that cannot be read or understood say nothing.
    """
    found = []
    for folder in _folders():
        try:
            words = (folder / name).read_text(encoding="ascii").split()
            found.append([int(word) for word in words[: words.index("max") if "max" in words else None]])
        except (OSError, ValueError):
            continue
    return [own for own in found if own]


def memory_in_use(rss: int) -> int:
    """Return the bytes that other processes of this one's group use; cached files count as free."""
    try:
        stat = dict(line.split() for line in (_folders()[0] / "memory.stat").read_text(encoding="ascii").splitlines())
        return max(0, int(stat["anon"]) - rss)
    except (OSError, ValueError, KeyError, IndexError):
        return 0


def _folders() -> list[Path]:
    try:
        lines = OWN_GROUP.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    path = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    group = ROOT / path if ".." not in Path(path).parts and (ROOT / path).is_dir() else ROOT
    return [folder for folder in (group, *group.parents) if folder.is_relative_to(ROOT)]
