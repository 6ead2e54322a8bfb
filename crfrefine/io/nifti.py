"""NIfTI-1 and NIfTI-2, as single files or pairs, and Analyze 7.5, which is only read.

nibabel interprets the header; the voxels are decoded here.
"""

from __future__ import annotations

import logging
import re
import shlex
import struct
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from crfrefine.base.array_types import Float64, Shape
from crfrefine.base.geometry import (
    SPACING_RANGE,
    describe_affine,
    farthest_distance,
    is_sheared,
    same_grid,
    usable_spacing,
)
from crfrefine.base.notes import NoteKind
from crfrefine.base.text import shorten
from crfrefine.errors import InputError, UnsupportedFormatError
from crfrefine.io import streams
from crfrefine.io.paths import files_written, stem_of
from crfrefine.io.volume import FileHeader, Segment, Segments, VolumeHeader, described_segments
from crfrefine.io.writing import VoxelsToWrite, atomic_files

# The forms of a header: a name for people, its image in nibabel, its bytes, a number with which it
# begins, and the magic with its place. The first one that fits is taken. A pair without the magic
# of NIfTI-1 is Analyze's.
_FORMS = (
    ("NIfTI-1", "Nifti1Image", 348, b"n+1\0", 344),
    ("NIfTI-2", "Nifti2Image", 540, b"n+2\0", 4),
    ("NIfTI-1 pair", "Nifti1Pair", 348, b"ni1", 344),
    ("Analyze 7.5", "Spm2AnalyzeImage", 348, b"", 344),
    ("NIfTI-2 pair", "Nifti2Pair", 540, b"", 4),
)
_LONGEST = 540  # bytes of a header; the byte behind it says whether an extension follows
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
    return NiftiHeader(path).volume_header()


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


class NiftiHeader(FileHeader):
    """A header as nibabel reads it, with harmless damage repaired."""

    def __init__(self, path: Path) -> None:
        """Read the header. Length and magic tell the form; only some names allow that of a pair."""
        import nibabel

        self.path = path
        with streams.open_bytes(path, "any") as reader:
            self.encoding = "gzip" if isinstance(reader, streams.BlockReader) else "raw"
            block = reader.read(_LONGEST + 1)
        numbers = [int.from_bytes(block[:4], order) for order in _ORDERS]
        forms = []
        for form in _FORMS:
            _, _, length, magic, place = form
            if length in numbers and len(block) >= length and block.startswith(magic, place):
                forms.append(form)
        if not forms:
            raise UnsupportedFormatError(
                f"{path}: not a NIfTI file, although its name says so, or cut off: "
                f"it begins with {block[:12]!r}, and its header has {len(block[:_LONGEST])} bytes"
            )
        self.form, image, length, *_ = forms[0]
        self.format = self.form
        kind = getattr(nibabel, image).header_class
        self.is_single = getattr(kind, "is_single", False)  # That of Analyze lacks it.
        if not self.is_single and path.name.lower().endswith((".nii", ".nii.gz")):
            raise UnsupportedFormatError(
                f"{path}: not a single-file NIfTI (Analyze or a .hdr/.img pair?); "
                "convert it to .nii.gz first"
            )
        try:
            self.template = kind(block[:length], check=False)
            self.template.check_fix(logger=_quiet, error_level=40)
            self.template.get_data_dtype()
            self.template.get_slope_inter()
        except (nibabel.spatialimages.HeaderDataError, OverflowError) as error:
            raise UnsupportedFormatError(f"{path}: damaged NIfTI header: {error}") from None
        self.has_extension = self.is_single and block[length : length + 1] > b"\0"

    def grid(self) -> tuple[Shape, int]:
        """Return the voxels along each axis and the number of channels."""
        shape = tuple(int(size) for size in self.template.get_data_shape())
        time_steps, channels = (*shape, 1, 1, 1, 1)[3:5]
        is_split = time_steps == 1 or channels == 1
        if not shape or min(shape) < 1 or not is_split or max(shape[5:], default=1) > 1:
            raise UnsupportedFormatError(
                f"{self.path}: its shape {shape} cannot be split into grid and channels\n"
                "  Expected (x, y, z), (x, y, z, channel) or (x, y, z, 1, channel)."
            )
        if len(shape) == 1:
            shape = (*shape, 1)
        return shape[:3], time_steps * channels

    def source(self) -> streams.VoxelSource:
        """Return the place of the voxels, which follow the header, or are in a file beside it."""
        header = self.template
        slope = header["scl_slope"]
        offset = header["vox_offset"]
        # nibabel would leave the voxels unscaled, as it rightly does for a slope of 0 and NaN.
        if np.isinf(slope) or not 0 <= offset < np.inf:
            raise UnsupportedFormatError(
                f"{self.path}: damaged NIfTI header: scl_slope {slope}, vox_offset {offset}; "
                "expected a finite slope, and an offset of 0 or more bytes"
            )
        dtype = header.get_data_dtype()
        if dtype.kind not in "iuf" or dtype.itemsize > 8:
            raise UnsupportedFormatError(
                f"{self.path}: voxels of type {shorten(dtype)} are not supported: "
                "expected integers or floats of at most 64 bits\n"
                "  Split colors into channels, export the magnitude of complex numbers, "
                "or convert the voxels to float32."
            )
        path = self.path
        encoding = self.encoding
        if self.is_single:
            offset = offset or header.single_vox_offset
        else:
            endings = (".img", ".IMG", ".img.gz", ".IMG.GZ")
            candidates = [path.with_name(stem_of(path) + ending) for ending in endings]
            path = next(filter(Path.exists, candidates), candidates[0])
            encoding = "gzip" if path.name.lower().endswith(".gz") else "raw"
        if encoding == "gzip":
            self.format = f"{self.form}, gzip"
        slope, intercept = header.get_slope_inter()  # Without a slope, nibabel gives None, not 0.
        return streams.VoxelSource(
            path,
            encoding,
            dtype,
            offset=int(offset),
            slope=float(slope or 1.0),
            intercept=float(intercept or 0.0),
        )

    def affine(self, grid_shape: Shape) -> Float64:
        """Return the affine in mm, with notes on the header's geometry.

        Raise InputError if it is not usable; if it is the sform, how to take a good qform.
        """
        header = self.template
        is_nifti = "magic" in header
        qform = None
        try:
            affine = np.array(header.get_best_affine(), np.float64)
            if is_nifti:
                qform = header.get_qform(coded=True)[0]
        except ValueError as error:
            raise InputError(
                f"{self.path}: the geometry in the header is not usable: {error}; repair the header"
            ) from None
        if not is_nifti:
            self.notes = (NoteKind.ANALYZE(),)
            return affine + 0.0  # Adding zero turns -0 into 0.

        mm_per_unit = MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
        affine[:3] *= mm_per_unit
        has_sform = int(header["sform_code"]) != 0
        codes = f"codes {int(header['sform_code'])}, {int(header['qform_code'])}"
        self.details = (("sform, qform", codes),)
        if qform is not None:
            qform = np.array(qform, np.float64)
            qform[:3] *= mm_per_unit
        elif not has_sform:
            self.notes = (NoteKind.NO_ORIENTATION(),)
        try:
            usable_spacing(affine, len(grid_shape), self.path)
        except InputError as error:
            lines = [str(error)]
            if has_sform and qform is not None:
                with suppress(InputError):
                    usable_spacing(qform, len(grid_shape), self.path)
                    lines = [f"{error}. The affine is its sform.", *set_sform_from_qform(self.path)]
            raise InputError("\n  ".join(lines)) from None
        if not has_sform or qform is None:
            return affine
        # A qform may put voxels elsewhere than the sform.
        is_sane = bool((np.abs(qform) < SPACING_RANGE[1]).all())  # Also False for NaN.
        if is_sane and not same_grid(grid_shape, affine, grid_shape, qform):
            distance = farthest_distance(grid_shape, affine, qform)
            self.qform = qform
            self.notes = (NoteKind.TWO_GEOMETRIES(distance=distance),)
            self.details += (
                ("sform", f"{describe_affine(affine)} (used)"),
                ("qform", f"{describe_affine(qform)} (up to {distance:.2f} mm away)"),
            )
        return affine

    @property
    def time(self) -> str:
        """How far apart the steps along the fourth axis are; "" if the header does not say."""
        header = self.template
        if "magic" not in header or (*header.get_data_shape(), 1, 1, 1, 1)[3] == 1:
            return ""
        # Many programs write seconds, and steps of 0 or 1, whatever the axis holds.
        unit = _TIME_UNITS.get(int(header["xyzt_units"]) & 0x38, "")
        step = float(header["pixdim"][4])
        is_default = unit == "s" and step == 1.0
        if unit and not is_default and 0 < step < np.inf:
            return f"{step:g} {unit} apart"
        return ""

    def segments(self) -> Segments:
        """Return the labels of a table among the extensions; of channels, it names their labels.

        A regular expression finds them, as XML's entities and document types may be hostile.
        """
        if not self.has_extension:
            return ()
        length = self.template.sizeof_hdr
        num_bytes = min(int(self.template["vox_offset"]) - length, _MAX_EXTENSION_BYTES)
        with streams.open_bytes(self.path, self.encoding, offset=length) as reader:
            extensions = reader.read(max(num_bytes, 0))
        if b"<CaretExtension" not in extensions:
            return ()
        import html

        entries = []
        for attributes, data, text in _LABEL.findall(extensions.decode(errors="replace")):
            values = dict(_ATTRIBUTE.findall(attributes))
            color = [float(values.get(name, 2)) for name in ("Red", "Green", "Blue")]
            name = (data or html.unescape(text)).strip()
            entries.append((values.get("Key", ""), name, color))
        return described_segments(entries)


# Sets the sform of a NIfTI file from its qform, with nothing but nibabel.
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


_MAX_AXIS = 32767  # voxels along an axis of NIfTI-1, and channels
# Values for a header instead of facts about the content of another file.
_CONTENT = {
    **dict.fromkeys(("scl_inter", "cal_min", "cal_max"), 0),
    **dict.fromkeys(("intent_code", "intent_p1", "intent_p2", "intent_p3"), 0),
    "scl_slope": 1.0,
    "intent_name": b"",
    "aux_file": b"",
    "descrip": b"crfrefine",
}


def write(voxels: VoxelsToWrite, threads: int) -> None:
    """Write voxels with the geometry of another file, bit for bit that of a NIfTI file.

    Channels get the fourth dimension, and a single file gets a table of its segments. The other
    file's extensions are not copied. A pair is not compressed.
    """
    import nibabel

    like = voxels.like
    template: Any = like.template
    nifti1: Any = nibabel.Nifti1Header
    if isinstance(template, nifti1):  # NIfTI-2 is derived from it.
        header = template.as_byteswapped("<")
    else:
        header = nifti1()
        affine = like.required_affine
        # The quaternion of a qform cannot hold a shear; nibabel would drop it silently.
        if not is_sheared(affine):
            header.set_qform(affine, code=1)
        header.set_sform(affine, code=1)
        header.set_xyzt_units("mm")
    for name, value in _CONTENT.items():
        header[name] = value

    shape = like.grid_shape
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
    if len(files_written(voxels.path)) > 1:
        header["magic"] = header.pair_magic
        header["vox_offset"] = 0
    else:
        extension = _extension_with(voxels.segments)
        header["magic"] = header.single_magic
        header["vox_offset"] = header.single_vox_offset + len(extension)
    block = header.binaryblock + bytes((bool(extension), 0, 0, 0)) + extension

    with atomic_files(voxels.path) as files:
        if streams.is_named_gzip(voxels.path):
            streams.write_gzip(files[0], chain([block], voxels.blocks()), threads)
        else:
            files[-1].write(block)
            files[0].writelines(voxels.blocks())


def _extension_with(segments: Sequence[Segment]) -> bytes:
    """Return the extension of a header with a table of segments; b"" without segments."""
    if not segments:
        return b""
    import html

    lines = [_TABLE_HEAD]
    for segment in segments:
        red, green, blue = map(float, segment.shown_color)
        attributes = f'Key="{segment.label}" Red="{red}" Green="{green}" Blue="{blue}" Alpha="1"'
        lines.append(f"<Label {attributes}>{html.escape(segment.name, quote=False)}</Label>")
    lines.append(_TABLE_TAIL)
    text = "\n".join(lines).encode()

    size = -(-(8 + len(text)) // 16) * 16  # Extensions are multiples of 16 bytes.
    return struct.pack("<ii", size, _ANY_CODE) + text.ljust(size - 8)
