"""GIPL, VTK and MRC, and rare headers of MetaImage and NRRD: SimpleITK converts the file to NRRD in a separate process.

ITK's readers crash on some damaged files and never return from others: the process has limits of
memory and time. It ends with this one, and its target has no name. A file is converted for its
header, and once more for its voxels.
"""

from __future__ import annotations

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
from typing import BinaryIO, cast

from crfrefine.base.limits import memory_left, memory_limit
from crfrefine.base.text import shorten
from crfrefine.errors import CapacityError, CrfRefineError, InputError, UnsupportedFormatError
from crfrefine.io import nrrd, reading
from crfrefine.io.streams import BLOCK_BYTES, Decoder, cut_off, inflated, open_bytes, read_start
from crfrefine.io.volume import VolumeHeader

MAX_SECONDS = 600.0  # The conversion is given up after this time.
_MIN_MEMORY = 4 << 30  # Of addresses, which SimpleITK takes many of before it reads anything.
_GIPL_MAGIC = ((0xEFFFE9B0).to_bytes(4, "big"), (0x2AE389B8).to_bytes(4, "big"))
_VTK_HEADER = re.compile(
    rb"\n(?:SCALARS[^\n]*\nLOOKUP_TABLE|VECTORS|COLOR_SCALARS|TENSORS)[^\n]*\n", re.IGNORECASE
)
# The other process compares the promise of the header with the content of the file before it asks
# for memory. In prctl, 1 is PR_SET_PDEATHSIG, and 9 SIGKILL.
_CONVERT = """
import os, sys
parent, memory, source, source_io, target, unit, most = sys.argv[1:]
import ctypes
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
if os.getppid() != int(parent):
    sys.exit("the process that started this one has ended")
import resource
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
memory = int(memory) if hard == resource.RLIM_INFINITY else min(int(memory), hard)
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
import math
import SimpleITK
try:
    reader, writer = SimpleITK.ImageFileReader(), SimpleITK.ImageFileWriter()
    reader.SetImageIO(source_io)
    reader.SetFileName(source)
    reader.ReadImageInformation()
    # Such as "vector of 32-bit float".
    kind = SimpleITK.GetPixelIDValueAsString(reader.GetPixelID())
    promised = math.prod(reader.GetSize()) * reader.GetNumberOfComponents() * (2 if "complex" in kind else 1)
    if unit != "numbers":
        promised = promised * int(kind.split("-bit")[0].split()[-1]) // 8
    if promised > int(most):
        sys.exit(f"cut off: {promised} {unit}")
    image = reader.Execute()
    for key in image.GetMetaDataKeys():
        image.EraseMetaData(key)  # Such as the name of a space, which the writer would repeat.
    writer.SetImageIO("NrrdImageIO")
    writer.SetFileName("/dev/fd/" + target)
    writer.Execute(image)
except RuntimeError as error:
    sys.exit(str(error).strip().splitlines()[-1])
"""
_READERS = {
    "GIPL": "GiplImageIO",
    "MRC": "MRCImageIO",
    "VTK": "VTKImageIO",
    "MetaImage": "MetaImageIO",
    "NRRD": "NrrdImageIO",
}
_UNLIMITED = 1 << 62


def recognizes(start: bytes) -> bool:
    """Return whether a file with this beginning, compressed or not, is GIPL, MRC or VTK."""
    return _name(inflated(start) or start) is not None


def _name(start: bytes) -> str | None:
    if start[252:256] in _GIPL_MAGIC:
        return "GIPL"
    if start[208:212] == b"MAP ":
        return "MRC"
    return "VTK" if start.startswith(b"# vtk DataFile") else None


def read_header(path: Path, name: str | None = None) -> VolumeHeader:
    """Read the header of a file of MetaImage or NRRD.

    None means GIPL, MRC or VTK, by its content.
    """
    # Raises UnsupportedFormatError (damaged, or not readable by ITK), InputError (no SimpleITK, or
    # no usable geometry) or CapacityError.
    with _as_nrrd(path, name) as (found, header):
        shown = f"{found}, through ITK" if name is None else name
        return replace(
            header, path=path, format=shown, template=None if name is None else (), source=None
        )


@contextmanager
def open_voxels(header: VolumeHeader) -> Iterator[Decoder]:
    """Convert the file, and open it at its first voxel."""
    name = header.format if header.format in _READERS else None
    with _as_nrrd(header.path, name) as (_, converted), reading.open_voxels(converted) as decoder:
        yield decoder


@contextmanager
def _as_nrrd(path: Path, name: str | None) -> Iterator[tuple[str, VolumeHeader]]:
    """Convert a file for the time of the block: the name of its format, and the header of the NRRD, which has no name."""
    start = read_start(path)
    is_by_content = name is None
    unpacked = inflated(start) if is_by_content else b""
    name = name or _name(unpacked or start)
    if name is None:
        raise UnsupportedFormatError(
            f"{path}: not a file of GIPL, MRC or VTK, although its name says so, or damaged"
        )
    folder = tempfile.gettempdir()
    try:
        with (
            tempfile.TemporaryFile(dir=folder) as target,
            tempfile.TemporaryFile(dir=folder) if unpacked else path.open("rb") as source,
        ):
            if unpacked:
                with open_bytes(path, "gzip") as reader:
                    shutil.copyfileobj(cast("BinaryIO", reader), source, BLOCK_BYTES)
                source.flush()
            _convert(path, source if is_by_content else None, name, target, unpacked or start)
            place = f"/dev/fd/{target.fileno()}"
            try:
                yield name, nrrd.read_header(Path(place))
            except CrfRefineError as error:  # It is an error of the file.
                raise type(error)(str(error).replace(place, str(path))) from error
    except OSError as error:
        raise CapacityError(
            f"{path}: cannot be converted in {folder}: {error.strerror or error}; set TMPDIR to another folder"
        ) from error


def _content_size(file: BinaryIO, path: Path, name: str, start: bytes) -> tuple[str, int]:
    """Return the most numbers, or bytes of voxels, that a file, which begins so, can hold: ITK would invent missing ones."""
    size = os.fstat(file.fileno()).st_size
    offset = 256
    if name == "MRC":
        offset = 1024 + int.from_bytes(
            start[92:96], "big" if start[212:213] == b"\x11" else "little"
        )
    elif name == "VTK":
        end = _VTK_HEADER.search(start)
        if end is None:
            raise UnsupportedFormatError(
                f"{path}: not an image of VTK: no line SCALARS or VECTORS in its header"
            )
        offset = end.end()
        if b"\nASCII" in start[:offset]:
            file.seek(offset)
            return "numbers", sum(len(line.split()) for line in file)
    if size < offset:
        raise cut_off(path, f"a header of {offset} bytes", f"it holds {size}")
    return "bytes of voxels", size - offset


def _convert(
    path: Path, source: BinaryIO | None, name: str, target: BinaryIO, start: bytes
) -> None:
    """Convert the open file `source`, which begins so, in a separate process.

    Errors are those of the file `path`.
    """
    # Without a source ITK opens the file itself, as its header may name other files.
    unit, most = (
        ("numbers", _UNLIMITED) if source is None else _content_size(source, path, name, start)
    )
    memory = max(memory_left(memory_limit()), _MIN_MEMORY)
    files = [file.fileno() for file in (source, target) if file is not None]
    place = path if source is None else f"/dev/fd/{files[0]}"
    arguments = (os.getpid(), memory, place, _READERS[name], files[-1], unit, most)
    command = [sys.executable, "-P", "-c", _CONVERT, *map(str, arguments)]
    try:
        # `errors` makes the output text.
        done = subprocess.run(
            command,
            capture_output=True,
            errors="replace",
            timeout=MAX_SECONDS,
            check=False,
            pass_fds=files,
        )
    except subprocess.TimeoutExpired:
        raise UnsupportedFormatError(
            f"{path}: ITK did not end within {MAX_SECONDS:g} s: the file is damaged, or too large"
        ) from None
    message = (done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode == 0:
        return
    if message.startswith("cut off: "):
        raise cut_off(path, message.removeprefix("cut off: "), f"it holds {most}")
    if message == "ModuleNotFoundError: No module named 'SimpleITK'":
        raise InputError(
            f"{path}: such files need SimpleITK, which is not installed: pip install 'crfrefine[itk]'"
        )
    if any(word in message for word in ("MemoryError", "bad_alloc", "Failed to allocate memory")):
        raise CapacityError(
            f"{path}: ITK needs more memory for this file than there is: {shorten(message)}"
        )
    if done.returncode < 0:
        problem = f"crashed on this file (signal {-done.returncode})"
    else:
        problem = "cannot convert this file"
    message = shorten(re.sub(r"/dev/fd/\d+", path.name, message))
    raise UnsupportedFormatError(
        f"{path}: ITK {problem}: {message or 'it is damaged; export it again'}"
    )
