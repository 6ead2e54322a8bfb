"""What the files of a case hold, by which `--continue` sees whether they were changed.

Times alone do not tell: a copy of a folder has other ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from typing import TypeAlias

from crfrefine.base.text import shorten_value
from crfrefine.cases.case_files import CaseFiles
from crfrefine.io.paths import files_read

LABEL_MAP = "label_map"  # the one output among the contents of a case
_BLOCK_BYTES = 1 << 20

# The checksum of files, and a stamp, which is one of their sizes and times.
Content: TypeAlias = Mapping[str, str]
# The checksum of a file that an earlier run has written, and those of the inputs that it was made
# of, or none if the run had other settings.
FileBefore: TypeAlias = tuple[str, Mapping[str, str | None]]


def content_of(paths: Iterable[Path], known: Content | None = None) -> dict[str, str]:
    """Return the content of files; one with the stamp of `known` is taken for it and not read.

    Files that cannot be read count as missing.
    """
    # It is fifteen times as fast as that of zlib, and not needed where nothing is read.
    from isal.isal_zlib import crc32

    files = []
    states = []
    for path in paths:
        with suppress(OSError, ValueError):
            status = path.stat()
            if S_ISREG(status.st_mode):  # Reading a pipe would wait for ever.
                files.append(path)
                states.append((status.st_size, status.st_mtime_ns))
    stamp = f"{crc32(repr(states).encode()):08x}"
    if known is not None and known.get("stamp") == stamp:
        return dict(known)
    checksum = 0
    for path in files:
        with suppress(OSError), path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK_BYTES):
                checksum = crc32(block, checksum)
    num_bytes = sum(size for size, _ in states)
    return {"stamp": stamp, "checksum": f"{num_bytes}-{checksum:08x}"}


def contents_of_inputs(
    files: CaseFiles, known: Mapping[str, Content] | None = None
) -> dict[str, dict[str, str]]:
    """Return the contents of each kind of input that a case has, by its word.

    Of several kinds a message says which one differs. A spacing that is given is one of them.
    """
    known = known or {}
    paths = {"images": files.images, "logits": files.logits, "strokes": files.strokes}
    if files.mask is not None:
        paths["mask"] = (files.mask,)
    contents = {}
    for kind, named in paths.items():
        if named:
            read = [file for path in named for file in files_read(path)]
            contents[kind] = content_of(read, known.get(kind))
    if files.spacing is not None:
        given = shorten_value(files.spacing)
        contents["spacing"] = {"stamp": given, "checksum": given}
    return contents


def checksums_of_inputs(contents: Mapping[str, Content]) -> dict[str, str | None]:
    """Return the checksum of each kind of input among the contents of a case."""
    checksums = {}
    for kind, content in contents.items():
        if kind != LABEL_MAP:
            checksums[kind] = content.get("checksum")
    return checksums


def changed_inputs(files: CaseFiles, known: Mapping[str, Content]) -> list[str]:
    """Return the words of the inputs that are not those of the known contents.

    None are known of a record of an older version; then nothing tells.
    """
    before = checksums_of_inputs(known)
    if not before:
        return []
    now = checksums_of_inputs(contents_of_inputs(files, known))
    kinds = dict.fromkeys((*before, *now))
    return [kind for kind in kinds if before.get(kind) != now.get(kind)]
