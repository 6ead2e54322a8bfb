"""DICOM for `crfrefine convert`, in a process with limits of time and memory, which decoders of damaged files need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crfrefine import errors
from crfrefine.base.geometry import require_usable, spacing_of
from crfrefine.base.text import shorten
from crfrefine.errors import CrfRefineError, UnsupportedFormatError
from crfrefine.io import dicom_files
from crfrefine.io.atomic import write_small_file
from crfrefine.io.dicom_files import SEGMENTATION as SEGMENTATION
from crfrefine.io.volume import Segment, Volume, VolumeHeader, segments_of

# Processor time that a conversion may take; each million bytes of its files adds a second.
SECONDS = 60
# Bytes that a conversion may take; 32 for each voxel and 4 for each byte of its files are added.
MEMORY = 1 << 30
_START = "import sys; sys.path.append(sys.argv[1]); from crfrefine.io.dicom import serve; serve()"


def read(path: Path, like: Path | None = None, *, grid_only: bool = False) -> Volume:
    """Read a series as it is measured, or a segmentation as a label map; both with a header.

    The path is the folder of a series, a file of several frames, or a segmentation, which is placed on
    the grid of the series `like`; with `grid_only`, voxels are 0. Raises InputError if the slices are no
    volume, or the two are of different patients or frames of reference; GridMismatchError; and
    UnsupportedFormatError or CapacityError if decoding fails, takes too long or takes too much memory.
    """
    answer, content = _run(path, {"task": "read", "like": like and str(like), "grid_only": grid_only})
    affine, dtype = np.array(answer["affine"]), np.dtype(answer["dtype"])
    require_usable(affine, 3, path)
    stored = np.broadcast_to(dtype.type(0), answer["shape"]) if grid_only else np.frombuffer(content, dtype).reshape(answer["shape"])
    segments = tuple(Segment(label, name, color and tuple(color)) for label, name, color in answer["segments"])
    spacing, notes = spacing_of(affine), tuple(answer["notes"])
    header = VolumeHeader(path, answer["format"], stored.shape[::-1], 1, dtype.name, spacing, affine, notes=notes, segments=segments)
    return Volume(stored.T, affine, spacing, path, header)


def write(target: Path, labels: NDArray[np.unsignedinteger[Any]], named: Sequence[Segment], like: Path, segments: Path | None) -> None:
    """Write a label map, (x, y, z) on the grid of the series `like`, as a segmentation of binary segments; raises as `read`."""
    # The segments get these names, and keep what describes their labels in the file `segments`.
    stored = np.ascontiguousarray(labels.T)
    known = {segment.label: segment.name for segment in named}
    names = [(segment.label, known.get(segment.label, segment.name)) for segment in segments_of(stored, ())]
    request = {"names": names, "segments": segments and str(segments), "shape": stored.shape, "dtype": stored.dtype.str}
    write_small_file(target, _run(like, {"task": "write", **request}, stored.tobytes())[1])


def _run(path: Path, request: Mapping[str, Any], voxels: bytes = b"") -> tuple[dict[str, Any], bytes]:
    """Return the answer of the process; its errors are raised here."""
    command = [sys.executable, "-P", "-c", _START, str(Path(__file__).parents[2])]
    line = json.dumps({"path": str(path), "limits": (SECONDS, MEMORY), **request}).encode() + b"\n"
    done = subprocess.run(command, input=b"".join((line, voxels)), capture_output=True, check=False)
    if done.returncode != 0:
        is_late = done.returncode == -24  # SIGXCPU
        reason = "takes far longer than that of files of its size should" if is_late else f"ended with status {done.returncode}"
        raise UnsupportedFormatError(f"{path}: damaged DICOM: its decoding {reason}; copy or export it again")
    first, _, content = done.stdout.partition(b"\n")
    answer: dict[str, Any] = json.loads(first)
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["message"])
    return answer, content


def serve() -> None:
    """Answer the request on the standard input."""
    request = json.loads(sys.stdin.buffer.readline())
    path = Path(request["path"])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # Decoders may print.
    warnings.simplefilter("ignore")
    content: Any = b""
    try:
        import highdicom.seg  # noqa: F401 - its memory is not part of the limit
        import pydicom

        pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
        request["addresses"] = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
        answer, content = (dicom_files.write if request["task"] == "write" else dicom_files.read)(path, request)
    except CrfRefineError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    except ImportError as error:
        message = f"DICOM needs a package that is not installed ({error}); pip install 'crfrefine[dicom]'"
        answer = {"error": "InputError", "message": f"{path}: {message}"}
    except MemoryError:
        message = "its decoding takes more memory than that of files of its size should; damaged?"
        answer = {"error": "CapacityError", "message": f"{path}: {message}"}
    except Exception as error:  # Damage shows as an exception of any kind.
        message = f"damaged DICOM, or a value that is needed is missing ({shorten(f'{type(error).__name__}: {error}', 300)})"
        answer = {"error": "UnsupportedFormatError", "message": f"{path}: {message}"}
    answers.write(json.dumps(answer).encode() + b"\n")
    answers.write(content)
    answers.flush()
    os._exit(0)
