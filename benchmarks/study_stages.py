"""What a study has done already.

Stages that are kept while their command, their inputs and everything before them are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from crfrefine.io.paths import stem_of


def say(text: str) -> None:
    print(f"study: {text}", file=sys.stderr, flush=True)


def listing(folder: Path) -> list[str]:
    """Names and checksums of the files of a folder.

    A copy of the data is the same data, whatever its times.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    return [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files]


class Stages:
    """The stages of a study in a folder of its own, each with its own subfolder.

    `stages.json` says what is complete.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self._name = name
        self._file = folder / "stages.json"
        folder.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, Any] = (
            json.loads(self._file.read_text()) if self._file.exists() else {}
        )
        self._before = ""

    def run(self, stage: str, inputs: Iterable[object], work: Callable[[Path], None]) -> Path:
        """Do a stage unless it is complete; return its folder.

        What an earlier run left of it is kept if its inputs are the same (the work must then go on
        with it), and removed otherwise.
        """
        parts = "\0".join(map(str, [self._before, stage, *inputs]))
        self._before = hashlib.sha256(parts.encode()).hexdigest()[:16]
        folder = self.folder / stage
        known = self._known.get(stage, {})
        if known.get("digest") == self._before and known.get("complete"):
            say(f"{self._name}: {stage} is there already")
            return folder
        if known.get("digest") != self._before and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        self._note(stage, complete=False)
        say(f"{self._name}: {stage}")
        work(folder)
        self._note(stage, complete=True)
        return folder

    def _note(self, stage: str, *, complete: bool) -> None:
        self._known[stage] = {"digest": self._before, "complete": complete}
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps(self._known, indent=1) + "\n")
        new.replace(self._file)


def crfrefine(*arguments: object, log: Path) -> float:
    """Run the command as users do: its progress is shown, its standard output goes to a file.

    Return the peak of its memory, MiB.
    """
    words = [str(argument) for argument in arguments]
    say("crfrefine " + shlex.join(words))
    with (
        log.open("w") as stream,
        subprocess.Popen(
            [sys.executable, "-P", "-m", "crfrefine", *words], stdout=stream
        ) as process,
    ):
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(
            f"study: `crfrefine {words[0]}` ended with status {process.returncode}; what it said "
            f"is above and in {log}"
        )
    return usage.ru_maxrss / 1024


def link_files(files: Sequence[Path], folder: Path) -> None:
    """Link files into a folder, with those that belong to them, as a MetaImage's voxels do."""
    for file in files:
        folder.mkdir(parents=True, exist_ok=True)
        belonging = f"{stem_of(file)}."
        for path in {
            file,
            *(other for other in file.parent.iterdir() if other.name.startswith(belonging)),
        }:
            link = folder / path.name
            if not link.is_symlink():
                link.symlink_to(path.resolve())
