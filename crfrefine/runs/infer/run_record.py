"""The record that a run keeps in its output folder: the name of its file, and the records that are already there.

`summary_lines.py` writes it, a line as each case ends; `earlier.py` and `status` read it. Each part has a file of its own: several
processes, perhaps on several machines, may then write at the same time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crfrefine.runs.infer.summary_reading import LINES_SUFFIX

if TYPE_CHECKING:
    from crfrefine.runs.infer.options import InferenceOptions

RECORD_FOLDER = ".crfrefine"
"""In the output folder."""


def record_file(options: InferenceOptions, inputs: Sequence[str]) -> Path | None:
    """Return the record of a run; None if the output is a file, which has none. Runs on other inputs, absolute, have other files."""
    if options.writes_file:
        return None
    digest = hashlib.sha256("\0".join(inputs).encode(errors="surrogateescape")).hexdigest()[:8]
    return options.output / RECORD_FOLDER / f"run-{digest}-part-{options.part_id}-of-{options.num_parts}{LINES_SUFFIX}"


def records_in(folder: Path) -> list[Path]:
    """Return the records in an output folder; none if there are none."""
    return sorted((folder / RECORD_FOLDER).glob(f"run-*{LINES_SUFFIX}"))
