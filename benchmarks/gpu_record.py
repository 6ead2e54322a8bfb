"""The record of a measurement: written whenever there is more of it, so that a run that is stopped loses nothing; and several as one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Record:
    """A dictionary with a file.

    Attributes:
        content: what is written.
    """

    def __init__(self, path: Path | None) -> None:
        """Take a file that is not there yet; None: the standard output, at the end."""
        if path is not None and path.exists():
            raise SystemExit(f"benchmark: {path} is there already; name another file, or remove it")
        self._path = path
        self.content: dict[str, Any] = {"complete": False}

    def save(self, **entries: Any) -> None:
        """Add entries and write all of them, whole or not at all."""
        self.content |= entries
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_name(self._path.name + ".partial")
        partial.write_text(as_text(self.content), encoding="utf-8")
        partial.replace(self._path)


def as_text(content: dict[str, Any]) -> str:
    """As it is stored."""
    return json.dumps(content, indent=1) + "\n"


def merged(paths: Sequence[Path]) -> dict[str, Any]:
    """The records of one measurement that was taken in parts, of the same sources on the same kind of GPU."""
    whole: dict[str, Any] = {}
    for path in paths:
        try:
            part = json.loads(path.read_text(encoding="utf-8"))
            origin = part["environment"]["source"], part["device"]["gpu"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"benchmark: {path} is no record of benchmarks/gpu.py ({error!r})") from error
        if whole and origin != (whole["environment"]["source"], whole["device"]["gpu"]):
            raise SystemExit(f"benchmark: {path} is of sources and GPU {origin}, unlike {paths[0]}")
        workloads = part.pop("workloads", {})
        if twice := workloads.keys() & whole.get("workloads", {}).keys():
            raise SystemExit(f"benchmark: {path} and an earlier record both have {', '.join(sorted(twice))}")
        complete = part.pop("complete") and whole.get("complete", True)
        whole = {**part, **whole, "workloads": {**whole.get("workloads", {}), **workloads}, "complete": complete}
    return whole


def failures(content: dict[str, Any]) -> list[str]:
    """What went wrong, a line each; nothing where all is well."""
    found = [f"check {name}: {entry['failed']}" for name, entry in content.get("check", {}).items() if "failed" in entry]
    found += [f"{name}: {entry['failed']}" for name, entry in content.get("workloads", {}).items() if "failed" in entry]
    for name, entry in content.get("workloads", {}).items():
        runs = [run for run in entry.get("compile", {}).values() if isinstance(run, dict) and "failed" in run]
        found += [f"{name} in a process of its own: {run['failed']}" for run in runs[:1]]
    for name in ("tests", "sanitizer", "plain_torch"):
        if "failed" in content.get(name, {}):
            found.append(f"{name}: {content[name]['failed']}")
    return found
