"""Names of files in BIDS: entities such as sub-01, a suffix such as T1w, and the extension."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from crfrefine.io.paths import VOLUME_SUFFIXES, stem_of, suffix_of

_PART = re.compile(r"(?P<key>[a-zA-Z]+)-(?P<value>[a-zA-Z0-9+]+)")
_SUFFIX = re.compile(r"[a-zA-Z0-9]+")


@dataclass(frozen=True)
class BidsName:
    """A volume of a BIDS dataset.

    Attributes:
        path: of the file.
        entities: key to value, in the order of the name.
        suffix: such as "T1w" or "probseg".
    """

    path: Path
    entities: Mapping[str, str]
    suffix: str

    def without(self, *keys: str) -> dict[str, str]:
        """Return the entities but for some."""
        return {key: value for key, value in self.entities.items() if key not in keys}


def parse_name(path: Path) -> BidsName | None:
    """Return the parts of a volume's name; None if the name is none of BIDS, or the file is no volume."""
    if suffix_of(path) not in VOLUME_SUFFIXES:
        return None
    *parts, suffix = stem_of(path).split("_")
    found = [_PART.fullmatch(part) for part in parts]
    if not parts or not _SUFFIX.fullmatch(suffix) or any(match is None for match in found):
        return None
    entities = {match["key"]: match["value"] for match in found if match is not None}
    return BidsName(path, entities, suffix) if next(iter(entities)) == "sub" else None


def joined(entities: Mapping[str, str]) -> str:
    """Return entities as in a name: "sub-01_ses-2"."""
    return "_".join(f"{key}-{value}" for key, value in entities.items())


def volumes_in(folder: Path) -> list[BidsName]:
    """Return the volumes of a folder whose names are of BIDS, by name."""
    paths = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    return [name for name in map(parse_name, paths) if name is not None]
