"""The content of the files of a case, by which `--continue` sees whether they were changed.

Times are no evidence, as a copy of a folder has other ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from stat import S_ISREG
from typing import TypeAlias

from crfrefine.base.text import shorten_value
from crfrefine.cases.case_files import CaseFiles
from crfrefine.io.paths import files_read

LABEL_MAP = "label_map"  # the one output among the contents of a case
_BLOCK_BYTES = 1 << 20
# The checksum of files, and a stamp, which is one of their sizes and times.
Content: TypeAlias = dict[str, str]
Contents: TypeAlias = dict[str, Content]  # of each kind of file of a case


def time_of_change(path: Path) -> str | None:
    """Return the time of a file's last change, UTC; None if it does not exist."""
    try:
        changed = path.stat().st_mtime_ns
    except (OSError, ValueError):  # A record may hold a name that the system refuses.
        return None
    return datetime.fromtimestamp(changed / 1e9, UTC).isoformat(timespec="microseconds")


def times_of_strokes(files: CaseFiles) -> dict[str, str | None]:
    """Return the time of the last change of each file of a case's strokes, by its name."""
    return {path.name: time_of_change(path) for path in files.strokes}


def content_of(paths: Iterable[Path], known: Content | None = None) -> Content:
    """Return the content of files; files that cannot be read count as missing.

    Files with the stamp of `known` have its content, and are not read.
    """
    # The checksum of isal is fifteen times as fast as that of zlib; commands that read no file need
    # not import it.
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


def contents_of_inputs(files: CaseFiles, known: Contents | None = None) -> Contents:
    """Return the content of each kind of input that a case has: "images", "logits" and so on.

    By these words a message says which input has changed. A spacing that is given counts as one.
    """
    known = known or {}
    paths = {"images": files.images, "logits": files.network, "strokes": files.strokes}
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


def checksums_of_inputs(contents: Contents) -> dict[str, str | None]:
    """Return the checksum of each kind of input among the contents of a case."""
    checksums = {}
    for kind, content in contents.items():
        if kind != LABEL_MAP:
            checksums[kind] = content.get("checksum")
    return checksums


def changed_inputs(files: CaseFiles, known: Contents) -> list[str]:
    """Return the kinds of inputs whose contents are not the known ones.

    Empty for the record of an older version, which has no contents.
    """
    before = checksums_of_inputs(known)
    if not before:
        return []
    now = checksums_of_inputs(contents_of_inputs(files, known))
    return [kind for kind in dict.fromkeys((*before, *now)) if before.get(kind) != now.get(kind)]
