"""Finding and loading the compiled C++ engine.

The engine is compiled for several instruction sets, its levels, and the best one for this
processor is imported; `CRFREFINE_CPU_LEVEL` selects a lower one. A build from source has the
baseline and the level of the machine; wheels have all (`CRFREFINE_LEVELS` of CMakeLists.txt).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple

from crfrefine.errors import BackendUnavailableError, ConfigError

# The instruction sets that the engine can be compiled for, lowest first; every build has the first.
LEVELS = ("baseline", "avx2", "avx512")
ASKED_LEVEL = "CRFREFINE_CPU_LEVEL"  # environment variable that names the level to import


def load_engine() -> Any:
    """Import the compiled engine.

    Raises BackendUnavailableError without an engine at the level that the environment names.
    """
    levels = find_levels()
    level = os.environ.get(ASKED_LEVEL, levels.best)
    if level not in LEVELS:
        raise ConfigError(f"{ASKED_LEVEL} is {level!r}; expected one of {', '.join(LEVELS)}")
    if level not in levels.built or LEVELS.index(level) > LEVELS.index(levels.processor):
        raise BackendUnavailableError(
            f"{ASKED_LEVEL} asks for {level}; this processor runs {levels.processor}, and the "
            f"engine was compiled for {' and '.join(levels.built)}; unset it, or "
            "pip install --config-settings=cmake.define.CRFREFINE_LEVELS=all . in a clone"
        )
    return _import_level(level)


class Levels(NamedTuple):
    """The levels of the engine on this machine."""

    built: tuple[str, ...]  # the compiled levels, lowest first
    processor: str  # the highest level that this processor supports, compiled or not
    best: str  # the highest level that is both compiled and supported


# Every layer asks for the engine several times, and listing the folder takes as long as the
# arithmetic of a small case.
@cache
def find_levels() -> Levels:
    """Return the levels of the machine; raises BackendUnavailableError without an engine."""
    baseline = _import_level(LEVELS[0])
    folder = Path(str(baseline.__file__)).parent
    built = tuple(level for level in LEVELS if any(folder.glob(f"_engine_{level}.*")))

    processor = str(baseline.cpu_level())
    supported = LEVELS[: LEVELS.index(processor) + 1]
    best = [level for level in built if level in supported][-1]
    return Levels(built, processor, best)


def _import_level(level: str) -> Any:
    name = f"crfrefine._engine_{level}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        installed = _import_installed(level)
        if installed is not None:
            return installed
        raise BackendUnavailableError(
            f"the compiled CPU engine is missing from {Path(__file__).parents[1]}, and no "
            "installed package of this version has it; install crfrefine (building it needs a "
            "C++20 compiler), or run Python outside of a source tree"
        ) from error
    except ImportError as error:
        raise BackendUnavailableError(
            f"the compiled CPU engine cannot be loaded ({error}); reinstall crfrefine"
        ) from error


def _import_installed(level: str) -> Any | None:
    """Import the engine of the installed package into a source tree; None if none fits.

    Python finds the source tree first when it is started in a clone. An installed engine fits if
    the module that calls it, cpu.py, has the same text here and there.
    """
    name = f"crfrefine._engine_{level}"
    calling_module = Path(__file__).with_name("cpu.py").read_bytes()
    for entry in sys.path:
        package = Path(entry, "crfrefine")
        if not any(package.glob(f"_engine_{level}.*")):
            continue
        if (package / "engines" / "cpu.py").read_bytes() != calling_module:
            continue
        spec = PathFinder.find_spec(name, [str(package)])
        if spec is not None and spec.loader is not None:
            engine = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(engine)
            sys.modules[name] = engine
            return engine
    return None
