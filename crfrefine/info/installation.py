"""Describe the installation: engine, GPU, threads, and the packages of each extra."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from typing import Any

from crfrefine.base.limits import available_threads, format_size
from crfrefine.errors import CrfRefineError
from crfrefine.version import __version__


def installation() -> dict[str, str]:
    """Return names and texts, in the order of display, at last the packages of each extra.

    Nothing is raised: an engine that does not run says why.
    """
    from crfrefine.engines import get_backend
    from crfrefine.engines.cpu import built_levels, load_engine

    try:
        cpu: Any = get_backend("cpu")
        loaded = load_engine()
        built = ", ".join(built_levels(loaded))
        engine = f"{cpu.level}; compiled for {built}; this processor runs {loaded.cpu_level()}"
    except CrfRefineError as error:
        engine = str(error)
    try:
        cuda: Any = get_backend("cuda")
        properties = cuda.device.properties()
        gpu = f"{properties['name']}, {format_size(properties['memory'])}"
    except CrfRefineError as error:
        gpu = str(error)
    python = f"Python {platform.python_version()}"
    shown = {
        "version": f"crfrefine {__version__}, {python}, {platform.platform()}",
        "engine": engine,
        "GPU": gpu,
        "threads": f"{available_threads()}: the machine has {os.cpu_count()} cores",
    }
    try:
        requirements = metadata.requires("crfrefine") or []
    except metadata.PackageNotFoundError:
        shown["extras"] = "not known, as crfrefine is not installed: pip install it"
        return shown
    packages_of_extras: dict[str, list[str]] = {}
    for requirement in requirements:
        match = re.match(r"([\w.-]+).*\bextra == ['\"]([\w-]+)['\"]", requirement)
        if match is not None and match[1] != "crfrefine":
            packages_of_extras.setdefault(match[2], []).append(match[1])
    for extra, packages in packages_of_extras.items():
        try:
            shown[extra] = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
        except metadata.PackageNotFoundError as error:
            shown[extra] = f"{error.name} is not installed: pip install 'crfrefine[{extra}]'"
    return shown
