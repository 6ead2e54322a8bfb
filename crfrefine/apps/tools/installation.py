"""What this machine and this installation offer: the answer of `crfrefine info` without files."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import crfrefine
from crfrefine.base.memory import format_size
from crfrefine.base.threads import thread_limit
from crfrefine.engines import get_backend
from crfrefine.engines.compiled import built_levels, processor_level
from crfrefine.errors import CrfRefineError


def installation() -> dict[str, str]:
    """Return names and texts, in the order of display. Nothing is raised: an engine that does not run says why."""
    threads = thread_limit()
    found = {"version": f"crfrefine {crfrefine.__version__}, Python {platform.python_version()}, {platform.platform()}"}
    try:
        cpu: Any = get_backend("cpu")
        found["engine"] = f"{cpu.level}; compiled for {', '.join(built_levels())}; this processor runs {processor_level()}"
    except CrfRefineError as error:
        found["engine"] = str(error)
    try:
        gpu: Any = get_backend("cuda")
        properties = gpu.device.properties()
        found["GPU"] = f"{properties['name']}, {format_size(properties['memory'])}"
    except CrfRefineError as error:
        found["GPU"] = str(error)
    return {**found, "threads": f"{threads.number}: {threads.source}", **dict(_extras())}


def _extras() -> Iterator[tuple[str, str]]:
    """Yield each extra with the versions of its packages, or with the command that installs them."""
    try:
        lines = metadata.requires("crfrefine") or []
    except metadata.PackageNotFoundError:
        yield "extras", "not known, as crfrefine is not installed: pip install it"
        return
    names: dict[str, list[str]] = {}
    for line in lines:
        match = re.match(r"([\w.-]+).*\bextra == ['\"]([\w-]+)['\"]", line)
        if match and match[1] != "crfrefine":
            names.setdefault(match[2], []).append(match[1])
    for extra, packages in names.items():
        try:
            yield extra, ", ".join(f"{name} {metadata.version(name)}" for name in packages)
        except metadata.PackageNotFoundError as error:
            yield extra, f"{error.name} is not installed: pip install 'crfrefine[{extra}]'"
