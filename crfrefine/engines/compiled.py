"""Finding and loading the compiled C++ engine.

The best of its instruction sets for this processor is imported; `CRFREFINE_CPU_LEVEL` selects a lower one. A build from source has
the level of the machine and the baseline, wheels that are made for others have all (`CRFREFINE_LEVELS` of CMakeLists.txt).
"""

from __future__ import annotations

import importlib
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import crfrefine
from crfrefine.errors import BackendUnavailableError, ConfigError

# The instruction sets that the engine can be compiled for, lowest first; the baseline is always there.
LEVELS = ("baseline", "avx2", "avx512")
ASKED_LEVEL = "CRFREFINE_CPU_LEVEL"  # variable of the environment: the level to take


def load_engine() -> Any:
    """Import the compiled engine; raises BackendUnavailableError without one, or if the level of the environment is not there."""
    levels = find_levels()
    level = os.environ.get(ASKED_LEVEL, levels.best)
    if level not in LEVELS:
        raise ConfigError(f"{ASKED_LEVEL} is {level!r}; expected one of {', '.join(LEVELS)}")
    if level not in levels.built or LEVELS.index(level) > LEVELS.index(levels.processor):
        raise BackendUnavailableError(
            f"{ASKED_LEVEL} asks for {level}; this processor runs {levels.processor}, and the engine was compiled for "
            f"{' and '.join(levels.built)}; unset it, or pip install --config-settings=cmake.define.CRFREFINE_LEVELS=all . in a clone"
        )
    return _import_level(level)


class Levels(NamedTuple):
    """Levels of the machine."""

    built: tuple[str, ...]  # those that are compiled, lowest first
    processor: str  # the highest that this processor supports, compiled or not
    best: str  # the highest that is compiled and supported


@cache  # Every layer asks for the engine several times, and a look at the folder takes as long as the arithmetic of a small case.
def find_levels() -> Levels:
    """Return the levels of the machine; raises BackendUnavailableError without an engine."""
    baseline = _import_level(LEVELS[0])
    folder, processor = Path(str(baseline.__file__)).parent, str(baseline.cpu_level())
    built = tuple(level for level in LEVELS if any(folder.glob(f"_engine_{level}.*")))
    return Levels(
        built,
        processor,
        max(set(built) & set(LEVELS[: LEVELS.index(processor) + 1]), key=LEVELS.index),
    )


def _import_level(level: str) -> Any:
    name = f"crfrefine._engine_{level}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        if _add_installed_engine(level):
            return importlib.import_module(name)
        raise BackendUnavailableError(
            f"the compiled CPU engine is missing from {Path(__file__).parents[1]}, and no installed package of this version has it; "
            "install crfrefine (building it needs a C++20 compiler), or run Python outside of a source tree"
        ) from error
    except ImportError as error:
        raise BackendUnavailableError(
            f"the compiled CPU engine cannot be loaded ({error}); reinstall crfrefine"
        ) from error


def _add_installed_engine(level: str) -> bool:
    """Let a source tree, which Python finds first when it is started in a clone, take the engine of the installed package."""
    adapter = Path(__file__).with_name(
        "cpu.py"
    )  # the module that calls the engine: where it is the same, the engine fits
    for package in (Path(path, "crfrefine") for path in sys.path):
        if (
            any(package.glob(f"_engine_{level}.*"))
            and (package / "engines" / "cpu.py").read_bytes() == adapter.read_bytes()
        ):
            crfrefine.__path__.append(str(package))
            importlib.invalidate_caches()
            return True
    return False
