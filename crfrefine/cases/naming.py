"""Names of labels and modalities for pictures, as `dataset.json` beside the files of a run has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from crfrefine.cases.dataset_description import description_or_note


@dataclass(frozen=True)
class Names:
    """Names of what a picture shows."""

    labels: Mapping[int, str] = field(default_factory=dict)  # by number
    modalities: tuple[str, ...] = ()  # in order; empty if unknown
    notes: tuple[str, ...] = ()  # files that could not be used

    @property
    def plain_labels(self) -> dict[int, str]:
        """Names of the labels without the number that titles begin with."""
        return {label: title.removeprefix(f"{label} ") for label, title in self.labels.items()}


def read_names(places: Sequence[Path]) -> Names:
    """Read the first `dataset.json` in these folders, or in their parent folders.

    Returns:
        The names; none if there is no such file. A file that cannot be used is named in `notes`: names change no result.
    """
    notes: list[str] = []
    for path in dict.fromkeys(places):
        found = description_or_note(path if path.is_dir() else path.parent, notes)
        if found is not None:
            return Names(found.label_titles, found.channel_names, tuple(dict.fromkeys(notes)))
    return Names(notes=tuple(dict.fromkeys(notes)))
