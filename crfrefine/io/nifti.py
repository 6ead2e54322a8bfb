"""NIfTI-1 and NIfTI-2, and the headers of pairs and of Analyze: nibabel has the header, voxels are decoded here."""

from __future__ import annotations

import html
import logging
import math
import re
import struct
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from crfrefine.base.geometry import is_sheared, spacing_of
from crfrefine.base.limits import MAX_LABEL
from crfrefine.base.text import shorten
from crfrefine.errors import InputError, UnsupportedFormatError
from crfrefine.io.atomic import write_bytes
from crfrefine.io.streams import GZIP_MAGIC, GZIP_SUFFIXES, START_BYTES, inflated, open_bytes
from crfrefine.io.volume import MAX_OF_A_NAME, Segment, Volume, VolumeHeader, VoxelSource, VoxelsToWrite, volume_header

MAX_HEADER = 540  # bytes of the longer header, that of NIfTI-2
# Codes of the header's xyzt_units: meters, millimeters, micrometers; unknown ones are millimeters in practice.
MM_PER_UNIT = {1: 1000.0, 2: 1.0, 3: 0.001}
_ANALYZE_NOTE = "Analyze 7.5 does not say which side is left: its axes are taken as nibabel does"

_quiet = logging.getLogger("crfrefine.io.nifti")
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False


def parse(block: bytes, path: Path, voxels: Path, encoding: str, *, is_pair: bool = False) -> VolumeHeader:
    """Return the header of a file by its first MAX_HEADER bytes; that of a pair may be Analyze's."""
    # The file with the voxels, "raw" or "gzip", is checked to be long enough.
    import nibabel

    lengths = {int.from_bytes(block[:4], "little"), int.from_bytes(block[:4], "big")}
    if not lengths & {348, 540}:
        raise UnsupportedFormatError(f"{path}: not a NIfTI file, although its name says so: it begins with {block[:12]!r}")
    length = 348 if 348 in lengths else 540
    single, pair = (nibabel.Nifti1Image, nibabel.Nifti1Pair) if length == 348 else (nibabel.Nifti2Image, nibabel.Nifti2Pair)
    if len(block) < length:
        raise UnsupportedFormatError(f"{path}: the file is cut off within its header ({len(block)} of {length} bytes)")
    kind: Any = (pair if is_pair else single).header_class
    if is_pair and length == 348 and block[344:347] != kind.pair_magic:
        kind = nibabel.Spm2AnalyzeImage.header_class
    try:
        header = kind(block[:length], check=False)
        if not is_pair and header["magic"].item() != kind.single_magic:
            raise UnsupportedFormatError(f"{path}: not a single-file NIfTI (Analyze or a .hdr/.img pair?); convert it to .nii.gz first")
        header.check_fix(logger=_quiet, error_level=40)
        header.get_data_dtype()
        header.get_slope_inter()
    except (nibabel.spatialimages.HeaderDataError, OverflowError) as error:
        raise UnsupportedFormatError(f"{path}: damaged NIfTI header: {error}") from None
    if np.isinf(header["scl_slope"]):  # nibabel would leave the voxels unscaled, as it rightly does for 0 and NaN.
        raise UnsupportedFormatError(f"{path}: damaged NIfTI header: its scl_slope is infinite; expected a number, or 0 for no scaling")
    if not np.isfinite(header["vox_offset"]) or header["vox_offset"] < 0:
        raise UnsupportedFormatError(f"{path}: damaged NIfTI header: the voxels begin at byte {header['vox_offset']}")
    is_nifti = "magic" in header
    is_single = bool(getattr(header, "is_single", False))
    # (x, y), (x, y, z), (x, y, z, channel), or ITK's (x, y, z, 1, channel).
    shape = tuple(int(size) for size in header.get_data_shape())
    if not shape or min(shape) < 1:
        raise UnsupportedFormatError(f"{path}: the header has an impossible shape, {shape}")
    time_steps, channels = (*shape, 1, 1, 1, 1)[3:5]
    if (time_steps > 1 and channels > 1) or max(shape[5:], default=1) > 1:
        raise UnsupportedFormatError(
            f"{path}: its shape {shape} cannot be split into grid and channels\n"
            "  Expected (x, y, z), (x, y, z, channel) or (x, y, z, 1, channel)."
        )
    grid_shape, num_channels = shape[:3] if len(shape) > 1 else (*shape, 1), time_steps * channels
    dtype = header.get_data_dtype()
    if dtype.fields is not None:
        raise UnsupportedFormatError(f"{path}: a color (RGB) image; expected one number per voxel, split it into channels first")
    if dtype.kind == "c":
        raise UnsupportedFormatError(f"{path}: complex voxels; expected real ones, export the magnitude")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise UnsupportedFormatError(f"{path}: voxels of type {dtype.name} are not supported; convert them to float32 or integers")
    notes: tuple[str, ...] = () if is_nifti else (_ANALYZE_NOTE,)
    try:
        affine = np.array(header.get_best_affine(), np.float64)
        if is_nifti:
            affine[:3] *= MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
            qform, sform = header.get_qform(coded=True)[0], header.get_sform(coded=True)[0]
            if qform is None and sform is None:
                notes = ("no orientation in the header (sform and qform codes are 0)",)
            elif qform is not None and sform is not None and not np.allclose(qform, sform, atol=1e-3 * min(spacing_of(sform))):
                notes = ("sform and qform differ; the sform is used, and both are kept in output files",)
        else:
            affine += 0.0  # Adding zero turns -0 into 0.
    except ValueError as error:
        raise InputError(f"{path}: the geometry in the header is not usable: {error}; repair the header") from None
    slope, intercept = header.get_slope_inter()
    scale = (1.0 if slope is None else float(slope), float(intercept or 0.0))
    offset = int(header["vox_offset"]) or (int(header.single_vox_offset) if is_single else 0)
    sizes = (*grid_shape, num_channels)
    source = VoxelSource(path, voxels, encoding, dtype, sizes, math.prod(grid_shape), 0, offset, *scale)
    version = "Analyze 7.5" if not is_nifti else "NIfTI-2" if header["sizeof_hdr"] == 540 else "NIfTI-1"
    file_format = version + (" pair" if is_nifti and not is_single else "") + (", gzip" if encoding == "gzip" else "")
    return volume_header(source, file_format, grid_shape, num_channels, affine, template=header, notes=notes)


def header_to_write(voxels: VoxelsToWrite, like: Volume, *, is_pair: bool, extension: bytes = b"") -> bytes:
    """Return the little-endian header of voxels with the geometry of another volume, bit for bit that of a NIfTI file."""
    # The extension, with its size and code, follows the header; extensions of the other file are
    # not copied.
    import nibabel

    shape = voxels.shape[::-1]
    if voxels.num_channels is not None:
        shape = shape[:-1] + (1,) * (3 - len(like.spacing)) + shape[-1:]
    template: Any = like.header.template if like.header is not None else None
    nifti1: Any = nibabel.Nifti1Header
    if isinstance(template, nifti1):
        header = template.as_byteswapped("<")
    else:
        header = nifti1()
        if not is_sheared(like.affine):  # The quaternion of a qform cannot hold a shear; nibabel would drop it silently.
            header.set_qform(like.affine, code=1)
        header.set_sform(like.affine, code=1)
        header.set_xyzt_units("mm")
    header.set_data_shape(shape)
    header.set_data_dtype(voxels.dtype)
    header["scl_slope"], header["intent_name"] = 1.0, b""
    for name in ("scl_inter", "cal_min", "cal_max", "intent_code", "intent_p1", "intent_p2", "intent_p3"):
        header[name] = 0
    header["descrip"], header["aux_file"] = b"crfrefine", b""
    header["magic"] = header.pair_magic if is_pair else header.single_magic
    header["vox_offset"] = 0 if is_pair else header.single_vox_offset + len(extension)
    block: bytes = header.binaryblock
    return block + bytes((bool(extension), 0, 0, 0)) + extension


def recognizes(start: bytes) -> bool:
    """Return whether it is a NIfTI-1 or NIfTI-2 header of a single file, in either byte order, compressed or not."""
    block = inflated(start) or start
    return block[344:348] == b"n+1\0" or block[4:8] == b"n+2\0"


def read_header(path: Path) -> VolumeHeader:
    """Read only the header; only the beginning of a compressed file is inflated."""
    with open_bytes(path, "raw") as reader:
        start = reader.read(START_BYTES)
    is_gzip = start.startswith(GZIP_MAGIC) or (path.name.lower().endswith(GZIP_SUFFIXES) and not recognizes(start))
    encoding = "gzip" if is_gzip else "raw"
    with open_bytes(path, encoding) as reader:
        block = reader.read(MAX_HEADER)
        header = parse(block, path, path, encoding)
        assert header.source is not None
        template, segments, notes = header.template, tuple[Segment, ...](), header.notes
        size, end = int(template["sizeof_hdr"]), header.source.offset
        block += reader.read(max(0, min(end, size + MAX_EXTENSION_BYTES) - len(block)))
        if header.num_channels == 1 and block[size : size + 1] > b"\0":
            try:
                segments = _labels_in(block[size:end], template.endianness)
            except ValueError as error:
                notes += (f"the table of label names in its header cannot be read: {shorten(error, 80)}",)
    details = (("sform, qform", f"codes {int(template['sform_code'])}, {int(template['qform_code'])}"),)
    return replace(header, segments=segments, notes=notes, details=details)


def write(voxels: VoxelsToWrite, like: Volume, threads: int) -> None:
    """Write voxels with the geometry of another volume; channels get the fourth dimension, a label map a table of its segments."""
    extension = b""
    if voxels.segments:
        entries = []
        for segment in voxels.segments:
            red, green, blue = map(float, segment.shown_color)
            attributes = f'Key="{segment.label}" Red="{red}" Green="{green}" Blue="{blue}" Alpha="1"'
            entries.append(f"<Label {attributes}>{html.escape(segment.name, quote=False)}</Label>")
        text = "\n".join([_TABLE_HEAD, *entries, _TABLE_TAIL]).encode()
        size = -(-(8 + len(text)) // 16) * 16
        extension = struct.pack("<ii", size, _ANY_CODE) + text.ljust(size - 8)
    header = header_to_write(voxels, like, is_pair=False, extension=extension)
    write_bytes(voxels.path, chain([header], voxels.blocks()), threads)


# Names and colors of labels in the extension of a NIfTI header: the XML table of Caret, which TotalSegmentator writes, too.

MAX_EXTENSION_BYTES = 1 << 22  # of a file, that are looked at
_MAX_TABLE_BYTES = 1 << 20  # A label takes about 100.
# Code of the extension, as TotalSegmentator writes it; nibabel's `get_content` refuses Caret's, 30.
_ANY_CODE = 0
_TABLE_HEAD = '<?xml version="1.0" encoding="UTF-8"?> <CaretExtension><VolumeInformation Index="0"><LabelTable>'
_TABLE_TAIL = "</LabelTable><VolumeType>Label</VolumeType></VolumeInformation></CaretExtension>"


def _labels_in(extensions: bytes, byte_order: str) -> tuple[Segment, ...]:
    """Return the labels of the first table among extensions, none without; raise ValueError if it is bad."""
    place = 4
    while place + 8 <= len(extensions):
        size = int.from_bytes(extensions[place : place + 4], "little" if byte_order == "<" else "big")
        content = extensions[place + 8 : place + size]
        if size < 8:
            break
        # In UTF-16 and UTF-32, zeros are between the letters.
        if b"<CaretExtension" in content.replace(b"\0", b""):
            return _parse_table(content.strip(b"\0 \r\n\t"))
        place += size
    return ()


def _parse_table(content: bytes) -> tuple[Segment, ...]:
    """Parse a table. Document types and entities are refused: old versions of expat crash on some."""
    from xml.etree import ElementTree

    if len(content) > _MAX_TABLE_BYTES:
        raise ValueError(f"it is longer than {_MAX_TABLE_BYTES} bytes")
    table = content.decode()
    # A zero among the letters would let expat read the same bytes as UTF-16.
    if "\0" in table or re.search(r"<!(?!\[CDATA\[|--)", table):
        raise ValueError("it is not plain XML in UTF-8, or has a document type")
    try:
        root = ElementTree.fromstring(table)
    except ElementTree.ParseError as error:
        raise ValueError(f"damaged XML: {error}") from None
    segments: dict[int, Segment] = {}
    for element in root.iter("Label"):
        key, name = element.get("Key", "").strip(), shorten((element.text or "").strip(), MAX_OF_A_NAME)
        if key.isdecimal() and 1 <= int(key[:9]) <= MAX_LABEL and name:  # Names change no result: the others are used.
            red, green, blue = (float(element.get(part, -1)) for part in ("Red", "Green", "Blue"))
            color = (red, green, blue) if all(0 <= part <= 1 for part in (red, green, blue)) else None
            segments.setdefault(int(key[:9]), Segment(int(key[:9]), name, color))
    return tuple(segments[label] for label in sorted(segments))
