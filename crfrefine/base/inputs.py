"""The files that a command reads and that no output may replace; `io.atomic` asks before it writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from crfrefine.errors import InputError

# The inputs of each command that runs in this process, by their identities.
_commands: list[dict[Path | tuple[int, int], Path]] = []


@contextmanager
def keeping_inputs() -> Iterator[None]:
    """Protect the files that `add_inputs` names until the block or the decorated function ends."""
    own: dict[Path | tuple[int, int], Path] = {}
    _commands.append(own)
    try:
        yield
    finally:
        _commands[:] = [inputs for inputs in _commands if inputs is not own]


def add_inputs(*files: Path) -> None:
    """Protect files that the command reads."""
    named = {key: file for file in files for key in identities(file)} if _commands else {}
    for inputs in _commands:
        inputs.update(named)


def check_no_input(path: Path) -> None:
    """Raise InputError if a file to write is an input, under any name: the same path, through links, or a hard link."""
    keys = identities(path)
    for inputs in _commands:
        for file in (inputs[key] for key in keys if key in inputs):
            if (
                identities(file) & keys
            ):  # The number of a file that was removed may be that of a new file now.
                same = "" if file == path else f", {file}"
                raise InputError(
                    f"{path}: would replace an input{same}; choose another name or folder for the output"
                )


def identities(path: Path) -> set[Path | tuple[int, int]]:
    """Return identities of a file; two names mean the same file if their sets share an element."""
    found: set[Path | tuple[int, int]] = {
        Path(os.path.realpath(path))
    }  # no exception for circular links
    # Mounts, and file systems that ignore case, give one file different names.
    with suppress(OSError):
        status = path.stat()
        found.add((status.st_dev, status.st_ino))
    return found
