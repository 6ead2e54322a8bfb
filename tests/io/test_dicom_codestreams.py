"""Compressed pixels of DICOM: a codestream must have the size that the header says."""

import struct
from io import BytesIO

import numpy as np
import pytest
from dicom_helpers import enhanced, save, slices
from io_helpers import OBLIQUE, affine_of, numbers
from PIL import Image
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSLossless, RLELossless

from crfrefine import io
from crfrefine.errors import UnsupportedFormatError

SHAPE = (23, 19, 4)
AFFINE = affine_of((0.7, 1.1, 2.5), (10.0, -20.0, 30.0), OBLIQUE @ np.diag([1.0, -1.0, 1.0]))
BOX = b"\0\0\0\x0cjP  \r\n\x87\n"


def stored(dtype):
    return numbers(SHAPE, dtype=np.int64).astype(dtype)


def series(kind, dtype=np.uint16):
    """Slices compressed as RLE, JPEG-LS, JPEG 2000 (with boxes around it: jp2), or JPEG."""
    found = list(slices(stored(dtype), AFFINE))
    for one in found:
        if kind in ("rle", "jpeg-ls"):
            one.compress(RLELossless if kind == "rle" else JPEGLSLossless, generate_instance_uid=False)
            continue
        picture, buffer = Image.fromarray(np.frombuffer(one.PixelData, dtype).reshape(SHAPE[1::-1])), BytesIO()
        if kind == "jpeg":
            picture.save(buffer, "JPEG", quality=100)
        else:
            picture.save(buffer, "JPEG2000", no_jp2=kind == "j2k")
        put(one, buffer.getvalue(), JPEGBaseline8Bit if kind == "jpeg" else JPEG2000Lossless)
    return found


def put(one, code, syntax=None):
    one.file_meta.TransferSyntaxUID = syntax or one.file_meta.TransferSyntaxUID
    one.PixelData = encapsulate([code])
    one["PixelData"].VR, one["PixelData"].is_undefined_length = "OB", True


def code_of(one):
    return next(generate_frames(one.PixelData, number_of_frames=1))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("rle", np.int16), ("jpeg-ls", np.uint16), ("jpeg-ls", np.uint8), ("j2k", np.uint16), ("jp2", np.uint8), ("jp2", np.uint16)],
)
def test_compressed_slices_and_frames_are_read(kind, dtype, tmp_path):
    np.testing.assert_array_equal(io.read_volume(save(tmp_path / "case", series(kind, dtype))).data, stored(dtype))
    if kind in ("rle", "jpeg-ls"):
        frames = enhanced(slices(stored(dtype), AFFINE))
        frames.compress(RLELossless if kind == "rle" else JPEGLSLossless, generate_instance_uid=False)
        np.testing.assert_array_equal(io.read_volume(save(tmp_path / "frames", [frames])).data, stored(dtype))


def test_jpeg_with_losses_is_read(tmp_path):
    read = io.read_volume(save(tmp_path / "case", series("jpeg", np.uint8))).data
    # Numbers that wrap at 256 are edges, where JPEG of the best quality is off by a few values.
    assert np.abs(read - stored(np.uint8)).max() < 10
    found = series("jpeg", np.uint8)
    for one in found:
        put(one, b"\xff\xd8\xff\xff" + code_of(one)[3:], JPEGExtended12Bit)  # A fill byte before a marker.
    np.testing.assert_array_equal(io.read_volume(save(tmp_path / "extended", found)).data, read)


@pytest.mark.parametrize("kind", ["rle", "jpeg-ls", "j2k", "jp2", "jpeg"])
def test_pixels_of_another_size_than_the_header_says(kind, tmp_path):
    """With equal numbers of voxels, too: decoders would not notice."""
    found = series(kind, np.uint8)
    for one in found:
        one.Rows, one.Columns = (38, 23) if kind == "rle" else SHAPE[:2]
    with pytest.raises(UnsupportedFormatError, match=r"IM000\d\.dcm: damaged DICOM file, frame 1: .*(header says 19 x 23|RLE)"):
        io.read_volume(save(tmp_path / "case", found))


def with_size(code, marker, layout, *values):
    """A codestream with another size behind its marker."""
    place = code.index(marker) + len(marker)
    return code[:place] + struct.pack(layout, *values) + code[place + struct.calcsize(layout) :]


HOSTILE = [
    ("jpeg-ls", lambda code: with_size(code, b"\xff\xf7\0\x0b\x10", ">HH", 40000, 40000), r"are 40000 x 40000 with .* says 23 x 19"),
    ("j2k", lambda code: with_size(code, b"\xff\x51\0\x29\0\0", ">II", 40000, 40000), r"are 40000 x 40000 with .* says 23 x 19"),
    ("j2k", lambda code: code[:43] + b"\2\1" + code[45:], "coarser grid"),
    ("jp2", lambda code: BOX + b"\0\0\0\0abcd" + code[12:], "a box of JPEG 2000 without a length"),
    ("jp2", lambda code: BOX + b"\0\0\0\1abcd" + code[12:], "a box of JPEG 2000 without a length"),
    ("jp2", lambda code: BOX + b"\0\0\0\x10abcd", "cut off before their size"),
    ("jpeg-ls", lambda code: code[:3], "cut off before their size"),
    ("jpeg-ls", lambda code: b"\xff\xd8\xff\xfe\0\0" + code[2:], "damaged or of another kind: fffe"),
    ("jpeg-ls", lambda code: code.replace(b"\xff\xf7", b"\xff\xc2", 1), "damaged or of another kind: ffc2"),
    ("rle", lambda code: code[:4] + struct.pack("<2I", 100, 64) + code[12:], "segments are not those of RLE"),
    ("rle", lambda code: code + bytes(4000), "segments are not those of RLE"),
    ("rle", lambda code: b"\3" + code[1:], "segments are not those of RLE"),
]


@pytest.mark.parametrize(("kind", "change", "expected"), HOSTILE, ids=range(len(HOSTILE)))
def test_codestreams_that_decoders_would_hang_on_or_allocate_by(kind, change, expected, tmp_path):
    found = series(kind)
    put(found[0], change(code_of(found[0])))
    with pytest.raises(UnsupportedFormatError, match=rf"IM000\d\.dcm: damaged DICOM file, frame 1: .*{expected}"):
        io.read_volume(save(tmp_path / "case", found))


def test_frames_share_no_bytes(tmp_path):
    """A table of offsets may give many frames the same bytes; each frame must have a fragment."""
    frames = enhanced(slices(stored(np.uint16), AFFINE))
    frames.compress(RLELossless, generate_instance_uid=False)
    code = next(generate_frames(frames.PixelData, number_of_frames=4))
    put(frames, code)
    frames.ExtendedOffsetTable, frames.ExtendedOffsetTableLengths = bytes(32), struct.pack("<4Q", *[len(code)] * 4)
    with pytest.raises(UnsupportedFormatError, match=r"IM0000\.dcm: damaged DICOM file, frame 1: frames: it holds 1, its header says 4"):
        io.read_volume(save(tmp_path / "case", [frames]))


def test_a_small_file_cannot_promise_a_large_frame(tmp_path):
    found = series("j2k")
    for one in found:
        one.Rows = one.Columns = 40000
        put(one, with_size(code_of(one), b"\xff\x51\0\x29\0\0", ">II", 40000, 40000))
    with pytest.raises(UnsupportedFormatError, match=r"its header promises 3200000000 bytes of voxels, it holds \d+ compressed ones"):
        io.read_header(save(tmp_path / "case", found))


def endless(size, layers, precinct):
    """A codestream of JPEG 2000 whose packets are gone through in 31 orders, and say nothing."""
    code = b"\xff\x4f\xff\x51" + struct.pack(">HHIIIIIIIIHBBB", 41, 0, size, size, 0, 0, size, size, 0, 0, 1, 15, 1, 1)
    code += b"\xff\x52" + struct.pack(">HBBHBBBBBB", 14, 1, 4, layers, 0, 1, 4, 4, 0, 1) + bytes([precinct] * 2)
    code += b"\xff\x5f" + struct.pack(">H", 2 + 31 * 7) + struct.pack(">BBHBBB", 0, 0, layers, 2, 1, 4) * 31
    code += b"\xff\x5c" + struct.pack(">HB", 7, 64) + bytes([128] * 4)
    return code + struct.pack(">HHHIBB", 0xFF90, 10, 0, 8014, 0, 1) + b"\xff\x93" + bytes(8000)


@pytest.mark.long  # It takes what a frame may take: five seconds of processor time.
def test_a_frame_that_takes_too_long_is_given_up(tmp_path):
    found = list(slices(np.zeros((512, 512, 2), np.uint16), AFFINE))
    for one in found:
        put(one, endless(512, 65535, 0x55), JPEG2000Lossless)
    with pytest.raises(UnsupportedFormatError, match="frame 1: its decoding takes far longer than that of its size should"):
        io.read_volume(save(tmp_path / "case", found))
