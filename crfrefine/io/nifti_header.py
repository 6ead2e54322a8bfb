"""Headers of NIfTI and Analyze, read and written by nibabel: grid, type and place of the voxels, which are read elsewhere."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.geometry import is_sheared, require_usable, spacing_of
from crfrefine.errors import InputError, UnsupportedFormatError
from crfrefine.io.source import VoxelSource
from crfrefine.io.volume import VolumeHeader

if TYPE_CHECKING:
    from crfrefine.io.content import Content
    from crfrefine.io.volume import Volume

LONGEST = 540
"""Bytes of the longer header, that of NIfTI-2."""

# Codes of the header's xyzt_units: meters, millimeters, micrometers; unknown ones are millimeters in practice.
_MM_PER_UNIT = {1: 1000.0, 2: 1.0, 3: 0.001}
_ANALYZE_NOTE = "Analyze 7.5 does not say which side is left: its axes are taken as nibabel does"

_quiet = logging.getLogger("crfrefine.io.nifti")
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False


def parse(block: bytes, path: Path, *, is_pair: bool = False) -> Any:
    """Return nibabel's header of the first LONGEST bytes of a file; the header of a pair may be Analyze's.

    Raises:
        UnsupportedFormatError: another header, damaged, or cut off.
    """
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
    """Return the content of a parsed header, after a check that the file with the voxels, "raw" or "gzip", is long enough.

    Raises:
        UnsupportedFormatError: an unsupported kind of voxel or layout, or the file is cut off.
        InputError: the geometry is not usable.
    """
    is_nifti = "magic" in header
    is_single = bool(getattr(header, "is_single", False))
    shape = tuple(int(size) for size in header.get_data_shape())
    grid_shape, num_channels = _layout(shape, path)
    dtype = header.get_data_dtype()
    _require_numbers(dtype, path)
    try:
        affine = np.array(header.get_best_affine(), np.float64)
        notes = _notes_on_transforms(header) if is_nifti else (_ANALYZE_NOTE,)
    except ValueError as error:
        raise InputError(f"{path}: the geometry in the header is not usable: {error}; repair the header") from None
    if is_nifti:
        affine[:3] *= mm_per_unit(header)
    else:
        affine += 0.0  # Adding zero turns -0 into 0.
    require_usable(affine, len(grid_shape), path)
    slope, intercept = header.get_slope_inter()
    source = VoxelSource(
        header_path=path,
        path=voxels,
        encoding=encoding,
        dtype=dtype,
        sizes=(*grid_shape, num_channels),
        inner=math.prod(grid_shape),
        offset=int(header["vox_offset"]) or (int(header.single_vox_offset) if is_single else 0),
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


def _require_numbers(dtype: np.dtype[Any], path: Path) -> None:
    """Raise UnsupportedFormatError for voxels that are not one real number each."""
    if dtype.fields is not None:
        raise UnsupportedFormatError(f"{path}: a color (RGB) image; expected one number per voxel, split it into channels first")
    if dtype.kind == "c":
        raise UnsupportedFormatError(f"{path}: complex voxels; expected real ones, export the magnitude")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise UnsupportedFormatError(f"{path}: voxels of type {dtype.name} are not supported; convert them to float32 or integers")


def _notes_on_transforms(header: Any) -> tuple[str, ...]:
    """Return the note for the user about sform and qform."""
    qform, sform = header.get_qform(coded=True)[0], header.get_sform(coded=True)[0]
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
    header = _geometry_header(like)
    header.set_data_shape(shape)
    header.set_data_dtype(content.dtype)
    header["scl_slope"], header["scl_inter"] = 1.0, 0.0
    header["cal_min"], header["cal_max"] = 0.0, 0.0
    header["intent_code"], header["intent_name"] = 0, b""
    header["intent_p1"], header["intent_p2"], header["intent_p3"] = 0.0, 0.0, 0.0
    header["descrip"], header["aux_file"] = b"crfrefine", b""
    header["magic"] = header.pair_magic if is_pair else header.single_magic
    header["vox_offset"] = 0 if is_pair else header.single_vox_offset + len(extension)
    block: bytes = header.binaryblock
    return block + bytes((bool(extension), 0, 0, 0)) + extension


def _geometry_header(like: Volume) -> Any:
    """Return a little-endian copy of the volume's own NIfTI header, or a new NIfTI-1 header with its geometry."""
    import nibabel

    template: Any = like.header.template if like.header is not None else None
    nifti1: Any = nibabel.Nifti1Header
    if isinstance(template, nifti1):
        return template.as_byteswapped("<")
    header = nifti1()
    # The quaternion of a qform cannot hold a shear; nibabel would drop it silently.
    if not is_sheared(like.affine):
        header.set_qform(like.affine, code=1)
    header.set_sform(like.affine, code=1)
    header.set_xyzt_units("mm")
    return header
