"""Headers of NIfTI and Analyze: what they say of the grid and the voxels, and new ones to write; through nibabel, but for plain ones."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.geometry import is_sheared, require_usable, spacing_of
from crfrefine.errors import InputError, UnsupportedFormatError
from crfrefine.io.plain_nifti import LARGEST_SIDE, PlainHeader, read_plain
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


def parse(block: bytes, path: Path, *, is_pair: bool = False) -> Any:
    """Return the header, a plain one or nibabel's, of the first LONGEST bytes of a file, checked; that of a pair may be Analyze's.

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
    grid_shape, num_channels = _layout(tuple(int(size) for size in header.get_data_shape()), path)
    dtype = _voxel_type(header, path)
    is_nifti = "magic" in header
    affine, notes = _geometry(header, path) if is_nifti else (np.asarray(header.get_best_affine(), np.float64) + 0.0, (_ANALYZE_NOTE,))
    require_usable(affine, len(grid_shape), path)
    slope, intercept = header.get_slope_inter()
    is_single = bool(getattr(header, "is_single", False))
    source = VoxelSource(
        header_path=path,
        files=(voxels,),
        encoding=encoding,
        dtype=dtype,
        sizes=(*grid_shape, num_channels),
        inner=math.prod(grid_shape),
        offset=0,
        num_bytes_after=int(header["vox_offset"]) or (int(header.single_vox_offset) if is_single else 0),
        slope=1.0 if slope is None else float(slope),
        intercept=float(intercept or 0.0),
    )
    source.check()
    version = "Analyze 7.5" if not is_nifti else "NIfTI-2" if header["sizeof_hdr"] == 540 else "NIfTI-1"
    is_pair = is_nifti and not is_single
    return VolumeHeader(
        path=path,
        format=version + (" pair" if is_pair else "") + (", gzip" if encoding == "gzip" else ""),
        grid_shape=grid_shape,
        num_channels=num_channels,
        dtype=dtype.name,
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


def _voxel_type(header: Any, path: Path) -> np.dtype[Any]:
    dtype: np.dtype[Any] = header.get_data_dtype()
    if dtype.fields is not None:
        raise UnsupportedFormatError(f"{path}: a color (RGB) image; expected one number per voxel, split it into channels first")
    if dtype.kind == "c":
        raise UnsupportedFormatError(f"{path}: complex voxels; expected real ones, export the magnitude")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise UnsupportedFormatError(f"{path}: voxels of type {dtype.name} are not supported; convert them to float32 or integers")
    return dtype


def _geometry(header: Any, path: Path) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Return the affine in mm as nibabel chooses it (sform, else qform, else only the voxel size), and notes about it."""
    try:
        affine = np.asarray(header.get_best_affine(), np.float64)
        qform, sform = header.get_qform(coded=True)[0], header.get_sform(coded=True)[0]
    except ValueError as error:
        raise InputError(f"{path}: the geometry in the header is not usable: {error}; repair the header") from None
    affine[:3] *= mm_per_unit(header)
    if qform is None and sform is None:
        return affine, ("no orientation in the header (sform and qform codes are 0)",)
    if qform is None or sform is None or np.allclose(qform, sform, atol=1e-3 * min(spacing_of(sform))):
        return affine, ()
    return affine, ("sform and qform differ; the sform is used, and both are kept in output files",)


def mm_per_unit(header: Any) -> float:
    """Return the unit of lengths of a NIfTI header in mm."""
    return _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)


def header_to_write(content: Content, like: Volume, *, is_pair: bool) -> Any:
    """Return a header of voxels with the geometry of another volume: bit for bit that of its own file, if it is NIfTI."""
    shape = content.shape[::-1]
    if content.num_channels is not None:
        shape = shape[:-1] + (1,) * (3 - len(like.spacing)) + shape[-1:]
    template: Any = like.header.template if like.header is not None else None
    if isinstance(template, PlainHeader) and max(shape) <= LARGEST_SIDE:
        header: Any = template.copy()
    else:
        header = _header_of_nibabel(template, like)
    header.set_data_shape(shape)
    header.set_data_dtype(content.dtype)
    header["scl_slope"], header["scl_inter"] = 1.0, 0.0
    header["cal_min"], header["cal_max"] = 0.0, 0.0
    header["intent_code"], header["intent_name"] = 0, b""
    header["intent_p1"], header["intent_p2"], header["intent_p3"] = 0.0, 0.0, 0.0
    header["descrip"], header["aux_file"] = b"crfrefine", b""
    header["magic"] = header.pair_magic if is_pair else header.single_magic
    header["vox_offset"] = 0 if is_pair else header.single_vox_offset
    return header


def _header_of_nibabel(template: Any, like: Volume) -> Any:
    import nibabel

    nifti1: Any = nibabel.Nifti1Header
    if isinstance(template, PlainHeader):
        return nifti1(template.binaryblock)
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
