"""One binary file per label beside a label map, for `--save-structures` where the input is not such files already."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crfrefine.cases.declared_labels import RESERVED_NAMES
from crfrefine.io.segments import Segment, named_segments, segments_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from crfrefine.cases.case_files import CaseFiles

_MOST_OF_A_STEM = 100


@dataclass(frozen=True)
class LabelFiles:
    """Where the labels of a case go. Which labels there are is known only when the label map is.

    Attributes:
        folder: gets the files, and holds nothing else.
        suffix: of the files.
        names: of labels by their numbers, for labels that no segment describes.
    """

    folder: Path
    suffix: str
    names: Mapping[int, str] = field(default_factory=dict)

    def of(self, labels: NDArray[np.integer[Any]], segments: Sequence[Segment]) -> dict[Path, Segment]:
        """Return the segment of each file: of all labels that occur, and of all that have a name.

        Args:
            labels: the label map.
            segments: what its input says of the labels, if anything.
        """
        named = {label: name for label, name in self.names.items() if name not in RESERVED_NAMES}
        found: dict[str, tuple[Path, Segment]] = {}
        for segment in segments_of(labels, segments or named_segments(named)):
            stem = _stem(segment)
            while stem.casefold() in found:
                stem = f"{stem}_{segment.label}"
            found[stem.casefold()] = self.folder / f"{stem}{self.suffix}", segment
        return dict(found.values())


def segments_in(files: CaseFiles) -> tuple[Segment, ...]:
    """Return what the label map of a case says of its labels; nothing if the network's output is not a label map."""
    from crfrefine.io import read_header

    return read_header(files.logits[0]).segments if len(files.logits) == 1 else ()


def _stem(segment: Segment) -> str:
    """Return a segment's name as that of a file: `Niere__linke` for `Niere, linke`."""
    return re.sub(r"[^\w+-]", "_", segment.name)[:_MOST_OF_A_STEM] or f"Label_{segment.label}"
