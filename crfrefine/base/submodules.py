"""Modules of a package as its attributes: imported when they are first used."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType


def on_first_use(package: str) -> tuple[Callable[[str], ModuleType], Callable[[], list[str]]]:
    """Return the `__getattr__` and the `__dir__` of a package, which imports its modules when they are first used."""

    def names() -> list[str]:
        from pkgutil import iter_modules

        return [found.name for found in iter_modules(sys.modules[package].__path__)]

    def get(name: str) -> ModuleType:
        if name.startswith("_") or name not in names():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        from importlib import import_module

        return import_module(f"{package}.{name}")

    return get, lambda: sorted({*vars(sys.modules[package]), *names()})
