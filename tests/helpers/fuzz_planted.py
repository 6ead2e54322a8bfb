"""Readers with a planted fault: the fuzzer must find each of them, and go on."""

from __future__ import annotations

import ctypes
import os
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest import mock

from fuzz_volumes import volume_targets
from fuzz_worker import Target

from crfrefine.errors import InputError

_EVERY = 30


def _make(rng: random.Random) -> Mapping[str, bytes]:
    return {"a": bytes([rng.randrange(_EVERY)])}


def _is_bad(path: Path) -> bool:
    return path.read_bytes() == b"\7"


def _raises(path: Path, rng: random.Random) -> None:
    if _is_bad(path):
        raise KeyError("planted")


def _crashes(path: Path, rng: random.Random) -> None:
    if _is_bad(path):
        ctypes.string_at(0)


def _ends(path: Path, rng: random.Random) -> None:
    if _is_bad(path):
        os._exit(3)


def _hangs(path: Path, rng: random.Random) -> None:
    while _is_bad(path):
        try:
            time.process_time()
        except Exception:  # As a reader that takes everything for damage.
            continue


def _waits(path: Path, rng: random.Random) -> None:
    if _is_bad(path):
        os.read(os.pipe()[0], 1)


def _grows(path: Path, rng: random.Random) -> None:
    if _is_bad(path):
        bytearray(1 << 29)


def _asks_for_too_much(path: Path, rng: random.Random) -> None:
    if _is_bad(path):
        bytearray(1 << 34)


def _writes(path: Path, rng: random.Random) -> None:
    if _is_bad(path):
        os.write(2, b"noise")


def _floods(path: Path, rng: random.Random) -> None:
    raise InputError(f"{path}: {'x' * 5000}" if _is_bad(path) else f"{path}: refused")


def _steers(path: Path, rng: random.Random) -> None:
    raise InputError(f"{path}: \x1b[2J" if _is_bad(path) else f"{path}: refused")


def _hides_the_name(path: Path, rng: random.Random) -> None:
    raise InputError("somewhere" if _is_bad(path) else f"{path}: refused")


def _warns(path: Path, rng: random.Random) -> None:
    import warnings

    if _is_bad(path):
        warnings.warn("planted", RuntimeWarning, stacklevel=1)


def planted_targets() -> Iterator[Target]:
    """Made up readers, and real ones of which one check is taken out."""
    for reader in (
        _raises,
        _crashes,
        _ends,
        _hangs,
        _waits,
        _grows,
        _asks_for_too_much,
        _writes,
        _floods,
        _steers,
        _hides_the_name,
        _warns,
    ):
        yield Target(f"planted-{reader.__name__[1:].replace('_', '-')}", _make, reader, most_seconds=0.3)
    real = {target.name: target for target in volume_targets()}
    for name, target, place, substitute in (
        (
            "integers",
            real["mha"],
            "crfrefine.io.metaimage_header.Fields.whole",
            lambda self, key, default=None: int(self.text(key, default)),
        ),
        ("finite", real["nii"], "crfrefine.io.decode._is_finite", lambda block: True),
    ):
        yield Target(f"planted-{name}", target.make, _patched(target, place, substitute), target.names_file)


def _patched(target: Target, place: str, substitute: object):
    def read(path: Path, rng: random.Random) -> None:
        with mock.patch(place, substitute):
            target.read(path, rng)

    return read
