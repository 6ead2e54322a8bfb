"""The files that a command reads and that no output may replace; `io.writing` checks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from crfrefine.errors import InputError

# A name of a file without links, or the numbers of its device and inode.
Identity = Path | tuple[int, int]

# The inputs of each command that runs in this process, by their identities.
_commands: list[dict[Identity, Path]] = []


@contextmanager
def keeping_inputs() -> Iterator[None]:
    """Protect the files that `add_inputs` names until the block or the decorated function ends."""
    inputs: dict[Identity, Path] = {}
    _commands.append(inputs)
    try:
        yield
    finally:
        _commands[:] = [others for others in _commands if others is not inputs]


def add_inputs(*files: Path) -> None:
    """Protect files that the command reads."""
    if not _commands:
        return
    for file in files:
        for identity in identities(file):
            for inputs in _commands:
                inputs[identity] = file


def check_no_input(path: Path) -> None:
    """Raise InputError if a file to write is an input, even by another path or as a hard link."""
    output_identities = identities(path)
    for inputs in _commands:
        for identity in output_identities:
            file = inputs.get(identity)
            # A new file may have the inode number of an input that was removed.
            if file is None or not identities(file) & output_identities:
                continue
            other_name = "" if file == path else f", {file}"
            raise InputError(
                f"{path}: would replace an input{other_name}; "
                "choose another name or folder for the output"
            )


def identities(path: Path) -> set[Identity]:
    """Return identities of a file; two names mean the same file if their sets share an element."""
    found: set[Identity] = {Path(os.path.realpath(path))}  # no exception for circular links
    # Mounts, and file systems that ignore case, give one file different names.
    with suppress(OSError):
        status = path.stat()
        found.add((status.st_dev, status.st_ino))
    return found
