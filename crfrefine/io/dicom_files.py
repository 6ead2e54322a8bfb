"""DICOM files through pydicom, which is imported only when it is needed.

What it raises becomes an error that names the file.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crfrefine.base.text import shorten
from crfrefine.errors import CapacityError, CrfRefineError, InputError, UnsupportedFormatError
from crfrefine.io.streams import LARGEST_RATIO, cannot_read, cut_off

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

INSTALL = "pip install 'crfrefine[dicom]'"
_SEGMENTATIONS = (b"1.2.840.10008.5.1.4.1.1.66.4", b"1.2.840.10008.5.1.4.1.1.66.7")
_ENHANCED = tuple(
    f"1.2.840.10008.5.1.4.1.1.{ending}".encode()
    for ending in ("2.1", "2.2", "4.1", "4.4", "128.1", "130")  # CT, MR and PET; the second of each was converted from single slices.
)
_DIRECTORY = b"1.2.840.10008.1.3.10"
_CLASS = re.compile(rb"(?:\x02\x00\x02\x00|\x08\x00\x16\x00|\x00\x08\x00\x16).{4}([0-9.]+)", re.DOTALL)
"""MediaStorageSOPClassUID (0002,0002) or SOPClassUID (0008,0016) with a value.

UIDs elsewhere are those of other files.
"""
_SMALL = 1 << 26
"""Bytes of pixels that a compressed file of any size may hold.

A frame of one value compresses to nearly nothing.
"""

# Filters of warnings belong to the process: two threads must not exchange them at the same time.
_filters = threading.Lock()


def is_dicom(start: bytes) -> bool:
    """Return whether a file with this beginning is DICOM."""
    return start[128:132] == b"DICM"


def is_segmentation(start: bytes) -> bool:
    """Return whether a file with this beginning is a DICOM segmentation."""
    return _class_of(start) in _SEGMENTATIONS


def has_frames(start: bytes) -> bool:
    """Return whether a file with this beginning is DICOM of several frames that is a volume by itself (enhanced CT, MR, PET)."""
    return _class_of(start) in _ENHANCED


def is_image(start: bytes) -> bool:
    """Return whether a file with this beginning is DICOM, but no segmentation and no list of files (DICOMDIR)."""
    return is_dicom(start) and _class_of(start) not in (*_SEGMENTATIONS, _DIRECTORY)


def _class_of(start: bytes) -> bytes:
    """Return the UID of the class of a DICOM file; b"" if it has none, or is no DICOM file."""
    found = _CLASS.search(start, 132) if is_dicom(start) else None
    return found[1] if found else b""


def require_pydicom(path: Path) -> Any:
    """Return the module pydicom; raise InputError if it is not installed."""
    try:
        import pydicom
    except ImportError as error:
        raise InputError(f"{path}: DICOM needs a package that is not installed ({error}); {INSTALL}") from None
    return pydicom


@contextmanager
def interpreting(path: Path) -> Iterator[None]:
    """Turn what pydicom and the reading of its values raise into an error about the file; its warnings are about values, and dropped."""
    try:
        with _filters, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CrfRefineError:
        raise
    except MemoryError:
        raise CapacityError(f"{path}: its content does not fit into memory") from None
    except FileNotFoundError as error:
        raise cannot_read(path, error) from None
    except Exception as error:
        # Values are converted when they are looked at: damage shows as an exception of any kind.
        raise UnsupportedFormatError(
            f"{path}: damaged DICOM file, or one without a value that is needed ({shorten(f'{type(error).__name__}: {error}', 200)})"
        ) from None


def read_dataset(path: Path, keywords: Sequence[str] | None, *, with_pixels: bool = False) -> Any:
    """Read elements of a file by their keywords, None: all; to be called, and its values to be read, inside of `interpreting`."""
    pydicom = require_pydicom(path)
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    tags = None if keywords is None else [*keywords, *(["PixelData"] if with_pixels else [])]
    return pydicom.dcmread(path, stop_before_pixels=not with_pixels, specific_tags=tags)


def iter_frames(path: Path, numbers: Sequence[int]) -> Iterator[NDArray[np.generic]]:
    """Yield uncompressed frames of a file, (rows, columns), one in memory at a time.

    Frames are numbered from 0. Not to be called inside `interpreting`.

    Raises:
        UnsupportedFormatError: damaged or cut off.
    """
    pydicom = require_pydicom(path)
    with interpreting(path):
        found = iter(pydicom.pixels.iter_pixels(path, indices=numbers, raw=True))
    for _ in numbers:
        with interpreting(path):  # Not around `yield`: it holds a lock.
            frame = next(found, None)
        if frame is None:
            raise UnsupportedFormatError(
                f"{path}: the file is cut off: it holds fewer frames than its header promises; copy or export it again"
            )
        yield frame


def require_decoder(syntax: str, path: Path) -> None:
    """Raise UnsupportedFormatError if nothing that is installed decodes a transfer syntax."""
    pydicom = require_pydicom(path)
    try:
        available = pydicom.pixels.get_decoder(syntax).is_available
    except RuntimeError:  # An unknown syntax.
        available = False
    if not available:
        raise UnsupportedFormatError(
            f"{path}: compressed as {shorten(pydicom.uid.UID(syntax).name, 80)}, which nothing installed can decode; "
            "pip install pylibjpeg pylibjpeg-libjpeg, or gdcmconv --raw IN OUT"
        )


def require_size(path: Path, syntax: str, num_bytes: int) -> None:
    """Raise UnsupportedFormatError if a file is too small for its pixels, decoded `num_bytes`."""
    size, uid = path.stat().st_size, require_pydicom(path).uid.UID(syntax)
    most = size * LARGEST_RATIO if uid.is_encapsulated or uid.is_deflated else size
    if num_bytes > (max(most, _SMALL) if uid.is_encapsulated else most):
        raise cut_off(path, f"{num_bytes} bytes of voxels", f"it holds {size}" + (" compressed ones" if most > size else ""))


def first_of(dataset: Any, sequence: str) -> Any:
    """Return the first item of a sequence; raise KeyError if there is none."""
    items = dataset.get(sequence)
    if not items:
        raise KeyError(f"no {sequence}")
    return items[0]
