"""Readers with a planted fault: the fuzzer must find each of them, and go on."""

from __future__ import annotations

import ctypes
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from fuzz_volumes import volume_targets
from fuzz_worker import Target

from crfrefine.errors import InputError


def _raise(error: Exception) -> None:
    raise error


def _hang() -> None:
    while True:
        try:
            time.process_time()
        except Exception:  # As a reader that takes everything for damage.
            continue


# What a reader does with one input of thirty. Of the last ones, it refuses the others.
_FAULTS: dict[str, Callable[[], object]] = {
    "raises": lambda: _raise(KeyError("planted")),
    "crashes": lambda: ctypes.string_at(0),
    "ends": lambda: os._exit(3),
    "hangs": _hang,
    "waits": lambda: os.read(os.pipe()[0], 1),
    "grows": lambda: bytearray(3 << 27),
    "asks-for-too-much": lambda: bytearray(1 << 34),
    "writes": lambda: os.write(2, b"noise"),
    "warns": lambda: warnings.warn("planted", RuntimeWarning, stacklevel=1),
}
_MESSAGES = {"floods": f"{{path}}: {'x' * 5000}", "steers": "{path}: \x1b[2J", "hides-the-name": "somewhere"}
# Real readers of which one check is taken out.
_PATCHES = {
    "integers": ("mha", "crfrefine.io.metaimage.Fields.whole", lambda self, key, default=None: int(self.text(key, default))),
    "finite": ("nii", "crfrefine.io.decode._is_finite", lambda block: True),
}


def planted_targets() -> Iterator[Target]:
    """Made up readers, and patched ones."""
    for name in (*_FAULTS, *_MESSAGES):

        def read(path: Path, rng: random.Random, name: str = name) -> None:
            is_bad = path.read_bytes() == b"\7"
            if name in _MESSAGES:
                raise InputError((_MESSAGES[name] if is_bad else "{path}: refused").format(path=path))
            if is_bad:
                _FAULTS[name]()

        # Only what never ends must wait for the end of its time: a busy machine takes some for much memory.
        most_seconds = 0.3 if name in ("hangs", "waits") else 3.0
        yield Target(f"planted-{name}", lambda rng: {"a": bytes([rng.randrange(30)])}, read, most_seconds=most_seconds)
    real = {target.name: target for target in volume_targets()}
    for name, (target, place, substitute) in _PATCHES.items():
        patched = mock.patch(place, substitute)(real[target].read)
        yield Target(f"planted-{name}", real[target].make, patched, real[target].names_file)
