"""Finding and loading the compiled C++ engine.

The best of its instruction sets for this processor is imported; `CRFREFINE_CPU_LEVEL` selects a lower one. A build from source has
the level of the machine and the baseline, wheels that are made for others have all (`CRFREFINE_LEVELS` of CMakeLists.txt).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from crfrefine.errors import BackendUnavailableError, ConfigError

# The instruction sets that the engine can be compiled for, lowest first; the baseline is always
# there.
LEVELS = ("baseline", "avx2", "avx512")
ASKED_LEVEL = "CRFREFINE_CPU_LEVEL"  # variable of the environment: the level to take
_ADAPTER = "cpu.py"  # the module that calls the engine: where this file is the same, the engine fits


def load_engine() -> Any:
    """Import the compiled engine."""
    # Raises BackendUnavailableError if no engine is installed, or if it or the processor lacks the
    # level that the environment asks for, and ConfigError if that level is not an instruction set.
    levels = find_levels()
    level = os.environ.get(ASKED_LEVEL, levels.best)
    if level not in LEVELS:
        raise ConfigError(f"{ASKED_LEVEL} is {level!r}; expected one of {', '.join(LEVELS)}")
    if LEVELS.index(level) > LEVELS.index(levels.processor):
        raise BackendUnavailableError(f"{ASKED_LEVEL} asks for {level}, but this processor runs only {levels.processor}")
    if level not in levels.built:
        raise BackendUnavailableError(
            f"{ASKED_LEVEL} asks for {level}, but the engine was compiled for {' and '.join(levels.built)}; unset it, or install all "
            "levels from a clone: pip install --config-settings=cmake.define.CRFREFINE_LEVELS=all ."
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
    return Levels(built, processor, max(set(built) & set(LEVELS[: LEVELS.index(processor) + 1]), key=LEVELS.index))


def _import_level(level: str) -> Any:
    name = f"crfrefine._engine_{level}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        installed = _installed_engine(level)
    except ImportError as error:
        raise BackendUnavailableError(f"the compiled CPU engine cannot be loaded ({error}); reinstall crfrefine") from error
    spec = importlib.util.spec_from_file_location(name, installed)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


def _installed_engine(level: str) -> Path:
    """Return the compiled engine of the installed package, for a source tree that Python, started in a clone, finds before it."""
    own = Path(__file__).resolve().with_name(_ADAPTER)
    tree, place = own.parents[1], "install crfrefine from there or from the package index (building it needs a C++20 compiler)"
    for path in sys.path:
        package = Path(path, "crfrefine").resolve()
        adapter, engines = package / "engines" / _ADAPTER, sorted(package.glob(f"_engine_{level}.*"))
        if package != tree and engines and adapter.is_file():
            if adapter.read_bytes() == own.read_bytes():
                return engines[0]
            place = f"that of the installed package {package} is of another version; run Python outside of the tree, or install it again"
            break
    raise BackendUnavailableError(f"the compiled CPU engine is missing from {tree}; {place}")
