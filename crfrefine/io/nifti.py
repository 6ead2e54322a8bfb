"""NIfTI-1 and NIfTI-2, single files or pairs, and Analyze 7.5, which is only read: nibabel has the header, voxels are decoded here."""

from __future__ import annotations

import html
import logging
import re
import struct
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.geometry import (
    SPACING_RANGE,
    describe_affine,
    farthest_distance,
    is_sheared,
    same_grid,
)
from crfrefine.base.limits import MAX_LABEL
from crfrefine.base.text import shorten
from crfrefine.errors import InputError, UnsupportedFormatError
from crfrefine.io.atomic import atomic_files
from crfrefine.io.streams import (
    GZIP_MAGIC,
    GZIP_SUFFIXES,
    START_BYTES,
    VoxelSource,
    inflated,
    open_bytes,
    write_gzip,
)
from crfrefine.io.volume import (
    MAX_OF_A_NAME,
    Segment,
    Volume,
    VolumeHeader,
    VoxelsToWrite,
    volume_header,
)

_MAX_HEADER = 540  # bytes of the longer header, that of NIfTI-2
# Codes of the header's xyzt_units: meters, millimeters, micrometers; unknown ones are millimeters
# in practice.
MM_PER_UNIT = {1: 1000.0, 2: 1.0, 3: 0.001}
_ANALYZE_NOTE = "Analyze 7.5 does not say which side is left: its axes are taken as nibabel does"

_ORDERS: tuple[Literal["little", "big"], ...] = ("little", "big")

# nibabel tells a logger what it repairs in a header; this one prints nothing.
_quiet = logging.Logger("crfrefine.io.nifti", logging.CRITICAL + 1)


def recognizes(start: bytes) -> bool:
    """Return whether it is a header of NIfTI or Analyze, in either byte order, compressed or not."""
    block = inflated(start) or start
    # Analyze has no magic: the length of its header, and a sane number of dimensions.
    length = block[:4]
    num_dims = block[40:42]
    is_pair = any(
        length == (348).to_bytes(4, order) and 1 <= int.from_bytes(num_dims, order) <= 7
        for order in _ORDERS
    )
    return (
        block[344:348] == b"n+1\0"
        or block[4:8] == b"n+2\0"
        or block[4:7] == b"ni2"
        or (is_pair and block[344:347] != b"n+1")
    )


def read_header(path: Path) -> VolumeHeader:
    """Read only the header.

    The voxels of a pair have its name, with an ending in upper case where the header's is.
    """
    with open_bytes(path, "raw") as reader:
        start = reader.read(START_BYTES)
    is_gzip = start.startswith(GZIP_MAGIC) or (
        path.name.lower().endswith(GZIP_SUFFIXES) and not recognizes(start)
    )
    encoding = "gzip" if is_gzip else "raw"
    voxels = path
    with open_bytes(path, encoding) as reader:
        block = reader.read(_MAX_HEADER)
        is_single = block[344:348] == b"n+1\0" or block[4:8] == b"n+2\0"
        is_pair = not is_single and not path.name.lower().endswith((".nii", ".nii.gz"))
        if is_pair:
            names = [
                path.with_name(path.name[:-4] + ending)
                for ending in (".img", ".IMG", ".img.gz", ".IMG.GZ")
            ]
            voxels = next((name for name in names if name.exists()), names[0])
            encoding = "gzip" if voxels.name.lower().endswith(".gz") else "raw"
        header = _parse(block, path, voxels, encoding, is_pair=is_pair)
        header = replace(header, details=_describe_forms(header))
        if is_pair:
            return header
        assert header.source is not None
        size = int(header.template["sizeof_hdr"])
        end = header.source.offset
        block += reader.read(max(0, min(end, size + _MAX_EXTENSION_BYTES) - len(block)))
    if header.num_channels == 1 and block[size : size + 1] > b"\0":
        segments = _labels_in(block[size:end])
    else:
        segments = ()
    return replace(header, segments=segments)


def _describe_forms(header: VolumeHeader) -> tuple[tuple[str, str], ...]:
    """Return the codes of sform and qform, and both in full where they differ."""
    if "sform_code" not in header.template:  # Analyze
        return ()
    codes = f"codes {int(header.template['sform_code'])}, {int(header.template['qform_code'])}"
    details = [("sform, qform", codes)]
    if header.affine is not None and header.qform is not None:
        distance = farthest_distance(header.grid_shape, header.affine, header.qform)
        details += [
            ("sform", f"{describe_affine(header.affine)} (used)"),
            ("qform", f"{describe_affine(header.qform)} (up to {distance:.2f} mm away)"),
        ]
    return tuple(details)


def _parse(block: bytes, path: Path, voxels: Path, encoding: str, *, is_pair: bool) -> VolumeHeader:
    """Return the header of a file by its first _MAX_HEADER bytes.

    That of a pair may be Analyze's.
    """
    import nibabel

    lengths = {int.from_bytes(block[:4], order) for order in _ORDERS}
    length = 348 if 348 in lengths else 540
    if length not in lengths or len(block) < length:
        begins = f"it begins with {block[:12]!r}, and its header has {len(block)} bytes"
        raise UnsupportedFormatError(
            f"{path}: not a NIfTI file, although its name says so, or cut off: {begins}"
        )
    single, pair = (
        (nibabel.Nifti1Image, nibabel.Nifti1Pair)
        if length == 348
        else (nibabel.Nifti2Image, nibabel.Nifti2Pair)
    )
    kind: Any = (pair if is_pair else single).header_class
    if is_pair and length == 348 and block[344:347] != kind.pair_magic:
        kind = nibabel.Spm2AnalyzeImage.header_class
    try:
        header = kind(block[:length], check=False)
        if not is_pair and header["magic"].item() != kind.single_magic:
            raise UnsupportedFormatError(
                f"{path}: not a single-file NIfTI (Analyze or a .hdr/.img pair?); convert it to .nii.gz first"
            )
        header.check_fix(logger=_quiet, error_level=40)
        header.get_data_dtype()
        header.get_slope_inter()
    except (nibabel.spatialimages.HeaderDataError, OverflowError) as error:
        raise UnsupportedFormatError(f"{path}: damaged NIfTI header: {error}") from None
    # nibabel would leave the voxels unscaled, as it rightly does for a slope of 0 and NaN.
    if (
        np.isinf(header["scl_slope"])
        or not np.isfinite(header["vox_offset"])
        or header["vox_offset"] < 0
    ):
        found = f"scl_slope {header['scl_slope']}, vox_offset {header['vox_offset']}"
        raise UnsupportedFormatError(
            f"{path}: damaged NIfTI header: {found}; expected a finite slope, and an offset of 0 or more bytes"
        )
    is_nifti = "magic" in header
    # (x, y), (x, y, z), (x, y, z, channel), or ITK's (x, y, z, 1, channel).
    shape = tuple(int(size) for size in header.get_data_shape())
    time_steps, channels = (*shape, 1, 1, 1, 1)[3:5]
    if (
        not shape
        or min(shape) < 1
        or (time_steps > 1 and channels > 1)
        or max(shape[5:], default=1) > 1
    ):
        raise UnsupportedFormatError(
            f"{path}: its shape {shape} cannot be split into grid and channels\n"
            "  Expected (x, y, z), (x, y, z, channel) or (x, y, z, 1, channel)."
        )
    grid_shape = shape[:3] if len(shape) > 1 else (*shape, 1)
    num_channels = time_steps * channels
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise UnsupportedFormatError(
            f"{path}: voxels of type {shorten(dtype)} are not supported: expected integers or floats of at most 64 bits\n"
            "  Split colors into channels, export the magnitude of complex numbers, or convert the voxels to float32."
        )
    notes: tuple[str, ...] = () if is_nifti else (_ANALYZE_NOTE,)
    try:
        affine = np.array(header.get_best_affine(), np.float64)
        qform = None
        if is_nifti:
            affine[:3] *= MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
            qform = _other_qform(header, grid_shape, affine)
            if not int(header["sform_code"]) and not int(header["qform_code"]):
                notes = ("no orientation in the header (sform and qform codes are 0)",)
            elif qform is not None:
                distance = farthest_distance(grid_shape, affine, qform)
                notes = (
                    f"sform and qform differ by up to {distance:.2f} mm; the sform is used, and "
                    "both are kept in output files",
                )
        else:
            affine += 0.0  # Adding zero turns -0 into 0.
    except ValueError as error:
        raise InputError(
            f"{path}: the geometry in the header is not usable: {error}; repair the header"
        ) from None
    slope, intercept = header.get_slope_inter()  # None, and not 0, means that there is no slope.
    scaling = float(slope or 1.0), float(intercept or 0.0)
    offset = int(header["vox_offset"]) or (0 if is_pair else int(header.single_vox_offset))
    source = VoxelSource(voxels, encoding, dtype, None, 0, offset, *scaling)
    version = "Analyze 7.5" if not is_nifti else "NIfTI-2" if length == 540 else "NIfTI-1"
    file_format = (
        version
        + (" pair" if is_nifti and is_pair else "")
        + (", gzip" if encoding == "gzip" else "")
    )
    return volume_header(
        path,
        source,
        file_format,
        grid_shape,
        num_channels,
        affine,
        qform=qform,
        template=header,
        notes=notes,
    )


def _other_qform(
    header: Any, grid_shape: tuple[int, ...], affine: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """Return the qform in mm if it puts voxels elsewhere than the sform, which is the affine."""
    qform = header.get_qform(coded=True)[0]
    if qform is None or not int(header["sform_code"]):
        return None
    qform = np.array(qform, np.float64)
    qform[:3] *= MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
    is_sane = bool((np.abs(qform) < SPACING_RANGE[1]).all())  # Also False for NaN.
    if not is_sane or same_grid(grid_shape, affine, grid_shape, qform):
        return None
    return qform


_MAX_AXIS = 32767  # voxels along an axis of NIfTI-1, and channels


def _require_short_axes(voxels: VoxelsToWrite, header: Any) -> None:
    """Raise UnsupportedFormatError if NIfTI-1, unlike NIfTI-2, cannot hold the longest axis."""
    longest = max(voxels.shape)
    if longest > _MAX_AXIS and header.sizeof_hdr == 348:
        raise UnsupportedFormatError(
            f"{voxels.path}: NIfTI-1 holds at most {_MAX_AXIS} voxels along an axis, found "
            f"{longest}; write MetaImage (.mha) or NRRD (.nrrd) instead"
        )


def write(voxels: VoxelsToWrite, like: Volume, threads: int) -> None:
    """Write voxels with the geometry of another volume, bit for bit that of a NIfTI file.

    A pair is not compressed.
    """
    # Channels get the fourth dimension, a label map a table of its segments, in the extension of
    # the header; extensions of the other file are not copied.
    import nibabel

    extension = b""
    if voxels.segments and not voxels.voxel_files:
        entries = []
        for segment in voxels.segments:
            red, green, blue = map(float, segment.shown_color)
            attributes = (
                f'Key="{segment.label}" Red="{red}" Green="{green}" Blue="{blue}" Alpha="1"'
            )
            entries.append(f"<Label {attributes}>{html.escape(segment.name, quote=False)}</Label>")
        text = "\n".join([_TABLE_HEAD, *entries, _TABLE_TAIL]).encode()
        size = -(-(8 + len(text)) // 16) * 16
        extension = struct.pack("<ii", size, _ANY_CODE) + text.ljust(size - 8)
    template: Any = like.header.template if like.header is not None else None
    nifti1: Any = nibabel.Nifti1Header
    if isinstance(template, nifti1):
        header = template.as_byteswapped("<")
    else:
        header = nifti1()
        if not is_sheared(
            like.affine
        ):  # The quaternion of a qform cannot hold a shear; nibabel would drop it silently.
            header.set_qform(like.affine, code=1)
        header.set_sform(like.affine, code=1)
        header.set_xyzt_units("mm")
    grid_shape = voxels.grid_shape[::-1]
    _require_short_axes(voxels, header)
    header.set_data_shape(
        grid_shape if voxels.num_channels is None else (*(*grid_shape, 1)[:3], voxels.num_channels)
    )
    header.set_data_dtype(voxels.dtype)
    header["scl_slope"] = 1.0
    header["intent_name"] = b""
    for name in (
        "scl_inter",
        "cal_min",
        "cal_max",
        "intent_code",
        "intent_p1",
        "intent_p2",
        "intent_p3",
    ):
        header[name] = 0
    header["descrip"] = b"crfrefine"
    header["aux_file"] = b""
    header["magic"] = header.pair_magic if voxels.voxel_files else header.single_magic
    header["vox_offset"] = 0 if voxels.voxel_files else header.single_vox_offset + len(extension)
    block = header.binaryblock + bytes((bool(extension), 0, 0, 0)) + extension
    with atomic_files(*voxels.voxel_files, voxels.path) as files:
        if voxels.path.name.lower().endswith(GZIP_SUFFIXES):
            write_gzip(files[0], chain([block], voxels.blocks()), threads)
        else:
            files[-1].write(block)
            files[0].writelines(voxels.blocks())


# Names and colors of labels in the extension of a NIfTI header: the XML table of Caret, which
# TotalSegmentator writes, too.

_MAX_EXTENSION_BYTES = 1 << 20  # of a file, that are looked at; a label takes about 100
# Code of the extension, as TotalSegmentator writes it; nibabel's `get_content` refuses Caret's, 30.
_ANY_CODE = 0
_TABLE_HEAD = '<?xml version="1.0" encoding="UTF-8"?> <CaretExtension><VolumeInformation Index="0"><LabelTable>'
_TABLE_TAIL = "</LabelTable><VolumeType>Label</VolumeType></VolumeInformation></CaretExtension>"
_LABEL = re.compile(r"<Label\s([^<>]*)>(?:<!\[CDATA\[([^\]]*)\]\]>|([^<>]*))</Label>")
_ATTRIBUTE = re.compile(
    r'(Key|Red|Green|Blue)\s*=\s*"\s*([0-9]{1,9}(?:\.[0-9]*)?(?:[eE]-?[0-9]{1,2})?)\s*"', re.ASCII
)


def _labels_in(extensions: bytes) -> tuple[Segment, ...]:
    """Return the labels of a table among extensions.

    An expression finds them: XML's entities and document types may be hostile.
    """
    segments: dict[int, Segment] = {}
    for attributes, data, text in (
        _LABEL.findall(extensions.decode(errors="replace"))
        if b"<CaretExtension" in extensions
        else ()
    ):
        numbers = dict(_ATTRIBUTE.findall(attributes))
        name = shorten((data or html.unescape(text)).strip(), MAX_OF_A_NAME)
        key = numbers.get("Key", "")
        if (
            key.isdecimal() and 1 <= int(key) <= MAX_LABEL and name
        ):  # Names change no result: the others are used.
            red, green, blue = (float(numbers.get(part, 2)) for part in ("Red", "Green", "Blue"))
            segments.setdefault(
                int(key),
                Segment(int(key), name, (red, green, blue) if max(red, green, blue) <= 1 else None),
            )
    return tuple(segments[label] for label in sorted(segments))
