"""The names of structures beside the label maps of a run: a `dataset.json` in the output folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crfrefine.cases.dataset_description import read_dataset_description
from crfrefine.cases.declared_labels import RESERVED_NAMES
from crfrefine.errors import InputError
from crfrefine.io.atomic import check_replaceable, write_small_file
from crfrefine.io.volume import Segment, named_segments, segments_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from crfrefine.cases.case_files import CaseFiles


NAMES_FILE = "dataset.json"


def check_names_file(structures: Mapping[str, int], cases: Sequence[CaseFiles], output: Path) -> Path | None:
    """Return the file of names to write; None if none is needed: no case can be read, or the same names are there."""
    if all(files.problem for files in cases):
        return None
    path = output / NAMES_FILE
    if not os.path.lexists(path):
        check_replaceable(path)
        return path
    try:
        description = read_dataset_description(output)
        same = description is not None and dict(description.labels) == _labels(structures)
    except InputError:
        same = False
    if not same:
        raise InputError(
            f"{path}: has other labels than the {len(structures)} structures of this run, whose names belong into it; choose another "
            "output folder, or remove the file"
        )
    return None


def write_names(path: Path, structures: Mapping[str, int]) -> None:
    """Write the number of each structure by its name, as nnU-Net does."""
    write_small_file(path, (json.dumps({"labels": _labels(structures)}, indent=1) + "\n").encode())


def _labels(structures: Mapping[str, int]) -> dict[str, int]:
    return {"background": 0, **structures}


# One binary file per label beside a label map, for `--save-structures` where the input is not such files already.

_MAX_OF_A_STEM = 100


@dataclass(frozen=True)
class LabelFiles:
    """Where the labels of a case go. Which labels there are is known only when the label map is."""

    folder: Path  # holds nothing else
    suffix: str
    names: Mapping[int, str] = field(default_factory=dict)  # of labels that no segment describes

    def of(self, labels: NDArray[np.integer[Any]], segments: Sequence[Segment]) -> dict[Path, Segment]:
        """Return the segment of each file: of all labels that occur, and of all that have a name."""
        named = {label: name for label, name in self.names.items() if name not in RESERVED_NAMES}
        found: dict[str, tuple[Path, Segment]] = {}
        for segment in segments_of(labels, segments or named_segments(named)):
            # Such as `Niere__linke` for `Niere, linke`.
            stem = re.sub(r"[^\w+-]", "_", segment.name)[:_MAX_OF_A_STEM] or f"Label_{segment.label}"
            while stem.casefold() in found:
                stem = f"{stem}_{segment.label}"
            found[stem.casefold()] = self.folder / f"{stem}{self.suffix}", segment
        return dict(found.values())
