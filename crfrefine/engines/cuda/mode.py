"""What the engine makes use of on a GPU: as a rule all that is tried, in plain mode as little as possible, to find what breaks."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace

from crfrefine.errors import ConfigError
from crfrefine.text import shorten_value

VARIABLE = "CRFREFINE_CUDA"
"""Variable of the environment: `plain`, names of what is switched on, or both, with commas between."""


@dataclass(frozen=True)
class Mode:
    """What is made use of.

    Attributes:
        pool: memory for work on PyTorch's tensors is PyTorch's, not CuPy's.
        checks: the host waits for each launch, and an error names the kernel.
    """

    pool: bool = True
    checks: bool = False


_PLAIN = Mode(pool=False, checks=True)
_NAMES = tuple(field.name for field in fields(Mode))


def asked_mode() -> Mode:
    """Return the mode that the environment asks for.

    Raises:
        ConfigError: it names something else.
    """
    asked = os.environ.get(VARIABLE, "")
    words = [word.strip() for word in asked.split(",") if word.strip()]
    if not {"plain", *_NAMES}.issuperset(words):
        raise ConfigError(
            f"{VARIABLE} is {shorten_value(asked)}; expected plain, or what to switch on ({', '.join(_NAMES)}), or both with commas between"
        )
    return replace(_PLAIN if "plain" in words else Mode(), **{word: True for word in words if word != "plain"})
