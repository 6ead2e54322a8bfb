"""GIPL, VTK and MRC, and rare headers of MetaImage and NRRD: SimpleITK converts them to NRRD.

ITK's readers crash on some damaged files and never return from others: a separate process converts
the file, with limits of memory and time. It ends with this one, and its target has no name. A file
is converted for its header, and once more for its voxels.
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
from typing import BinaryIO, Literal, cast

from crfrefine.base.limits import memory_left
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
try:
    import SimpleITK
except ModuleNotFoundError:
    sys.exit(3)
try:
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO(source_io)
    reader.SetFileName(source)
    reader.ReadImageInformation()
    # Such as "vector of 32-bit float".
    kind = SimpleITK.GetPixelIDValueAsString(reader.GetPixelID())
    promised = math.prod(reader.GetSize()) * reader.GetNumberOfComponents()
    if "complex" in kind:
        promised *= 2
    if unit != "numbers":
        promised = promised * int(kind.split("-bit")[0].split()[-1]) // 8
    if promised > int(most):
        sys.stdout.write(str(promised))
        sys.exit(4)
    image = reader.Execute()
    for key in image.GetMetaDataKeys():
        image.EraseMetaData(key)  # Such as the name of a space, which the writer would repeat.
    writer = SimpleITK.ImageFileWriter()
    writer.SetImageIO("NrrdImageIO")
    writer.SetFileName("/dev/fd/" + target)
    writer.Execute(image)
except RuntimeError as error:
    sys.exit(str(error).strip().splitlines()[-1])
"""
# Two of its exit statuses; another failure has status 1 and ends with a line about it.
_NOT_INSTALLED = 3
_CUT_OFF = 4
_READERS = {
    "GIPL": "GiplImageIO",
    "MRC": "MRCImageIO",
    "VTK": "VTKImageIO",
    "MetaImage": "MetaImageIO",
    "NRRD": "NrrdImageIO",
}


def recognizes(start: bytes) -> bool:
    """Return whether a file with this beginning, compressed or not, is GIPL, MRC or VTK."""
    return _format_of(inflated(start)) is not None


def _format_of(start: bytes) -> str | None:
    """Return the name of the format of an uncompressed file with this beginning."""
    if start[252:256] in _GIPL_MAGIC:
        return "GIPL"
    if start[208:212] == b"MAP ":
        return "MRC"
    if start.startswith(b"# vtk DataFile"):
        return "VTK"
    return None


def read_header(path: Path, name: str | None = None) -> VolumeHeader:
    """Read the header of a file of MetaImage or NRRD.

    None means GIPL, MRC or VTK, by its content. Raise UnsupportedFormatError (damaged, or not
    readable by ITK), InputError (no SimpleITK, or no usable geometry) or CapacityError.
    """
    with _as_nrrd(path, name) as (found, header):
        # The voxels are not in one place, but come from another conversion.
        header = replace(header, path=path, source=None, voxel_files=())
        if name is None:
            return replace(header, format=f"{found}, through ITK", template=None)
        return replace(header, format=name, template=())


@contextmanager
def open_voxels(header: VolumeHeader) -> Iterator[Decoder]:
    """Convert the file, and open it at its first voxel."""
    name = header.format if header.format in _READERS else None
    with _as_nrrd(header.path, name) as (_, converted), reading.open_voxels(converted) as decoder:
        yield decoder


@contextmanager
def _as_nrrd(path: Path, name: str | None) -> Iterator[tuple[str, VolumeHeader]]:
    """Convert a file for the time of the block: the name of its format, and the NRRD's header."""
    folder = tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=folder) as target:
            if name is None:
                name = _convert_by_content(path, target, folder)
            else:
                _convert(path, None, name, target, 1 << 62)
            place = f"/dev/fd/{target.fileno()}"
            try:
                yield name, nrrd.read_header(Path(place))
            except CrfRefineError as error:  # It is an error of the file.
                raise type(error)(str(error).replace(place, str(path))) from error
    except OSError as error:
        raise CapacityError(
            f"{path}: cannot be converted in {folder}: {error.strerror or error}; "
            "set TMPDIR to another folder"
        ) from error


def _convert_by_content(path: Path, target: BinaryIO, folder: str) -> str:
    """Convert a file of GIPL, MRC or VTK, compressed or not; return the format's name."""
    start = read_start(path)
    unpacked = inflated(start)
    name = _format_of(unpacked)
    if name is None:
        raise UnsupportedFormatError(
            f"{path}: not a file of GIPL, MRC or VTK, although its name says so, or damaged"
        )
    if unpacked is start:
        with path.open("rb") as source:
            _convert(path, source, name, target, *_content_size(source, path, name, start))
        return name
    with tempfile.TemporaryFile(dir=folder) as source:
        with open_bytes(path, "gzip") as reader:
            shutil.copyfileobj(cast("BinaryIO", reader), source, BLOCK_BYTES)
        source.flush()
        _convert(path, source, name, target, *_content_size(source, path, name, unpacked))
    return name


def _content_size(file: BinaryIO, path: Path, name: str, start: bytes) -> tuple[int, str]:
    """Return the capacity of a file with this beginning, in "bytes of voxels" or "numbers".

    ITK would invent missing voxels.
    """
    size = os.fstat(file.fileno()).st_size
    offset = 256
    if name == "MRC":
        order: Literal["little", "big"] = "big" if start[212:213] == b"\x11" else "little"
        offset = 1024 + int.from_bytes(start[92:96], order)
    elif name == "VTK":
        end = _VTK_HEADER.search(start)
        if end is None:
            raise UnsupportedFormatError(
                f"{path}: not an image of VTK: no line SCALARS or VECTORS in its header"
            )
        offset = end.end()
        if b"\nASCII" in start[:offset]:
            file.seek(offset)
            return sum(len(line.split()) for line in file), "numbers"
    if size < offset:
        raise cut_off(path, f"a header of {offset} bytes", f"it holds {size}")
    return size - offset, "bytes of voxels"


def _convert(
    path: Path,
    source: BinaryIO | None,
    name: str,
    target: BinaryIO,
    most: int,
    unit: str = "numbers",
) -> None:
    """Convert a file in a separate process, which refuses a header that promises more than `most`.

    `source` is the open file; None means that ITK opens the path itself, as its header may name
    other files. Errors are those of the file `path`.
    """
    files = [target.fileno()]
    place = str(path)
    if source is not None:
        files.append(source.fileno())
        place = f"/dev/fd/{source.fileno()}"
    memory = max(memory_left(), _MIN_MEMORY)
    limits = [str(os.getpid()), str(memory)]
    conversion = [place, _READERS[name], str(target.fileno())]
    command = [sys.executable, "-P", "-c", _CONVERT, *limits, *conversion]
    command += [unit, str(most)]
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
    if done.returncode == _NOT_INSTALLED:
        raise InputError(
            f"{path}: such files need SimpleITK, which is not installed: "
            "pip install 'crfrefine[itk]'"
        )
    if done.returncode == _CUT_OFF:
        promised = f"{done.stdout.split()[-1]} {unit}"
        raise cut_off(path, promised, f"it holds {most}")
    if done.returncode != 0:
        message = (done.stderr.strip().splitlines() or [""])[-1]
        lacks = ("MemoryError", "bad_alloc", "Failed to allocate memory")
        if any(word in message for word in lacks):
            raise CapacityError(
                f"{path}: ITK needs more memory for this file than there is: {shorten(message)}"
            )
        problem = "cannot convert this file"
        if done.returncode < 0:
            problem = f"crashed on this file (signal {-done.returncode})"
        reason = shorten(re.sub(r"/dev/fd/\d+", path.name, message))
        raise UnsupportedFormatError(
            f"{path}: ITK {problem}: {reason or 'it is damaged; export it again'}"
        )
