"""Decode compressed DICOM frames: a program of its own, which `dicom_frames.FrameDecoder` starts.

Decoders allocate what a codestream asks for, and some crash on a damaged codestream or never
return from it. Each codestream is therefore compared with the header first, and the process has
limits of memory and of processor time. The program imports nothing of crfrefine, so that it starts
fast.

A request is a line of JSON on the standard input: path of the file, number of the frame from 0. The
answer on the standard output is `+` and the pixels, (rows, columns) in the byte order of this
machine; or `-` and a sentence, after which the process ends.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import warnings
from pathlib import Path
from typing import Any

SECONDS = 5.0
"""Processor time that a frame may take; each million of pixels adds a second.

Noise in JPEG 2000 takes 0.2 s per million.
"""

MEMORY = 1 << 28
"""Bytes that the process may take beyond those at its start.

32 bytes per pixel of a frame and 4 per byte of the file are added.
"""

_JPEG = "1.2.840.10008.1.2.4."
_JPEG_STARTS = {
    **{_JPEG + "50": (0xC0,), _JPEG + "51": (0xC0, 0xC1), _JPEG + "57": (0xC3,), _JPEG + "70": (0xC3,)},
    **{_JPEG + "80": (0xF7,), _JPEG + "81": (0xF7,)},  # JPEG-LS
}
"""Markers (SOFn) that may begin a frame in each transfer syntax.

Progressive JPEG, where each scan costs time, is in none of them.
"""

_BEFORE_START = {0xC4, 0xCC, 0xDB, 0xDD, 0xF8, 0xFE, *range(0xE0, 0xF0)}
"""Markers of segments that may come before SOFn: tables, restarts, application data, comments."""

_JPEG_2000 = tuple(_JPEG + ending for ending in ("90", "91", "201", "202", "203"))
_RLE = "1.2.840.10008.1.2.5"
_BOXES_START = b"\0\0\0\x0cjP  "


def checked_codestream(code: bytes, syntax: str, shape: tuple[int, int], bits: int) -> bytes:
    """Return the codestream of a frame, without a file format around it, if the header describes it.

    The frame must have one sample per pixel.

    Args:
        code: the stored frame.
        syntax: UID of the transfer syntax.
        shape: (rows, columns) of the header.
        bits: BitsAllocated of the header.

    Raises:
        ValueError: the codestream has another size, or is damaged.
    """
    try:
        if syntax == _RLE:
            _require_rle_segments(code, shape, bits)
            return code
        if syntax in _JPEG_STARTS:
            rows, columns, samples, precision = _jpeg_size(code, _JPEG_STARTS[syntax])
        elif syntax in _JPEG_2000:
            code = _without_boxes(code)
            rows, columns, samples, precision = _jpeg_2000_size(code)
        else:
            raise ValueError("the size of pixels in this compression cannot be checked; decompress the file with gdcmconv --raw IN OUT")
    except (struct.error, IndexError):
        raise ValueError("the compressed pixels are cut off before their size") from None
    if (rows, columns, samples) != (*shape, 1) or not 1 <= precision <= bits:
        raise ValueError(
            f"the compressed pixels are {columns} x {rows} with {samples} sample(s) of {precision} bits, "
            f"but the header says {shape[1]} x {shape[0]} with 1 sample of at most {bits} bits"
        )
    return code


def _jpeg_size(code: bytes, starts: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Return rows, columns, samples and bits of JPEG or JPEG-LS (SOFn, ISO 10918-1, B.2.2)."""
    if code[:2] != b"\xff\xd8":
        raise ValueError("the compressed pixels do not begin as JPEG does")
    place = 2
    while code[place] == 0xFF and code[place + 1] not in starts:
        marker = code[place + 1]
        if marker == 0xFF:  # A fill byte.
            place += 1
            continue
        (length,) = struct.unpack_from(">H", code, place + 2)
        if marker not in _BEFORE_START or length < 2:
            break
        place += 2 + length
    if code[place] != 0xFF or code[place + 1] not in starts:
        raise ValueError(f"the compressed pixels are damaged or of another kind: {code[place : place + 2].hex()} instead of a marker")
    precision, rows, columns, samples = struct.unpack_from(">BHHB", code, place + 4)
    return rows, columns, samples, precision


def _without_boxes(code: bytes) -> bytes:
    """Return the codestream of JPEG 2000 without the boxes of JP2, which decoders read differently."""
    if not code.startswith(_BOXES_START):
        return code
    place = 0
    while code[place + 4 : place + 8] != b"jp2c":
        (length,) = struct.unpack_from(">I", code, place)
        if length < 8:  # 0 is a box up to the end, 1 a box of 4 GiB: no codestream can follow.
            raise ValueError("the compressed pixels are damaged: a box of JPEG 2000 without a length")
        place += length
    return code[place + 8 :]


def _jpeg_2000_size(code: bytes) -> tuple[int, int, int, int]:
    """Return rows, columns, samples and bits of JPEG 2000 (SIZ, ISO 15444-1, A.5.1)."""
    if code[:4] != b"\xff\x4f\xff\x51":
        raise ValueError("the compressed pixels do not begin as JPEG 2000 does")
    right, bottom, left, top = struct.unpack_from(">4I", code, 8)
    samples, precision, between_columns, between_rows = struct.unpack_from(">HBBB", code, 40)
    if (between_columns, between_rows) != (1, 1):
        raise ValueError("the compressed pixels have a coarser grid than the header says")
    return bottom - top, right - left, samples, (precision & 0x7F) + 1


def _require_rle_segments(code: bytes, shape: tuple[int, int], bits: int) -> None:
    """Raise ValueError unless RLE has a segment per byte of a pixel, in order (DICOM PS3.5, G.5)."""
    count, *offsets = struct.unpack_from("<16I", code)
    ends = [*offsets[1 : bits // 8], len(code)]
    lengths = [end - start for start, end in zip(offsets, ends, strict=False)]
    most = 2 * shape[0] * shape[1] + 1024  # Two bytes hold a single one at worst.
    if count != bits // 8 or offsets[0] < 64 or min(lengths) < 0 or max(lengths) > most:
        raise ValueError("the compressed pixels are damaged: their segments are not those of RLE with this size")


class _File:
    """A file with compressed pixels, and its frames as they are stored."""

    def __init__(self, path: str) -> None:
        import pydicom
        from pydicom.encaps import generate_frames

        pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
        keywords = ["Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation", "SamplesPerPixel"]
        self.path = path
        # Not ExtendedOffsetTable: it may give one byte to many frames, and fragments say the same.
        self.dataset: Any = pydicom.dcmread(path, specific_tags=[*keywords, "PhotometricInterpretation", "NumberOfFrames", "PixelData"])
        count = int(self.dataset.get("NumberOfFrames") or 1)
        self.frames = list(generate_frames(self.dataset.PixelData, number_of_frames=count))
        if len(self.frames) != count:
            raise ValueError(f"frames: it holds {len(self.frames)}, its header says {count}; copy or export it again")
        self.dataset.NumberOfFrames = 1

    def frame(self, number: int) -> Any:
        """Return the pixels of a frame, (rows, columns), in the type that the header gives."""
        from pydicom.encaps import encapsulate
        from pydicom.pixels.utils import pixel_array

        found = self.dataset
        shape, bits = (int(found.Rows), int(found.Columns)), int(found.BitsAllocated)
        if int(found.SamplesPerPixel) != 1 or bits not in (8, 16, 32):
            raise ValueError(f"{found.SamplesPerPixel} samples per pixel with {bits} bits; expected 1 with 8, 16 or 32")
        _limit(shape[0] * shape[1], self.path)
        code = checked_codestream(self.frames[number], str(found.file_meta.TransferSyntaxUID), shape, bits)
        found.PixelData = encapsulate([code])
        return pixel_array(found, raw=True)


def _limit(num_pixels: int, path: str) -> None:
    """Limit memory, and processor time from now on; the signal also ends a decoder."""
    import resource

    signal.setitimer(signal.ITIMER_PROF, SECONDS + num_pixels / 1e6)
    most = _ADDRESSES + MEMORY + 32 * num_pixels + 4 * Path(path).stat().st_size
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _addresses() -> int:
    """Return the bytes of addresses that this process has."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _answer_requests() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # Decoders may print.
    warnings.simplefilter("ignore")
    file = None
    for line in sys.stdin:
        path, number = json.loads(line)
        try:
            if file is None or file.path != path:
                _limit(0, path)
                file = _File(path)
            content = file.frame(number).tobytes()
        except MemoryError:
            answers.write(b"-the compressed pixels need more memory than a frame of their size should")
            return
        except Exception as error:  # Damage shows as an exception of any kind.
            answers.write(f"-{error}".encode(errors="replace"))
            return
        answers.write(b"+" + content)
        answers.flush()


if __name__ == "__main__":
    import pydicom.pixels  # noqa: F401 - what it takes is no part of the limit

    _ADDRESSES = _addresses()
    _answer_requests()
