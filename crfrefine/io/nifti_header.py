"""Headers of NIfTI and Analyze: what they say of the grid and the voxels, and new ones to write; through nibabel, but for plain ones."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.geometry import is_sheared, require_usable, spacing_of
from crfrefine.errors import InputError, UnsupportedFormatError
from crfrefine.io.source import VoxelSource
from crfrefine.io.volume import VolumeHeader

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.io.content import Content
    from crfrefine.io.volume import Volume

LONGEST = 540
"""Bytes of the longer one of both versions."""

# Codes of the header's xyzt_units: meters, millimeters, micrometers; unknown ones are millimeters in practice.
_MM_PER_UNIT = {1: 1000.0, 2: 1.0, 3: 0.001}
_ANALYZE_NOTE = "Analyze 7.5 does not say which side is left: its axes are taken as nibabel does"

_quiet = logging.getLogger("crfrefine.io.nifti")
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False


@dataclass(frozen=True)
class HeaderFacts:
    """What a header says of the grid and of the voxels, lengths in its own unit."""

    shape: tuple[int, ...]  # of the array in the file
    dtype: np.dtype[Any]  # of the voxels as stored
    slope: float | None  # what a stored value is multiplied by; None: stored values are the values
    intercept: float | None  # what is added then
    affine: NDArray[np.float64]  # of the sform, else of the qform, else from the size of a voxel alone
    qform: NDArray[np.float64] | None  # None: it has none
    sform: NDArray[np.float64] | None  # None: it has none


def parse(block: bytes, path: Path, *, is_pair: bool = False) -> Any:
    """Return the header, the fields of a plain one or nibabel's, of the first LONGEST bytes of a file; that of a pair may be Analyze's.

    Raises:
        UnsupportedFormatError: not such a header, damaged, or cut off.
    """
    if not is_pair and (plain := read_plain(block)) is not None:
        return plain
    import nibabel

    if not block:
        raise UnsupportedFormatError(f"{path}: the file is empty")
    size = {int.from_bytes(block[:4], "little"), int.from_bytes(block[:4], "big")}
    kind: Any = nibabel.Nifti1Header if 348 in size else nibabel.Nifti2Header if 540 in size else None
    if kind is None:
        raise UnsupportedFormatError(f"{path}: not a NIfTI file, although its name says so: it begins with {block[:12]!r}")
    if is_pair:
        kind = nibabel.Nifti1Pair.header_class if 348 in size else nibabel.Nifti2Pair.header_class
    length = 348 if 348 in size else 540
    if len(block) < length:
        raise UnsupportedFormatError(f"{path}: the file is cut off within its header ({len(block)} of {length} bytes)")
    try:
        if is_pair and 348 in size and block[344:347] != kind.pair_magic:
            kind = nibabel.Spm2AnalyzeImage.header_class
        header = kind(block[:length], check=False)
        if not is_pair and header["magic"].item() != kind.single_magic:
            raise UnsupportedFormatError(f"{path}: not a single-file NIfTI (Analyze or a .hdr/.img pair?); convert it to .nii.gz first")
        header.check_fix(logger=_quiet, error_level=40)
        header.get_data_dtype()
        header.get_slope_inter()
        if np.isinf(header["scl_slope"]):  # nibabel would leave the voxels unscaled, as it rightly does for 0 and NaN.
            raise UnsupportedFormatError(f"{path}: damaged NIfTI header: its scl_slope is infinite; expected a number, or 0 for no scaling")
        if not np.isfinite(header["vox_offset"]) or header["vox_offset"] < 0:
            raise UnsupportedFormatError(f"{path}: damaged NIfTI header: the voxels begin at byte {header['vox_offset']}")
    except (nibabel.spatialimages.HeaderDataError, OverflowError) as error:
        raise UnsupportedFormatError(f"{path}: damaged NIfTI header: {error}") from None
    return header


def interpret(header: Any, path: Path, voxels: Path, encoding: str) -> VolumeHeader:
    """Return what a parsed header says, after a check that the file with the voxels, "raw" or "gzip", is long enough.

    Raises:
        UnsupportedFormatError: an unsupported kind of voxel or layout, or the file is cut off.
        InputError: the geometry is not usable.
    """
    is_plain = isinstance(header, np.ndarray)
    is_nifti = is_plain or "magic" in header
    facts = facts_of_plain(header) if is_plain else _facts_of_nibabel(header, path)
    grid_shape, num_channels = _layout(facts.shape, path)
    _require_numbers(facts.dtype, path)
    affine, notes = facts.affine.copy(), _notes_on_transforms(facts)
    if is_nifti:
        affine[:3] *= mm_per_unit(header)
    else:
        affine, notes = affine + 0.0, (_ANALYZE_NOTE,)
    require_usable(affine, len(grid_shape), path)
    is_single = is_plain or bool(getattr(header, "is_single", False))
    source = VoxelSource(
        header_path=path,
        files=(voxels,),
        encoding=encoding,
        dtype=facts.dtype,
        sizes=(*grid_shape, num_channels),
        inner=math.prod(grid_shape),
        offset=0,
        # Only nibabel's may have none.
        num_bytes_after=int(header["vox_offset"]) or (int(header.single_vox_offset) if is_single else 0),
        slope=1.0 if facts.slope is None else float(facts.slope),
        intercept=float(facts.intercept or 0.0),
    )
    source.check()
    version = "Analyze 7.5" if not is_nifti else "NIfTI-2" if header["sizeof_hdr"] == 540 else "NIfTI-1"
    is_pair = is_nifti and not is_single
    return VolumeHeader(
        path=path,
        format=version + (" pair" if is_pair else "") + (", gzip" if encoding == "gzip" else ""),
        grid_shape=grid_shape,
        num_channels=num_channels,
        dtype=facts.dtype.name,
        spacing=spacing_of(affine, len(grid_shape)),
        affine=affine,
        template=header,
        notes=notes,
        source=source,
    )


def _layout(shape: tuple[int, ...], path: Path) -> tuple[tuple[int, ...], int]:
    """Return grid shape and number of channels of (x, y), (x, y, z), (x, y, z, channel) and ITK's (x, y, z, 1, channel)."""
    if not shape or min(shape) < 1:
        raise UnsupportedFormatError(f"{path}: the header has an impossible shape, {shape}")
    if len(shape) == 1:
        shape = (*shape, 1)
    if len(shape) <= 3:
        return shape, 1
    time_steps, channels = shape[3], (*shape[4:], 1)[0]
    if (time_steps > 1 and channels > 1) or max(shape[5:], default=1) > 1:
        raise UnsupportedFormatError(
            f"{path}: its shape {shape} cannot be split into grid and channels\n"
            "  Expected (x, y, z), (x, y, z, channel) or (x, y, z, 1, channel)."
        )
    return shape[:3], time_steps * channels


def _require_numbers(dtype: np.dtype[Any], path: Path) -> None:
    """Raise UnsupportedFormatError for voxels that are not one real number each."""
    if dtype.fields is not None:
        raise UnsupportedFormatError(f"{path}: a color (RGB) image; expected one number per voxel, split it into channels first")
    if dtype.kind == "c":
        raise UnsupportedFormatError(f"{path}: complex voxels; expected real ones, export the magnitude")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise UnsupportedFormatError(f"{path}: voxels of type {dtype.name} are not supported; convert them to float32 or integers")


def _facts_of_nibabel(header: Any, path: Path) -> HeaderFacts:
    """Return what nibabel makes of a header: its affine is that of the sform, else of the qform, else it has only the voxel size."""
    try:
        affine = np.asarray(header.get_best_affine(), np.float64)
        qform, sform = (header.get_qform(coded=True)[0], header.get_sform(coded=True)[0]) if "magic" in header else (None, None)
    except ValueError as error:
        raise InputError(f"{path}: the geometry in the header is not usable: {error}; repair the header") from None
    shape = tuple(int(size) for size in header.get_data_shape())
    slope, intercept = header.get_slope_inter()
    return HeaderFacts(shape, header.get_data_dtype(), slope, intercept, affine, qform, sform)


def _notes_on_transforms(facts: HeaderFacts) -> tuple[str, ...]:
    """Return what the user should know about sform and qform."""
    qform, sform = facts.qform, facts.sform
    if qform is None and sform is None:
        return ("no orientation in the header (sform and qform codes are 0)",)
    if qform is None or sform is None or np.allclose(qform, sform, atol=1e-3 * min(spacing_of(sform))):
        return ()
    return ("sform and qform differ; the sform is used, and both are kept in output files",)


def mm_per_unit(header: Any) -> float:
    """Return the unit of lengths of a NIfTI header in mm."""
    return _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)


def header_to_write(content: Content, like: Volume, *, is_pair: bool, extension: bytes = b"") -> bytes:
    """Return the header of voxels with the geometry of another volume.

    The geometry of a NIfTI file is kept bit for bit. The extension, with its size and code, follows
    the header; extensions of the other file are not copied.
    """
    shape = content.shape[::-1]
    if content.num_channels is not None:
        shape = shape[:-1] + (1,) * (3 - len(like.spacing)) + shape[-1:]
    template: Any = like.header.template if like.header is not None else None
    if isinstance(template, np.ndarray) and max(shape) <= _MAX_SIDE:
        header: Any = template.copy()
        header["dim"] = (len(shape), *shape, *(1,) * (7 - len(shape)))
        header["pixdim"][len(shape) + 1 :] = 1.0
        header["datatype"], header["bitpix"] = _CODES[content.dtype.newbyteorder("<")], 8 * content.dtype.itemsize
        magic, first_voxel = (b"ni1" if is_pair else _MAGIC), _FIRST_VOXEL
    else:
        header = _header_of_nibabel(template, like)
        header.set_data_shape(shape)
        header.set_data_dtype(content.dtype)
        magic, first_voxel = (header.pair_magic if is_pair else header.single_magic), header.single_vox_offset
    header["scl_slope"], header["scl_inter"] = 1.0, 0.0
    header["cal_min"], header["cal_max"] = 0.0, 0.0
    header["intent_code"], header["intent_name"] = 0, b""
    header["intent_p1"], header["intent_p2"], header["intent_p3"] = 0.0, 0.0, 0.0
    header["descrip"], header["aux_file"] = b"crfrefine", b""
    header["magic"], header["vox_offset"] = magic, 0 if is_pair else first_voxel + len(extension)
    block: bytes = header.tobytes() if isinstance(header, np.ndarray) else header.binaryblock
    return block + bytes((bool(extension), 0, 0, 0)) + extension


def _header_of_nibabel(template: Any, like: Volume) -> Any:
    import nibabel

    nifti1: Any = nibabel.Nifti1Header
    if isinstance(template, np.ndarray):
        return nifti1(template.tobytes())
    if isinstance(template, nifti1):
        # Always little-endian: the same values, and every reader accepts them.
        return template.as_byteswapped("<")
    header = nifti1()
    # The quaternion of a qform cannot hold a shear; nibabel would drop it silently.
    if not is_sheared(like.affine):
        header.set_qform(like.affine, code=1)
    header.set_sform(like.affine, code=1)
    header.set_xyzt_units("mm")
    return header


# Headers of NIfTI-1 files in which nothing needs a repair or a rule of its own, read without nibabel. Nearly all files have one. To import
# nibabel takes a quarter of the processor time of a small case, in which a header of 348 bytes is all that is asked of it. Whatever is out
# of the ordinary is left to nibabel: NIfTI-2, pairs, big-endian files, damaged or odd fields.

_MAX_SIDE = 32767  # Most voxels along an axis.
_FIRST_VOXEL = 352  # Behind the header and four bytes that say whether extensions follow.
_MAGIC = b"n+1"
# All bytes of the header, as in nifti1.h, https://nifti.nimh.nih.gov/nifti-1.
_FIELDS = np.dtype(
    [
        *(("sizeof_hdr", "<i4"), ("of_analyze", "V36"), ("dim", "<8i2")),
        *((name, "<f4") for name in ("intent_p1", "intent_p2", "intent_p3")),
        *((name, "<i2") for name in ("intent_code", "datatype", "bitpix", "slice_start")),
        ("pixdim", "<8f4"),
        *((name, "<f4") for name in ("vox_offset", "scl_slope", "scl_inter")),
        *(("slice_end", "<i2"), ("slice_code", "u1"), ("xyzt_units", "u1")),
        *((name, "<f4") for name in ("cal_max", "cal_min", "slice_duration", "toffset")),
        *(("glmax", "<i4"), ("glmin", "<i4")),
        *(("descrip", "S80"), ("aux_file", "S24"), ("qform_code", "<i2"), ("sform_code", "<i2")),
        *(("quatern", "<3f4"), ("qoffset", "<3f4"), ("srow", "<(3,4)f4")),
        *(("intent_name", "S16"), ("magic", "S4")),
    ]
)
_TYPES = {2: "u1", 4: "<i2", 8: "<i4", 16: "<f4", 64: "<f8", 256: "i1", 512: "<u2", 768: "<u4", 1024: "<i8", 1280: "<u8"}
_CODES = {np.dtype(name): code for code, name in _TYPES.items()}
_TRANSFORM_CODES = range(6)


def read_plain(block: bytes) -> NDArray[np.void] | None:
    """Return the fields of the header in the first bytes of a file; None: it is to be read with nibabel."""
    if len(block) < _FIELDS.itemsize or block[:4] != _FIELDS.itemsize.to_bytes(4, "little"):
        return None
    fields: NDArray[np.void] = np.frombuffer(bytearray(block[: _FIELDS.itemsize]), _FIELDS).reshape(())
    num_axes, *sides = fields["dim"].tolist()
    type_name = _TYPES.get(int(fields["datatype"]))
    codes = int(fields["qform_code"]), int(fields["sform_code"])
    is_plain = (
        fields["magic"] == _MAGIC
        and 1 <= num_axes <= len(sides)
        and min(sides[:num_axes]) > 0
        and tuple(sides[:3]) != (27307, 1, 6)  # FreeSurfer's way to write a surface of 163,842 vertices.
        and type_name is not None
        and fields["bitpix"] == 8 * np.dtype(type_name).itemsize
        and (fields["pixdim"][1:4] > 0).all()
        and abs(fields["pixdim"][0]) == 1
        and _FIRST_VOXEL <= fields["vox_offset"] < np.inf
        and np.isfinite([fields["scl_slope"], fields["scl_inter"]]).all()
        and all(code in _TRANSFORM_CODES for code in codes)
        and any(codes)
        and (codes[0] == 0 or _rest(fields["quatern"]) >= 0)
    )
    return fields if is_plain else None


def facts_of_plain(fields: NDArray[np.void]) -> HeaderFacts:
    """Return what the fields of a plain header say, to the bit as nibabel does."""
    num_axes, *sides = fields["dim"].tolist()
    slope = float(fields["scl_slope"]) or None
    sform = np.vstack([fields["srow"].astype(np.float64), [0.0, 0.0, 0.0, 1.0]]) if fields["sform_code"] else None
    qform = _rigid(fields["quatern"], fields["pixdim"], fields["qoffset"]) if fields["qform_code"] else None
    affine = qform if sform is None else sform
    assert affine is not None, "a header without both is left to nibabel"
    intercept = None if slope is None else float(fields["scl_inter"])
    return HeaderFacts(tuple(sides[:num_axes]), np.dtype(_TYPES[int(fields["datatype"])]), slope, intercept, affine, qform, sform)


def _rest(quaternion: NDArray[np.float32]) -> np.longdouble:
    """Return the square of the first component of a unit quaternion with these three others; rounding errors of its text are taken away."""
    parts = quaternion.astype(np.longdouble)
    rest = 1.0 - parts @ parts
    return np.longdouble(0 if abs(rest) < 3 * np.finfo(np.float32).eps else rest)


def _rigid(quaternion: NDArray[np.float32], pixdim: NDArray[np.float32], offset: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the affine of a rotation, given as a quaternion, and of the size of a voxel; pixdim[0] is the sign of the third axis."""
    a, (b, c, d) = np.sqrt(_rest(quaternion)), quaternion.astype(np.longdouble)
    two_b, two_c, two_d = (2.0 / (a * a + b * b + c * c + d * d)) * np.array([b, c, d])
    rotation = np.array(
        [
            [1.0 - (c * two_c + d * two_d), b * two_c - a * two_d, b * two_d + a * two_c],
            [b * two_c + a * two_d, 1.0 - (b * two_b + d * two_d), c * two_d - a * two_b],
            [b * two_d - a * two_c, c * two_d + a * two_b, 1.0 - (b * two_b + c * two_c)],
        ]
    )
    affine = np.eye(4)
    affine[:3, :3] = rotation * (pixdim[1:4] * [1.0, 1.0, pixdim[0]])
    affine[:3, 3] = offset
    return affine
