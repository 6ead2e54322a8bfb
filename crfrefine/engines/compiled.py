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
from typing import Any

from crfrefine.errors import BackendUnavailableError, ConfigError

# The instruction sets that the engine can be compiled for, lowest first; every build has the first.
LEVELS = ("baseline", "avx2", "avx512")
ASKED_LEVEL = "CRFREFINE_CPU_LEVEL"  # environment variable that names the level to import


# Every layer asks for the engine several times, and listing the folder takes as long as the
# arithmetic of a small case.
@cache
def load_engine() -> Any:
    """Import the compiled engine: at the level that the environment names, else at the best one.

    Raises BackendUnavailableError without an engine at that level.
    """
    baseline = _import_level(LEVELS[0])
    built = built_levels(baseline)
    processor = str(baseline.cpu_level())
    supported = LEVELS[: LEVELS.index(processor) + 1]
    best = [level for level in built if level in supported][-1]
    level = os.environ.get(ASKED_LEVEL, best)
    if level not in LEVELS:
        raise ConfigError(f"{ASKED_LEVEL} is {level!r}; expected one of {', '.join(LEVELS)}")
    if level not in built or level not in supported:
        raise BackendUnavailableError(
            f"{ASKED_LEVEL} asks for {level}; this processor runs {processor}, and the "
            f"engine was compiled for {' and '.join(built)}; unset it, or "
            "pip install --config-settings=cmake.define.CRFREFINE_LEVELS=all . in a clone"
        )
    return _import_level(level)


def built_levels(engine: Any) -> tuple[str, ...]:
    """Return the levels that were compiled beside an engine, lowest first."""
    folder = Path(str(engine.__file__)).parent
    return tuple(level for level in LEVELS if any(folder.glob(f"_engine_{level}.*")))


def _import_level(level: str) -> Any:
    """Import the engine of a level, in a source tree without engines that of an installed package.

    Python finds the source tree first when it is started in a clone. An installed engine fits if
    the module that calls it, cpu.py, has the same text here and there.
    """
    name = f"crfrefine._engine_{level}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        missing = error
    except ImportError as error:
        raise BackendUnavailableError(
            f"the compiled CPU engine cannot be loaded ({error}); reinstall crfrefine"
        ) from error

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
    raise BackendUnavailableError(
        f"the compiled CPU engine is missing from {Path(__file__).parents[1]}, and no "
        "installed package of this version has it; install crfrefine (building it needs a "
        "C++20 compiler), or run Python outside of a source tree"
    ) from missing
