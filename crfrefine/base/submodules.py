"""Modules of a package as its attributes: imported when they are first used."""

from __future__ import annotations

import sys
from types import ModuleType


def attributes_of(package: str) -> list[str]:
    """Return the names of a package's attributes, its modules included: its `__dir__`."""
    from pkgutil import iter_modules

    loaded = sys.modules[package]
    names = set(vars(loaded))
    names.update(module.name for module in iter_modules(loaded.__path__))
    return sorted(names)


def module_of(package: str, name: str) -> ModuleType:
    """Return a module of a package, imported: its `__getattr__`."""
    if name.startswith("_") or name not in attributes_of(package):
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    from importlib import import_module

    return import_module(f"{package}.{name}")
