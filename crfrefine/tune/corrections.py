"""The folder of corrections: the files of each case, and the lock of the program that has it."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from crfrefine.arrays.strokes import Strokes
from crfrefine.base.array_types import Array
from crfrefine.base.notes import Note, NoteKind
from crfrefine.cases.case import Case
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.case_headers import read_scalar
from crfrefine.cases.label_input import read_strokes
from crfrefine.cases.other_grid import WorkGrid
from crfrefine.cases.reading_options import ReadingOptions
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io.writing import cannot_write, check_output, check_writable
from crfrefine.parameters.model import CrfParameters
from crfrefine.tune.case import TuneCase
from crfrefine.tune.drawing import Drawing, UnreadableDrawingError, has_unsaved

# States of a case.
UNTOUCHED = "untouched"
CORRECTED = "corrected"  # it has strokes that are not saved with their result
SAVED = "saved"
OUTDATED = "outdated"  # its result was saved with other parameters

_LOCK = ".crfrefine-tune.lock"
_TOKEN = re.compile(r"[A-Za-z0-9_-]{32}")  # the form of a token
_SECRET = 0o600  # mode of a file that only its user may read
_ADDRESS = ".crfrefine-tune.address"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of storage without locks


@dataclass(frozen=True)
class Corrections:
    """The files of a case."""

    drawing: Path  # all its strokes, from the first one on
    strokes: Path
    parameters: Path  # those that made the result
    refined: Path

    @classmethod
    def of_case(cls, case_id: str, folder: Path) -> Corrections:
        """Return the files of a case in a folder."""
        name = f"{case_id}.nii.gz"
        return cls(
            folder / "drawing" / f"{case_id}.json",
            folder / "strokes" / name,
            folder / "parameters" / f"{case_id}.toml",
            folder / "refined" / name,
        )

    def check(self) -> None:
        """Raise CrfRefineError if a file cannot be written."""
        for path in vars(self).values():
            check_output(path)

    def state(self, parameters: CrfParameters, inputs: str) -> str:
        """Return the state of the case in the files: UNTOUCHED, CORRECTED, SAVED or OUTDATED.

        `inputs` is what `stamp_of_inputs` gives. The result is written after the strokes. A program
        that was ended between the two leaves strokes that are newer.
        """
        drawing = self.drawing
        has_strokes = self.strokes.exists()
        if drawing.exists():
            mtime_ns = drawing.stat().st_mtime_ns
            if has_unsaved(drawing, mtime_ns, inputs, has_strokes=has_strokes):
                return CORRECTED
        if not has_strokes:
            return UNTOUCHED
        if not self.refined.exists():
            return CORRECTED
        written = self.refined.stat().st_mtime_ns
        if written < self.strokes.stat().st_mtime_ns:
            return CORRECTED
        if not self.parameters.exists():
            return OUTDATED
        if written < self.parameters.stat().st_mtime_ns:
            return CORRECTED
        return SAVED if self.read_parameters() == parameters else OUTDATED

    def put_aside(self, result: str) -> Path | None:
        """Give the result another name if another program has changed it; return that name.

        `result` is the digest of the file as it was written; "" means that it is not known.
        """
        if not result or not self.refined.exists():
            return None
        present = digest_of_file(self.refined)
        if present == result:
            return None
        folder = self.refined.parents[1] / "replaced"
        check_writable(folder)
        return self.refined.rename(folder / f"{present[:8]}-{self.refined.name}")

    def read_parameters(self) -> CrfParameters | None:
        """Return the parameters that made the result; None without any."""
        if not self.parameters.exists():
            return None
        return _load(self.parameters, self.parameters.stat().st_mtime_ns)


def open_drawing(
    corrections: Corrections | None,
    case: TuneCase,
    reading: ReadingOptions,
    strokes_of: Callable[[Case], Strokes | None],
) -> tuple[Drawing, list[Note]]:
    """Return the strokes that were drawn before, or else those of files, with notes on files.

    They are kept in their file from now on, if there is a folder. `strokes_of` returns those of a
    case's files, or raises InputError.
    """
    grid = case.network_labels.shape
    if corrections is None:
        return Drawing(grid, strokes_of(case)), []
    notes: list[Note] = []
    if not corrections.drawing.exists():
        files = list(case.strokes)
        if corrections.strokes.exists():
            drawn = read_saved_strokes(corrections.strokes, case, reading, strokes_of, notes)
            files.append((corrections.strokes, drawn))
        drawing = Drawing(grid, strokes_of(replace(case, strokes=tuple(files))))
    else:
        drawing = Drawing.read(corrections.drawing, grid)
        others = tuple(pair for pair in case.strokes if pair[0] != corrections.strokes)
        given = strokes_of(replace(case, strokes=others))
        if given is not None and drawing.take(given):
            names = ", ".join(str(path) for path, _ in others)
            notes.append(NoteKind.STROKES_DRAWN_OVER(names))
    drawing.keep_in(corrections.drawing)
    return drawing, notes


def read_saved_strokes(
    path: Path,
    case: TuneCase,
    reading: ReadingOptions,
    strokes_of: Callable[[Case], Strokes | None],
    notes: list[Note],
) -> Array:
    """Return (*grid) the values of a file of strokes, which another program may have written.

    It is taken, or refused, as `infer --strokes` does. `notes` gets those for the user.
    """
    try:
        header = read_scalar(path, "strokes", case.like, reading)
        values = read_strokes(header, WorkGrid(case.like), reading, case.segments, notes)
        strokes_of(replace(case, strokes=((path, values),)))
    except CrfRefineError as error:
        name = "" if str(path) in str(error) else f"{path}: "
        raise UnreadableDrawingError(f"{name}{error}\n  To begin anew, move it away.") from error
    return values.astype(np.uint16)


def digest_of_file(path: Path) -> str:
    """Return a text that only a file with these bytes has."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp_of_inputs(files: CaseFiles) -> str:
    """Return a text that differs once a file that makes the result of a case was exchanged."""
    states = []
    for path in (*files.images, *files.network, files.mask):
        if path is not None:
            with suppress(OSError):
                status = path.stat()
                states.append(f"{path.name} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(states).encode("utf-8", "surrogateescape")).hexdigest()


@lru_cache(maxsize=20_000)
def _load(path: Path, _mtime_ns: int) -> CrfParameters | None:
    """Return the parameters of a file; None if it has lost them."""
    with suppress(CrfRefineError, OSError, ValueError):
        return CrfParameters.from_toml(path.read_text())
    return None


class FolderLock:
    """Keeps other programs out of a folder of corrections, since the later one would win."""

    def __init__(self, folder: Path) -> None:
        """Take the lock; raise InputError if another program has it, or has removed it meanwhile.

        The lock of a program that was killed on this machine is gone. One of another machine, on
        shared storage, may have the file all the same.
        """
        check_writable(folder)
        self._path = folder / _LOCK
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise cannot_write(self._path, error) from error
        owner = os.pread(self._file, 1000, 0).decode(errors="replace")
        is_locked = True
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_locked = False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        number = os.fstat(self._file).st_ino
        is_there = self._path.exists() and self._path.stat().st_ino == number
        this_host = socket.gethostname()
        host = this_host
        with suppress(ValueError, KeyError, TypeError):
            host = json.loads(owner)["host"]
        if not is_locked or not is_there or host != this_host:
            os.close(self._file)
            raise InputError(
                f"{folder}: another crfrefine tune corrects cases in this folder: {owner}\n"
                "  End it, or name another folder with --corrections. If it does not run any more, "
                f"remove {self._path}"
            )
        this_program = {"process": os.getpid(), "host": this_host}
        try:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, json.dumps(this_program).encode(), 0)
        except OSError as error:
            self.release()
            raise cannot_write(self._path, error) from error

    def release(self) -> None:
        """Give the folder back."""
        if self._file < 0:
            return
        with suppress(OSError):
            self._path.unlink()
        os.close(self._file)
        self._file = -1


def read_address(folder: Path) -> tuple[int, str] | None:
    """Return port and token of the last page of a folder; None if they are unknown.

    A file that others may read, or that somebody else has written, does not count.
    """
    path = folder / _ADDRESS
    with suppress(OSError, ValueError, TypeError, RecursionError):
        status = path.lstat()
        if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == _SECRET:
            port, token = json.loads(path.read_bytes())
            if _TOKEN.fullmatch(token):
                return int(port), str(token)
    return None


def write_address(folder: Path, port: int, token: str) -> None:
    """Write port and token of the page, for this user only."""
    path = folder / _ADDRESS
    with suppress(OSError):  # Then the next start has another address.
        path.unlink(missing_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _SECRET)
        with os.fdopen(file, "w") as opened:
            json.dump([port, token], opened)
