"""GIPL, VTK and MRC, through SimpleITK in a process of its own.

ITK's readers crash on some damaged files and never return from others. In a process of its own, with a limit of memory and of time, that
is an error of the one file. That process makes a MetaImage of the file, or a file of a MetaImage, for this one to read or write. Nothing is
kept: a file is converted for its header, and once more for its voxels.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.base.geometry import same_grid
from crfrefine.base.memory import memory_left, memory_limit
from crfrefine.errors import CapacityError, CrfRefineError, InputError, UnsupportedFormatError
from crfrefine.io import metaimage
from crfrefine.io.atomic import atomic_files
from crfrefine.io.streams import BLOCK_BYTES, cut_off, inflated, open_bytes, read_start
from crfrefine.io.volume import VolumeHeader

if TYPE_CHECKING:
    from crfrefine.io.content import Content
    from crfrefine.io.decode import VoxelStream
    from crfrefine.io.volume import Volume

MOST_SECONDS = 600.0
"""What takes longer is given up."""

_LEAST_MEMORY = 4 << 30  # Of addresses, which SimpleITK takes many of before it reads anything.
_GIPL_MAGIC = ((0xEFFFE9B0).to_bytes(4, "big"), (0x2AE389B8).to_bytes(4, "big"))
_VTK_HEADER = re.compile(rb"\n(?:SCALARS[^\n]*\nLOOKUP_TABLE|VECTORS|COLOR_SCALARS|TENSORS)[^\n]*\n", re.IGNORECASE)
_CONVERT = """
import sys
if sys.argv[3] != "0":
    import resource
    most, (_, hard) = int(sys.argv[3]), resource.getrlimit(resource.RLIMIT_AS)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
import SimpleITK
try:
    image = SimpleITK.ReadImage(sys.argv[1])
    SimpleITK.WriteImage(image, sys.argv[2])
except RuntimeError as error:
    sys.exit(str(error).strip().splitlines()[-1])
"""

_SUFFIXES = {"GIPL": ".gipl", "MRC": ".mrc", "VTK": ".vtk"}  # ITK goes by them.


def recognizes(start: bytes) -> bool:
    """Return whether a file with this beginning, compressed or not, is of one of these formats."""
    return _name(inflated(start) or start) is not None


def _name(start: bytes) -> str | None:
    if start[252:256] in _GIPL_MAGIC:
        return "GIPL"
    if start[208:212] == b"MAP ":
        return "MRC"
    return "VTK" if start.startswith(b"# vtk DataFile") else None


def read_header(path: Path) -> VolumeHeader:
    """Read the header of a file, all of which is converted for it.

    Raises:
        UnsupportedFormatError: damaged, or what ITK does not read.
        InputError: SimpleITK is not installed, or the geometry is not usable.
        CapacityError: it takes more memory than there is.
    """
    with _as_metaimage(path) as (name, header):
        return replace(header, path=path, format=f"{name}, through ITK", template=None, source=None)


@contextmanager
def open_voxels(header: VolumeHeader) -> Iterator[VoxelStream]:
    """Convert the file, and open it at its first voxel."""
    with _as_metaimage(header.path) as (_, converted), metaimage.open_voxels(converted) as stream:
        yield stream


def write(content: Content, like: Volume, threads: int) -> None:
    """Write a file through a MetaImage, and read it again: some of these formats cannot hold where the axes point to."""
    path = content.path
    with tempfile.TemporaryDirectory(prefix="crfrefine-") as folder:
        ours, again = Path(folder, "ours.mha"), Path(folder, "again.mha")
        theirs = Path(folder, "theirs" + "".join(path.suffixes[-2:]).lower())
        with _named(path, ours, again):
            metaimage.write(replace(content, path=ours, voxel_files=()), like, threads)
            _run(ours, theirs, path)
            _run(theirs, again, path)
            found = metaimage.read_header(again)
        if (found.num_channels, found.dtype) != (content.num_channels or 1, content.dtype.name):
            what = f"{content.num_channels or 1} channels of {content.dtype.name}"
            raise UnsupportedFormatError(f"{path}: this format cannot hold {what}; write NIfTI (.nii.gz) instead")
        if found.affine is None or not same_grid(found.grid_shape, found.affine, like.grid_shape, like.affine):
            raise UnsupportedFormatError(
                f"{path}: this format cannot hold the axes or the origin of {like.path or 'the volume'}; write NIfTI (.nii.gz) instead"
            )
        with theirs.open("rb") as source, atomic_files(path) as (file,):
            shutil.copyfileobj(source, file, BLOCK_BYTES)


@contextmanager
def _as_metaimage(path: Path) -> Iterator[tuple[str, VolumeHeader]]:
    """Convert a file for the time of the block: the name of its format, and the header of the MetaImage."""
    start = read_start(path)
    unpacked = inflated(start)
    name = _name(unpacked or start)
    if name is None:
        raise UnsupportedFormatError(f"{path}: not a file of {', '.join(_SUFFIXES)}, although its name says so, or damaged")
    with tempfile.TemporaryDirectory(prefix="crfrefine-") as folder:
        source, target = Path(folder, "theirs" + _SUFFIXES[name] + (".gz" if unpacked else "")), Path(folder, "ours.mha")
        try:
            source.symlink_to(path.absolute())
        except OSError:  # As on Windows, where not everybody may make links.
            shutil.copyfile(path, source)
        with _named(path, source, target):
            _run(source, target, path)
            header = metaimage.read_header(target)
            _require_whole(path, name, header, unpacked or start, compressed=bool(unpacked))
            yield name, header


@contextmanager
def _named(path: Path, *temporary: Path) -> Iterator[None]:
    """Let errors name the file, and not what was made of it."""
    try:
        yield
    except CrfRefineError as error:
        text = str(error)
        for other in temporary:
            text = text.replace(str(other), str(path))
        if text == str(error):
            raise
        raise type(error)(text) from error


def _require_whole(path: Path, name: str, header: VolumeHeader, start: bytes, *, compressed: bool) -> None:
    """Raise UnsupportedFormatError if a file, which begins so inflated, is cut off: ITK puts something in the place of missing voxels."""
    values = header.num_channels * math.prod(header.grid_shape)
    needed = values * np.dtype(header.dtype).itemsize
    size = path.stat().st_size
    if compressed:
        with open_bytes(path, "gzip") as reader:
            size = sum(map(len, iter(lambda: reader.read(BLOCK_BYTES), b"")))
    if name == "GIPL":
        needed += 256
    elif name == "MRC":
        needed += 1024 + int.from_bytes(start[92:96], "big" if start[212:213] == b"\x11" else "little")
    elif name == "VTK":
        end = _VTK_HEADER.search(start)
        if end is None:
            raise UnsupportedFormatError(f"{path}: not an image of VTK: no line SCALARS or VECTORS in its header")
        if b"\nASCII" in start[: end.end()]:
            size, needed = len(path.read_bytes()[end.end() :].split()), values
        else:
            needed += end.end()
    if size < needed:
        raise cut_off(path, f"{needed} {'numbers' if needed == values else 'bytes'}", f"it holds {size}")


def _run(source: Path, target: Path, named: Path) -> None:
    """Convert a file in a process of its own; errors are those of the file `named`."""
    left = memory_left(memory_limit())
    most = 0 if left is None or os.name != "posix" else max(left, _LEAST_MEMORY)
    command = [sys.executable, "-P", "-c", _CONVERT, str(source.absolute()), str(target), str(most)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=MOST_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise UnsupportedFormatError(f"{named}: ITK did not end within {MOST_SECONDS:g} s: the file is damaged, or too large") from None
    if done.returncode == 0:
        return
    said = (done.stderr.strip().splitlines() or [""])[-1].replace(str(source.absolute()), named.name).replace(str(target), named.name)
    if said == "ModuleNotFoundError: No module named 'SimpleITK'":
        raise InputError(f"{named}: files of this format need SimpleITK, which is not installed: pip install 'crfrefine[itk]'")
    if "MemoryError" in said or "bad_alloc" in said or "Failed to allocate memory" in said:
        raise CapacityError(f"{named}: ITK needs more memory for this file than there is: {said}")
    if done.returncode < 0:
        raise UnsupportedFormatError(
            f"{named}: ITK crashed on this file (signal {-done.returncode}): it is damaged; copy or export it again"
        )
    raise UnsupportedFormatError(f"{named}: ITK cannot convert this file: {said}")
