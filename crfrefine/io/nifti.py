"""NIfTI-1 and NIfTI-2, as single files or pairs, and Analyze 7.5, which is only read.

nibabel interprets the header; the voxels are decoded here.
"""

from __future__ import annotations

import html
import logging
import re
import shlex
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.geometry import (
    SPACING_RANGE,
    describe_affine,
    farthest_distance,
    is_sheared,
    require_usable,
    same_grid,
)
from crfrefine.base.limits import MAX_LABEL
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import shorten
from crfrefine.errors import InputError, UnsupportedFormatError
from crfrefine.io import streams
from crfrefine.io.atomic import atomic_files
from crfrefine.io.paths import stem_of
from crfrefine.io.volume import (
    MAX_OF_A_NAME,
    Segment,
    Volume,
    VolumeHeader,
    VoxelsToWrite,
    volume_header,
)


class _Form(NamedTuple):
    """A form of the header."""

    name: str  # for people
    length: int  # bytes, and the number that the header begins with
    is_pair: bool  # the voxels are in another file
    magic_place: int  # of the magic in the header
    magic: bytes  # b"" means any
    image_class: str  # in nibabel, which has its header's class


# The first form that fits is taken. A pair without the magic of NIfTI-1 is Analyze's.
_FORMS = (
    _Form("NIfTI-1", 348, False, 344, b"n+1\0", "Nifti1Image"),
    _Form("NIfTI-2", 540, False, 4, b"n+2\0", "Nifti2Image"),
    _Form("NIfTI-1 pair", 348, True, 344, b"ni1", "Nifti1Pair"),
    _Form("Analyze 7.5", 348, True, 344, b"", "Spm2AnalyzeImage"),
    _Form("NIfTI-2 pair", 540, True, 4, b"", "Nifti2Pair"),
)
_MAX_HEADER = 540  # bytes of the longest header
# Codes of the header's xyzt_units: meters, millimeters, micrometers; unknown ones are millimeters
# in practice.
MM_PER_UNIT = {1: 1000.0, 2: 1.0, 3: 0.001}
_ORDERS: tuple[Literal["little", "big"], ...] = ("little", "big")
# Codes of the same field for the steps of the fourth axis.
_TIME_UNITS = {8: "s", 16: "ms", 24: "µs"}
# nibabel logs its repairs of a header; this logger prints nothing.
_quiet = logging.Logger("crfrefine.io.nifti", logging.CRITICAL + 1)


def recognizes(start: bytes) -> bool:
    """Return whether a file with this beginning, compressed or not, is NIfTI or Analyze."""
    block = streams.inflated(start)
    if block[344:348] == b"n+1\0" or block[4:8] == b"n+2\0" or block[4:7] == b"ni2":
        return True
    if block[344:347] == b"n+1":
        return False
    # A header of Analyze has no magic, but its length and a number of dimensions.
    for order in _ORDERS:
        length = int.from_bytes(block[:4], order)
        num_dims = int.from_bytes(block[40:42], order)
        if length == 348 and 1 <= num_dims <= 7:
            return True
    return False


def read_header(path: Path) -> VolumeHeader:
    """Read only the header; a pair's voxels have its name, and perhaps an ending in upper case."""
    with streams.open_bytes(path, "raw") as reader:
        start = reader.read(streams.START_BYTES)
    # The content, or else the name, says whether a file is compressed.
    is_named_gzip = streams.is_named_gzip(path)
    encoding = "raw"
    if start.startswith(streams.GZIP_MAGIC) or (is_named_gzip and not recognizes(start)):
        encoding = "gzip"

    with streams.open_bytes(path, encoding) as reader:
        block = reader.read(_MAX_HEADER)
        form = _form_of(block, path)
        if form.is_pair:
            return _parse_pair(block, path, form)
        header = _parse(block, path, form, path, encoding)
        assert header.source is not None
        end = header.source.offset
        num_bytes = min(end, form.length + _MAX_EXTENSION_BYTES)
        block += reader.read(max(0, num_bytes - len(block)))

    has_extensions = block[form.length : form.length + 1] > b"\0"
    if has_extensions:  # Channels are labels, too.
        return replace(header, segments=_labels_in(block[form.length : end]))
    return header


def _parse_pair(block: bytes, path: Path, form: _Form) -> VolumeHeader:
    """Return the header of a pair, whose voxels are in a file beside it."""
    endings = (".img", ".IMG", ".img.gz", ".IMG.GZ")
    candidates = [path.with_name(stem_of(path) + ending) for ending in endings]
    present = [candidate for candidate in candidates if candidate.exists()]
    voxels = next(iter(present), candidates[0])
    encoding = "gzip" if voxels.name.lower().endswith(".gz") else "raw"
    return _parse(block, path, form, voxels, encoding)


def _form_of(block: bytes, path: Path) -> _Form:
    """Return the form of a header by its length and magic; only some names allow that of a pair."""
    lengths = {int.from_bytes(block[:4], order) for order in _ORDERS}
    forms = [form for form in _FORMS if form.length in lengths and len(block) >= form.length]
    if not forms:
        raise UnsupportedFormatError(
            f"{path}: not a NIfTI file, although its name says so, or cut off: "
            f"it begins with {block[:12]!r}, and its header has {len(block)} bytes"
        )
    may_be_pair = not path.name.lower().endswith((".nii", ".nii.gz"))
    for form in forms:
        fits = block.startswith(form.magic, form.magic_place)
        if fits and (may_be_pair or not form.is_pair):
            return form
    raise UnsupportedFormatError(
        f"{path}: not a single-file NIfTI (Analyze or a .hdr/.img pair?); "
        "convert it to .nii.gz first"
    )


def _parse(block: bytes, path: Path, form: _Form, voxels: Path, encoding: str) -> VolumeHeader:
    """Return the header in the first bytes of a file, whose voxels may be in another one."""
    header = _repaired_header(block, path, form)
    shape = tuple(int(size) for size in header.get_data_shape())
    time_steps, channels = (*shape, 1, 1, 1, 1)[3:5]
    is_split = time_steps == 1 or channels == 1
    if not shape or min(shape) < 1 or not is_split or max(shape[5:], default=1) > 1:
        raise UnsupportedFormatError(
            f"{path}: its shape {shape} cannot be split into grid and channels\n"
            "  Expected (x, y, z), (x, y, z, channel) or (x, y, z, 1, channel)."
        )
    if len(shape) == 1:
        shape = (*shape, 1)
    grid_shape = shape[:3]
    try:
        geometry = _geometry_of(header, grid_shape, path)
    except ValueError as error:
        raise InputError(
            f"{path}: the geometry in the header is not usable: {error}; repair the header"
        ) from None

    slope, intercept = header.get_slope_inter()  # Without a slope, nibabel returns None, not 0.
    offset = int(header["vox_offset"])
    if offset == 0 and not form.is_pair:
        offset = int(header.single_vox_offset)
    slope = float(slope or 1.0)
    intercept = float(intercept or 0.0)
    dtype = header.get_data_dtype()
    source = streams.VoxelSource(
        voxels, encoding, dtype, offset=offset, slope=slope, intercept=intercept
    )
    file_format = form.name + (", gzip" if encoding == "gzip" else "")
    return volume_header(
        path,
        source,
        file_format,
        grid_shape,
        time_steps * channels,
        template=header,
        time=_time_between(header) if time_steps > 1 else "",
        **geometry._asdict(),
    )


def _time_between(header: Any) -> str:
    """Return the time between the volumes of the fourth axis; "" if the header does not tell.

    Many programs write seconds, and steps of 0 or 1, whatever the axis holds.
    """
    if "magic" not in header:
        return ""
    unit = _TIME_UNITS.get(int(header["xyzt_units"]) & 0x38, "")
    step = float(header["pixdim"][4])
    is_default = unit == "s" and step == 1.0
    if not unit or is_default or not 0 < step < np.inf:
        return ""
    return f"{step:g} {unit} apart"


def _repaired_header(block: bytes, path: Path, form: _Form) -> Any:
    """Return nibabel's header, in which it has repaired what does no harm."""
    import nibabel

    try:
        header = getattr(nibabel, form.image_class).header_class(block[: form.length], check=False)
        header.check_fix(logger=_quiet, error_level=40)
        dtype = header.get_data_dtype()
        header.get_slope_inter()
    except (nibabel.spatialimages.HeaderDataError, OverflowError) as error:
        raise UnsupportedFormatError(f"{path}: damaged NIfTI header: {error}") from None

    # nibabel would leave the voxels unscaled, as it rightly does for a slope of 0 and NaN.
    slope = header["scl_slope"]
    offset = header["vox_offset"]
    if np.isinf(slope) or not 0 <= offset < np.inf:
        raise UnsupportedFormatError(
            f"{path}: damaged NIfTI header: scl_slope {slope}, vox_offset {offset}; "
            "expected a finite slope, and an offset of 0 or more bytes"
        )
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise UnsupportedFormatError(
            f"{path}: voxels of type {shorten(dtype)} are not supported: "
            "expected integers or floats of at most 64 bits\n"
            "  Split colors into channels, export the magnitude of complex numbers, "
            "or convert the voxels to float32."
        )
    return header


# Sets the sform of a NIfTI file from its qform, with nibabel alone.
_NIBABEL = (
    "import sys, nibabel; image = nibabel.load(sys.argv[1]); "
    "image.set_sform(image.get_qform(), 1); nibabel.save(image, sys.argv[2])"
)


def set_sform_from_qform(path: Path) -> list[str]:
    """Return the commands of FSL and nibabel that set the sform of a file from its qform."""
    quoted = shlex.quote(str(path))
    return [
        f"If the qform of {path.name} is right, set its sform from it, in place with FSL, "
        "or with nibabel:",
        f"  fslorient -copyqform2sform {quoted}",
        f'  python -c "{_NIBABEL}" {quoted} NEW.nii.gz',
    ]


def _require_usable_affine(header: Any, affine: NDArray[np.float64], path: Path) -> None:
    """Raise InputError if an affine is not usable; if it is the sform, how to take a good qform."""
    num_axes = min(len(header.get_data_shape()), 3)
    try:
        require_usable(affine, num_axes, path)
    except InputError as error:
        if int(header["sform_code"]) == 0 or not _has_usable_qform(header, num_axes, path):
            raise
        lines = [f"{error}. The affine is its sform.", *set_sform_from_qform(path)]
        raise InputError("\n  ".join(lines)) from None


def _has_usable_qform(header: Any, num_axes: int, path: Path) -> bool:
    with suppress(InputError, ValueError):
        qform = header.get_qform(coded=True)[0]
        if qform is not None:
            require_usable(qform, num_axes, path)
            return True
    return False


class _Geometry(NamedTuple):
    """The place of a grid, as fields of `VolumeHeader`."""

    affine: NDArray[np.float64]
    qform: NDArray[np.float64] | None = None
    notes: tuple[Note, ...] = ()
    details: tuple[tuple[str, str], ...] = ()


def _geometry_of(header: Any, grid_shape: tuple[int, ...], path: Path) -> _Geometry:
    """Return the geometry of a header; raise ValueError if nibabel cannot compute it."""
    affine = np.array(header.get_best_affine(), np.float64)
    if "magic" not in header:
        # Adding zero turns -0 into 0.
        return _Geometry(affine + 0.0, notes=(Note.of(NoteKind.ANALYZE),))

    mm_per_unit = MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
    affine[:3] *= mm_per_unit
    _require_usable_affine(header, affine, path)
    sform_code = int(header["sform_code"])
    qform_code = int(header["qform_code"])
    codes = ("sform, qform", f"codes {sform_code}, {qform_code}")
    if sform_code == 0 and qform_code == 0:
        return _Geometry(affine, None, (Note.of(NoteKind.NO_ORIENTATION),), (codes,))

    qform = header.get_qform(coded=True)[0]
    if sform_code == 0 or qform is None:
        return _Geometry(affine, details=(codes,))
    qform = np.array(qform, np.float64)
    qform[:3] *= mm_per_unit
    is_sane = bool((np.abs(qform) < SPACING_RANGE[1]).all())  # Also False for NaN.
    if not is_sane or same_grid(grid_shape, affine, grid_shape, qform):
        return _Geometry(affine, details=(codes,))
    distance = farthest_distance(grid_shape, affine, qform)
    note = Note.of(NoteKind.TWO_GEOMETRIES, distance=float(distance))
    used = ("sform", f"{describe_affine(affine)} (used)")
    unused = ("qform", f"{describe_affine(qform)} (up to {distance:.2f} mm away)")
    return _Geometry(affine, qform, (note,), (codes, used, unused))


_MAX_AXIS = 32767  # voxels along an axis of NIfTI-1, and channels
_FIELDS_OF_VALUES = (
    *("scl_inter", "cal_min", "cal_max"),
    *("intent_code", "intent_p1", "intent_p2", "intent_p3"),
)


def write(voxels: VoxelsToWrite, like: Volume, threads: int) -> None:
    """Write voxels with the geometry of another volume, bit for bit that of a NIfTI file.

    Channels get the fourth dimension, and a single file gets a table of its segments. The other
    file's extensions are not copied. A pair is not compressed.
    """
    header = _header_without_content(like)
    shape = voxels.grid_shape[::-1]
    if voxels.num_channels is not None:
        shape = (*(*shape, 1)[:3], voxels.num_channels)
    longest = max(shape)
    if longest > _MAX_AXIS and header.sizeof_hdr == 348:
        raise UnsupportedFormatError(
            f"{voxels.path}: NIfTI-1 holds at most {_MAX_AXIS} voxels along an axis, found "
            f"{longest}; write MetaImage (.mha) or NRRD (.nrrd) instead"
        )
    header.set_data_shape(shape)
    header.set_data_dtype(voxels.dtype)

    extension = b""
    if voxels.voxel_files:
        header["magic"] = header.pair_magic
        header["vox_offset"] = 0
    else:
        extension = _extension_with(voxels.segments)
        header["magic"] = header.single_magic
        header["vox_offset"] = header.single_vox_offset + len(extension)
    block = header.binaryblock + bytes((bool(extension), 0, 0, 0)) + extension

    with atomic_files(*voxels.voxel_files, voxels.path) as files:
        if streams.is_named_gzip(voxels.path):
            streams.write_gzip(files[0], chain([block], voxels.blocks()), threads)
        else:
            files[-1].write(block)
            files[0].writelines(voxels.blocks())


def _header_without_content(like: Volume) -> Any:
    """Return nibabel's header with the geometry of a volume, and no other facts about it."""
    import nibabel

    template: Any = like.header.template if like.header is not None else None
    nifti1: Any = nibabel.Nifti1Header
    if isinstance(template, nifti1):  # NIfTI-2 is derived from it.
        header = template.as_byteswapped("<")
    else:
        header = nifti1()
        # The quaternion of a qform cannot hold a shear; nibabel would drop it silently.
        if not is_sheared(like.affine):
            header.set_qform(like.affine, code=1)
        header.set_sform(like.affine, code=1)
        header.set_xyzt_units("mm")

    for field in _FIELDS_OF_VALUES:
        header[field] = 0
    header["scl_slope"] = 1.0
    header["intent_name"] = b""
    header["aux_file"] = b""
    header["descrip"] = b"crfrefine"
    return header


# Names and colors of labels in the extension of a NIfTI header: the XML table of Caret, which
# TotalSegmentator writes, too.

_MAX_EXTENSION_BYTES = 1 << 20  # of a file, that are looked at; a label takes about 100
# Code of the extension, as TotalSegmentator writes it; nibabel's `get_content` refuses Caret's, 30.
_ANY_CODE = 0
_TABLE_HEAD = (
    '<?xml version="1.0" encoding="UTF-8"?> '
    '<CaretExtension><VolumeInformation Index="0"><LabelTable>'
)
_TABLE_TAIL = "</LabelTable><VolumeType>Label</VolumeType></VolumeInformation></CaretExtension>"
_LABEL = re.compile(r"<Label\s([^<>]*)>(?:<!\[CDATA\[([^\]]*)\]\]>|([^<>]*))</Label>")
_ATTRIBUTE = re.compile(
    r'(Key|Red|Green|Blue)\s*=\s*"\s*([0-9]{1,9}(?:\.[0-9]*)?(?:[eE]-?[0-9]{1,2})?)\s*"', re.ASCII
)


def _extension_with(segments: Sequence[Segment]) -> bytes:
    """Return the extension of a header with a table of segments; b"" without segments."""
    if not segments:
        return b""
    lines = [_TABLE_HEAD]
    for segment in segments:
        red, green, blue = map(float, segment.shown_color)
        attributes = f'Key="{segment.label}" Red="{red}" Green="{green}" Blue="{blue}" Alpha="1"'
        lines.append(f"<Label {attributes}>{html.escape(segment.name, quote=False)}</Label>")
    lines.append(_TABLE_TAIL)
    text = "\n".join(lines).encode()

    size = -(-(8 + len(text)) // 16) * 16  # Extensions are multiples of 16 bytes.
    return struct.pack("<ii", size, _ANY_CODE) + text.ljust(size - 8)


def _labels_in(extensions: bytes) -> tuple[Segment, ...]:
    """Return the labels of a table among extensions; wrong entries, mere names, are left out.

    A regular expression finds them, as XML's entities and document types may be hostile.
    """
    if b"<CaretExtension" not in extensions:
        return ()
    segments: dict[int, Segment] = {}
    for attributes, data, text in _LABEL.findall(extensions.decode(errors="replace")):
        numbers = dict(_ATTRIBUTE.findall(attributes))
        name = shorten((data or html.unescape(text)).strip(), MAX_OF_A_NAME)
        key = numbers.get("Key", "")
        if not key.isdecimal() or not 1 <= int(key) <= MAX_LABEL or not name:
            continue
        color = (
            float(numbers.get("Red", 2)),
            float(numbers.get("Green", 2)),
            float(numbers.get("Blue", 2)),
        )
        segment = Segment(int(key), name, color if max(color) <= 1 else None)
        segments.setdefault(segment.label, segment)
    return tuple(segments[label] for label in sorted(segments))
