"""The finished folds of a run, and the file from which `--resume` takes them: plain JSON, in which numbers keep all their digits."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crfrefine.base.plain import from_plain, to_plain
from crfrefine.base.text import MAX_OF_A_REASON, shorten
from crfrefine.cases.case import CaseFiles
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io.atomic import atomic_files, real_path
from crfrefine.io.recognition import files_read
from crfrefine.train.baselines import VectorScaling
from crfrefine.train.candidates import FitResult
from crfrefine.train.methods import MethodValues

SCHEMA = 4


@dataclass(frozen=True)
class Part:
    """Finished work of one part of the run: a fold, or the training on all cases; `measured` is of the cases held out."""

    fit: FitResult | None = None
    scaling: VectorScaling | None = None
    measured: dict[str, MethodValues] | None = None


@dataclass(frozen=True)
class Done:
    """Finished work of a run: of the folds in their order, and of the training on all cases.

    `screening` is the mean Dice of each screened case (row) with each start (column).
    """

    parts: tuple[Part, ...]
    screening: list[list[float]] | None = None
    seconds: float = 0.0


def fingerprint(settings: dict[str, Any], cases: tuple[CaseFiles, ...]) -> str:
    """Return a digest of everything that the result depends on: settings, and names, sizes and dates of the files."""
    entries = []
    for case in cases:
        for path in (*case.images, *case.logits, case.mask, case.labels):
            for file in () if path is None else files_read(path):
                # If a separate file of voxels is missing, reading reports it.
                status = file.stat() if file == path or file.exists() else None
                entries.append([case.case_id, file.name, *((status.st_size, status.st_mtime_ns) if status else ())])
    return hashlib.sha256(json.dumps([settings, entries], sort_keys=True).encode()).hexdigest()


class Checkpoint:
    """The file in which a run saves its state; one with a different digest, from `fingerprint`, is refused."""

    def __init__(self, path: Path, digest: str) -> None:
        self._path = path
        self._digest = digest

    def load(self) -> Done | None:
        """Return the state of the stopped run; None if the file does not exist.

        Raises:
            InputError: the file belongs to other data or options, or is not a checkpoint.
        """
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            if content["schema"] == SCHEMA and content["fingerprint"] == self._digest:
                if content["checksum"] != _checksum(content["state"]):
                    raise ValueError("it was changed after it was written")
                return from_plain(Done, content["state"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, CrfRefineError) as error:
            reason = shorten(error, MAX_OF_A_REASON)
            raise InputError(f"{self._path}: not a checkpoint of train-crf ({reason}); remove it to start anew") from None
        raise InputError(
            f"{self._path}: is of a run with other data, options or another version; repeat its options exactly, "
            "or leave --resume out to start anew"
        )

    def save(self, done: Done) -> None:
        """Write the file, whole or not at all."""
        with atomic_files(self._path) as (file,):
            file.write(checkpoint_text(self._digest, to_plain(done)).encode())

    def remove(self) -> None:
        """Remove the file: the run has ended."""
        real_path(self._path).unlink(missing_ok=True)


def checkpoint_text(digest: str, state: Any) -> str:
    """Return the content of a checkpoint; its checksum tells a state that was changed since."""
    content = {"schema": SCHEMA, "fingerprint": digest, "checksum": _checksum(state), "state": state}
    return json.dumps(content)


def _checksum(state: Any) -> str:
    """Return a digest of a state, the same before it is written and after it is read."""
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()
