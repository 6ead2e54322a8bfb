"""Plain mode, to find what breaks on a GPU: CuPy's own memory for all work, and a wait after each launch, so that errors name a kernel."""

from __future__ import annotations

import os

from crfrefine.base.text import shorten_value
from crfrefine.errors import ConfigError

VARIABLE = "CRFREFINE_CUDA"
"""Variable of the environment that asks for it."""


def is_plain() -> bool:
    """Whether the environment asks for plain mode; raises ConfigError if it asks for something else."""
    asked = os.environ.get(VARIABLE, "").strip()
    if asked not in ("", "plain"):
        raise ConfigError(f"{VARIABLE} is {shorten_value(asked)}; expected plain, or nothing")
    return asked == "plain"
