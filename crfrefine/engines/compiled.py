"""Finding and loading the compiled C++ engine.

The engine is compiled for several instruction sets; the best one that this processor supports is imported. The environment variable
`CRFREFINE_CPU_LEVEL` (baseline, avx2, avx512) selects a lower one, for tests and comparisons.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from crfrefine.errors import BackendUnavailableError, ConfigError

LEVELS = ("baseline", "avx2", "avx512")
"""The instruction sets that the engine is compiled for, lowest first."""

ASKED_LEVEL = "CRFREFINE_CPU_LEVEL"
"""Variable of the environment: the level to take."""

_ADAPTER = "cpu.py"
"""The module that calls the engine: where this file is the same, the engine fits."""


def load_engine() -> Any:
    """Import the compiled engine.

    Raises:
        BackendUnavailableError: there is no engine, or the processor does not support the level that the environment variable asks for.
        ConfigError: the environment variable names no instruction set.
    """
    asked = os.environ.get(ASKED_LEVEL)
    if asked is not None and asked not in LEVELS:
        raise ConfigError(f"{ASKED_LEVEL} is {asked!r}; expected one of {', '.join(LEVELS)}")
    best = LEVELS.index(best_level())
    wanted = best if asked is None else LEVELS.index(asked)
    if wanted > best:
        raise BackendUnavailableError(f"{ASKED_LEVEL} asks for {asked}, but this processor runs only {LEVELS[best]}")
    return _import_level(LEVELS[wanted])


def best_level() -> str:
    """Return the highest level that is compiled and that this processor supports.

    Raises:
        BackendUnavailableError: there is no engine.
    """
    return str(_import_level(LEVELS[0]).cpu_level())


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
