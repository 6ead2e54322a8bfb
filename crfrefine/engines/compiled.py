"""Finding and loading the compiled C++ engine.

The engine is compiled for several instruction sets; the best of them for this processor is imported. The environment variable
`CRFREFINE_CPU_LEVEL` (baseline, avx2, avx512) selects a lower one, for tests and comparisons. A build from source has the level
of the machine and the baseline, wheels that are made for others have all (`CRFREFINE_LEVELS` of CMakeLists.txt).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from crfrefine.errors import BackendUnavailableError, ConfigError

LEVELS = ("baseline", "avx2", "avx512")
"""The instruction sets that the engine can be compiled for, lowest first; the baseline is always there."""

ASKED_LEVEL = "CRFREFINE_CPU_LEVEL"
"""Variable of the environment: the level to take."""

INSTALL_ALL_LEVELS = "pip install --config-settings=cmake.define.CRFREFINE_LEVELS=all ."
"""In a clone: install the engine with all levels."""

_ADAPTER = "cpu.py"
"""The module that calls the engine: where this file is the same, the engine fits."""


def load_engine() -> Any:
    """Import the compiled engine.

    Raises:
        BackendUnavailableError: there is no engine, or the level that the environment variable asks for is not compiled, or not
            supported by the processor.
        ConfigError: the environment variable names no instruction set.
    """
    asked = os.environ.get(ASKED_LEVEL)
    if asked is None:
        return _import_level(best_level())
    if asked not in LEVELS:
        raise ConfigError(f"{ASKED_LEVEL} is {asked!r}; expected one of {', '.join(LEVELS)}")
    supported, built = processor_level(), built_levels()
    if LEVELS.index(asked) > LEVELS.index(supported):
        raise BackendUnavailableError(f"{ASKED_LEVEL} asks for {asked}, but this processor runs only {supported}")
    if asked not in built:
        raise BackendUnavailableError(
            f"{ASKED_LEVEL} asks for {asked}, but the engine was compiled for {' and '.join(built)}; unset it, or install all levels "
            f"from a clone: {INSTALL_ALL_LEVELS}"
        )
    return _import_level(asked)


def best_level() -> str:
    """Return the highest level that is compiled and that this processor supports; raises BackendUnavailableError without an engine."""
    supported = LEVELS[: LEVELS.index(processor_level()) + 1]
    return [level for level in built_levels() if level in supported][-1]


@cache
def processor_level() -> str:
    """Return the highest level that this processor supports, compiled or not; raises BackendUnavailableError without an engine."""
    return str(_import_level(LEVELS[0]).cpu_level())


@cache  # Every layer asks for the engine several times, and a look at the folder takes as long as the arithmetic of a small case.
def built_levels() -> tuple[str, ...]:
    """Return the levels that are compiled, lowest first; raises BackendUnavailableError without an engine."""
    folder = Path(str(_import_level(LEVELS[0]).__file__)).parent
    return tuple(level for level in LEVELS if any(folder.glob(f"_engine_{level}.*")))


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
    """Return the compiled engine of the installed package, for a source tree that hides it.

    Python started in the folder of a clone finds the source tree, which has no compiled engine, before the installed package.

    Raises:
        BackendUnavailableError: there is no installed engine, or it fits a different version of the adapter.
    """
    own = Path(__file__).resolve().with_name(_ADAPTER)
    for path in sys.path:
        package = Path(path, "crfrefine").resolve()
        adapter = package / "engines" / _ADAPTER
        engines = sorted(package.glob(f"_engine_{level}.*"))
        if package == own.parents[1] or not engines or not adapter.is_file():
            continue
        if adapter.read_bytes() == own.read_bytes():
            return engines[0]
        raise BackendUnavailableError(
            f"Python has found crfrefine's source tree {own.parents[1]}, which has no compiled engine, before the installed package "
            f"{package}, whose engine is of another version; run Python outside of the source tree or with PYTHONSAFEPATH=1, or install "
            "the tree again"
        )
    raise BackendUnavailableError(
        f"the compiled CPU engine is missing from {own.parents[1]}; install crfrefine from there or from the package index "
        "(building it needs a C++20 compiler)"
    )
