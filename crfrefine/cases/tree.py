"""The volumes of a folder and what they hold, by their voxels, for proposals of patterns."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from crfrefine.base.text import counted, listed, see
from crfrefine.cases.content import is_label_map
from crfrefine.cases.conventions import SCORE_WORDS
from crfrefine.cases.layouts import File, Role, words_in
from crfrefine.cases.listing import Listings, find_matches
from crfrefine.cases.patterns import Match
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io import read_header
from crfrefine.io.formats import VOLUME_SUFFIXES
from crfrefine.io.paths import suffix_of
from crfrefine.io.volume import VolumeHeader

# Most files that are looked at, and most folders above them.
_MAX_FILES = 30_000
_MAX_DEPTH = 6
_MAX_READ = 200  # most files whose voxels are looked at
_MAX_ENDINGS = 16  # most of a role, one for each word at the end of a name
_MAX_SHAPES = 16  # most names without their digits whose file is looked at
_GUIDE = "docs/guide/patterns.md"
# The content of the files of a role.
IMAGE = "image"
SERIES = "series"  # several values per voxel
LABEL_MAP = "label map"
SCORES = "scores"
UNKNOWN = "unknown"  # cannot be read, or its files hold different things


class Tree:
    """The volumes of a folder, and what they hold."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[File] = []
        self._listings: Listings = {}
        self.headers: dict[str, VolumeHeader | None] = {}
        self._kinds: dict[str, str] = {}
        for place, folders, names in os.walk(folder):
            inside = Path(place).relative_to(folder)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if len(inside.parts) >= _MAX_DEPTH or len(self.files) > _MAX_FILES:
                folders.clear()
            for name in sorted(names):
                suffix = suffix_of(Path(name))
                if suffix in VOLUME_SUFFIXES and not name.startswith("."):
                    path = (inside / name).as_posix()
                    stem = name[: len(name) - len(suffix)]
                    # The suffix is kept as it is written.
                    self.files.append(File(path, inside.parts, stem, name[len(stem) :]))

    @cached_property
    def paths(self) -> frozenset[Path]:
        """The paths of all files."""
        return frozenset(self.folder / file.path for file in self.files)

    def header_of(self, file: File) -> VolumeHeader | None:
        """Return the header of a file, None if it cannot be read."""
        if file.path not in self.headers:
            try:
                self.headers[file.path] = read_header(self.folder / file.path)
            except (CrfRefineError, OSError):
                self.headers[file.path] = None
        return self.headers[file.path]

    def kind_of(self, file: File) -> str:
        """Return the content of a file, by its voxels; the first ones suffice for most images."""
        if file.path in self._kinds:
            return self._kinds[file.path]
        kind = UNKNOWN
        header = self.header_of(file)
        if header is not None and len(self._kinds) < _MAX_READ:
            with suppress(CrfRefineError, OSError):
                is_of_labels = is_label_map(header)
                if header.num_channels == 1:
                    kind = LABEL_MAP if is_of_labels else IMAGE
                elif not is_of_labels:
                    kind = SERIES
        self._kinds[file.path] = kind
        return kind

    def kind_of_role(self, role: Role) -> str:
        """Return the content of the files of a role, if it is the same in some of them.

        They are the first, middle and last one, and one for each word at the end of a name.
        """
        if words_in(role.last_name) & {*SCORE_WORDS}:
            return SCORES
        files = [role.files[case] for case in sorted(role.files)]
        endings: dict[str, File] = {}
        for file in files:
            *_, word = ["", *re.findall("[A-Za-z]+", file.stem)]
            endings.setdefault(word.lower(), file)
        chosen = [files[0], files[len(files) // 2], files[-1]]
        chosen += list(endings.values())[:_MAX_ENDINGS]
        kinds = {self.kind_of(file) for file in chosen}
        return kinds.pop() if len(kinds) == 1 else UNKNOWN

    def first_of_each_kind(self, paths: Collection[Path]) -> dict[str, Path]:
        """Return a file of each kind among some of the folder's files, by what they hold.

        One file is looked at of those whose names differ only in digits.
        """
        shapes: dict[str, File] = {}
        for file in self.files:
            if self.folder / file.path in paths:
                shapes.setdefault(re.sub(r"\d+", "#", file.stem), file)
        found: dict[str, Path] = {}
        for file in list(shapes.values())[:_MAX_SHAPES]:
            found.setdefault(self.kind_of(file), self.folder / file.path)
        return found

    def are_on_one_grid(self, files: Sequence[File]) -> bool:
        """Return whether files have the same grid, by their headers."""
        headers = [self.header_of(file) for file in files]
        first = headers[0]
        if first is None:
            return False
        return all(header is not None and first.on_same_grid(header) for header in headers)

    def find(self, pattern: str) -> list[Match]:
        """Return the files of a pattern, as commands find them; none for other texts."""
        try:
            place = self.folder / pattern
            matches = find_matches(place, VOLUME_SUFFIXES, self._listings, may_join=True)
        except (InputError, re.error):
            return []
        return [match for match in matches if match.path in self.paths]


def describe_shape(tree: Tree) -> str:
    """Return a line with the depth of a folder, the names in it, and the page on patterns."""
    depths = Counter(len(file.folders) for file in tree.files)
    (depth, _), *_ = depths.most_common(1)
    files = [file for file in tree.files if len(file.folders) == depth]
    levels = []
    for level in range(depth):
        folders = dict.fromkeys(file.folders[level] for file in files)
        levels.append(f"{counted(len(folders), 'folder')} ({listed(folders, 3)})")
    names = dict.fromkeys(file.stem for file in files)
    levels.append(f"{counted(len(names), 'name')} of files ({listed(names, 3)})")
    shape = f"{counted(len(tree.files), 'volume')}, most of them {depth} deep: {', '.join(levels)}"
    hint = ""
    if any(header is not None and header.num_channels > 1 for header in tree.headers.values()):
        hint = " Times of a file become files by convert FILE FOLDER --split."
    return f"\n  There are {shape}. No pattern was found that fits; {see(_GUIDE)}.{hint}"
