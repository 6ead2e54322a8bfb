"""GIPL, VTK and MRC, and rare headers of MetaImage and NRRD: SimpleITK converts the file to NRRD in a separate process.

ITK's readers crash on some damaged files and never return from others: the process has limits of memory and time. It ends
with this one, and its target has no name. A file is converted for its header, and once more for its voxels.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from crfrefine.base.limits import memory_left, memory_limit
from crfrefine.base.text import shorten
from crfrefine.errors import CapacityError, CrfRefineError, InputError, UnsupportedFormatError
from crfrefine.io import nrrd
from crfrefine.io.streams import BLOCK_BYTES, cut_off, inflated, open_bytes, read_start
from crfrefine.io.volume import VolumeHeader

if TYPE_CHECKING:
    from crfrefine.io.streams import VoxelStream

FAMILY = "ITK"  # Name of these formats in the table of `crfrefine.io.paths`.
MAX_SECONDS = 600.0  # The conversion is given up after this time.
_MIN_MEMORY = 4 << 30  # Of addresses, which SimpleITK takes many of before it reads anything.
_GIPL_MAGIC = ((0xEFFFE9B0).to_bytes(4, "big"), (0x2AE389B8).to_bytes(4, "big"))
_VTK_HEADER = re.compile(rb"\n(?:SCALARS[^\n]*\nLOOKUP_TABLE|VECTORS|COLOR_SCALARS|TENSORS)[^\n]*\n", re.IGNORECASE)
# The other process compares the promise of the header with the content of the file before it asks for memory.
# In prctl, 1 is PR_SET_PDEATHSIG, and 9 SIGKILL.
_CONVERT = """
import os, sys
parent, memory, source, source_io, target, max_numbers, max_bytes = sys.argv[1:]
import ctypes
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
if os.getppid() != int(parent):
    sys.exit("the process that started this one has ended")
import resource
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
most = int(memory) if hard == resource.RLIM_INFINITY else min(int(memory), hard)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
import math
import SimpleITK
try:
    reader, writer = SimpleITK.ImageFileReader(), SimpleITK.ImageFileWriter()
    reader.SetImageIO(source_io)
    reader.SetFileName(source)
    reader.ReadImageInformation()
    kind = SimpleITK.GetPixelIDValueAsString(reader.GetPixelID())  # Such as "vector of 32-bit float".
    numbers = math.prod(reader.GetSize()) * reader.GetNumberOfComponents() * (2 if "complex" in kind else 1)
    if numbers > int(max_numbers):
        sys.exit(f"cut off: {numbers} numbers")
    num_bytes = numbers * int(kind.split("-bit")[0].split()[-1]) // 8
    if num_bytes > int(max_bytes):
        sys.exit(f"cut off: {num_bytes} bytes of voxels")
    image = reader.Execute()
    for key in image.GetMetaDataKeys():
        image.EraseMetaData(key)  # Such as the name of a space, which the writer would repeat.
    writer.SetImageIO("NrrdImageIO")
    writer.SetFileName("/dev/fd/" + target)
    writer.Execute(image)
except RuntimeError as error:
    sys.exit(str(error).strip().splitlines()[-1])
"""
_READERS = {"GIPL": "GiplImageIO", "MRC": "MRCImageIO", "VTK": "VTKImageIO", "MetaImage": "MetaImageIO", "NRRD": "NrrdImageIO"}
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
    """Read the header of a file of MetaImage or NRRD; None means GIPL, MRC or VTK, by its content."""
    # Raises UnsupportedFormatError (damaged, or not readable by ITK), InputError (no SimpleITK, or
    # no usable geometry) or CapacityError.
    with _as_nrrd(path, name) as (file_format, header):
        shown = file_format if file_format == name else f"{file_format}, through ITK"
        return replace(header, path=path, format=shown, template=() if file_format == name else None, source=None)


@contextmanager
def open_voxels(header: VolumeHeader) -> Iterator[VoxelStream]:
    """Convert the file, and open it at its first voxel."""
    name = header.format if header.format in _READERS else None
    with _as_nrrd(header.path, name) as (_, converted):
        assert converted.source is not None
        with converted.source.stream() as stream:
            yield stream


@contextmanager
def _as_nrrd(path: Path, name: str | None) -> Iterator[tuple[str, VolumeHeader]]:
    """Convert a file for the time of the block: the name of its format, and the header of the NRRD, which has no name."""
    with ExitStack() as files:
        source, limits = None, (_UNLIMITED, _UNLIMITED)
        if name is None:
            start = read_start(path)
            unpacked = inflated(start)
            name = _name(unpacked or start)
            if name is None:
                raise UnsupportedFormatError(f"{path}: not a file of GIPL, MRC or VTK, although its name says so, or damaged")
            source = files.enter_context(_scratch(path) if unpacked else path.open("rb"))
            if unpacked:
                with open_bytes(path, "gzip") as reader:
                    shutil.copyfileobj(cast("BinaryIO", reader), source, BLOCK_BYTES)
                source.flush()
            limits = _content_size(source, path, name, unpacked or start)
        target = files.enter_context(_scratch(path))
        _convert(path, source, _READERS[name], target, *limits)
        place = f"/dev/fd/{target.fileno()}"
        try:
            yield name, nrrd.read_header(Path(place))
        except CrfRefineError as error:  # It is an error of the file.
            if place not in str(error):
                raise
            raise type(error)(str(error).replace(place, str(path))) from error


@contextmanager
def _scratch(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file without a name for the conversion of a file."""
    folder = tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            yield file
    except OSError as error:
        raise CapacityError(f"{path}: cannot be converted in {folder}: {error.strerror or error}; set TMPDIR to another folder") from error


def _content_size(file: BinaryIO, path: Path, name: str, start: bytes) -> tuple[int, int]:
    """Return the most numbers and bytes of voxels that a file, which begins so, can hold: ITK would invent missing ones."""
    size, offset = os.fstat(file.fileno()).st_size, 256
    if name == "MRC":
        offset = 1024 + int.from_bytes(start[92:96], "big" if start[212:213] == b"\x11" else "little")
    elif name == "VTK":
        end = _VTK_HEADER.search(start)
        if end is None:
            raise UnsupportedFormatError(f"{path}: not an image of VTK: no line SCALARS or VECTORS in its header")
        offset = end.end()
        if b"\nASCII" in start[:offset]:
            file.seek(offset)
            return sum(len(line.split()) for line in file), _UNLIMITED
    if size < offset:
        raise cut_off(path, f"a header of {offset} bytes", f"it holds {size}")
    return _UNLIMITED, size - offset


def _convert(path: Path, source: BinaryIO | None, reader: str, target: BinaryIO, max_numbers: int, max_bytes: int) -> None:
    """Convert a file in a separate process; errors are those of the file `path`."""
    # The source is the open file to read; None means that ITK opens the file, whose header may name
    # other files. It can hold at most so many numbers and bytes of voxels.
    memory = max(memory_left(memory_limit()), _MIN_MEMORY)
    files = [file.fileno() for file in (source, target) if file is not None]
    place = path if source is None else f"/dev/fd/{files[0]}"
    arguments = (os.getpid(), memory, place, reader, files[-1], max_numbers, max_bytes)
    command = [sys.executable, "-P", "-c", _CONVERT, *map(str, arguments)]
    try:
        # `errors` makes the output text.
        done = subprocess.run(command, capture_output=True, errors="replace", timeout=MAX_SECONDS, check=False, pass_fds=files)
    except subprocess.TimeoutExpired:
        raise UnsupportedFormatError(f"{path}: ITK did not end within {MAX_SECONDS:g} s: the file is damaged, or too large") from None
    message = (done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode == 0:
        return
    if message.startswith("cut off: "):
        held = max_numbers if message.endswith("numbers") else max_bytes
        raise cut_off(path, message.removeprefix("cut off: "), f"it holds {held}")
    if message == "ModuleNotFoundError: No module named 'SimpleITK'":
        raise InputError(f"{path}: such files need SimpleITK, which is not installed: pip install 'crfrefine[itk]'")
    if "MemoryError" in message or "bad_alloc" in message or "Failed to allocate memory" in message:
        raise CapacityError(f"{path}: ITK needs more memory for this file than there is: {shorten(message)}")
    if done.returncode < 0:
        raise UnsupportedFormatError(f"{path}: ITK crashed on this file (signal {-done.returncode}): it is damaged; export it again")
    message = re.sub(r"/dev/fd/\d+", path.name, message)
    raise UnsupportedFormatError(f"{path}: ITK cannot convert this file: {shorten(message)}")
