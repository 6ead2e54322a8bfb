"""The record that a run keeps in its output folder: the name of its file, and the records that are already there.

`summary_lines.py` writes it, a line as each case ends; `earlier.py` and `status` read it. Each part has a file of its own: several
processes, perhaps on several machines, may then write at the same time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from crfrefine.io.paths import suffix_of
from crfrefine.runs.infer.summary_reading import LINES_SUFFIX

RECORD_FOLDER = ".crfrefine"
"""In the output folder."""


def record_file(output: Path, inputs: Sequence[str], num_parts: int, part_id: int) -> Path | None:
    """Return the record of a run; None if the output is a file, which has none."""
    if suffix_of(output) and not output.is_dir():
        return None
    digest = hashlib.sha256("\0".join(inputs).encode(errors="surrogateescape")).hexdigest()[:8]
    return output / RECORD_FOLDER / f"run-{digest}-part-{part_id}-of-{num_parts}{LINES_SUFFIX}"


def records_in(folder: Path) -> list[Path]:
    """Return the records in an output folder; none if there are none."""
    return sorted((folder / RECORD_FOLDER).glob(f"run-*{LINES_SUFFIX}"))
