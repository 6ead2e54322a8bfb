"""NIfTI-1 and NIfTI-2, `.nii` and `.nii.gz`: headers through nibabel, voxels decoded here (nibabel would go through float64)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.errors import InputError, UnsupportedFormatError
from crfrefine.io.atomic import atomic_file
from crfrefine.io.geometry import require_usable
from crfrefine.io.streams import GZIP_MAGIC, LARGEST_RATIO, START_BYTES, finish, inflated, open_bytes, read_start, skip, write_gzip
from crfrefine.io.volume import VolumeHeader, is_sheared, spacing_of
from crfrefine.io.voxel_stream import VoxelStream

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.io.content import Content
    from crfrefine.io.volume import Volume

# Codes of the header's xyzt_units: meters, millimeters, micrometers; unknown ones are millimeters in practice.
MM_PER_UNIT = {1: 1000.0, 2: 1.0, 3: 0.001}

_quiet = logging.getLogger("crfrefine.io.nifti")
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False


def recognizes(start: bytes) -> bool:
    """Return whether it is a NIfTI-1 or NIfTI-2 header of a single file, in either byte order, compressed or not."""
    block = inflated(start) or start
    return block[344:348] == b"n+1\0" or block[4:8] == b"n+2\0"


def read_header(path: Path) -> VolumeHeader:
    """Read only the header; only the beginning of a compressed file is inflated.

    Raises:
        UnsupportedFormatError: not a NIfTI file, damaged, or an unsupported kind of voxel or layout.
    """
    container = _container(path)
    with open_bytes(path, container) as reader:
        block = reader.read(540)
    return _interpret(block, path, compressed=container == "gzip")


def _container(path: Path) -> str:
    """Return "gzip" or "raw": what the name says, unless the content says otherwise."""
    start = read_start(path, START_BYTES)
    if _is_named_gzip(path):
        return "raw" if not start.startswith(GZIP_MAGIC) and recognizes(start) else "gzip"
    return "gzip" if start.startswith(GZIP_MAGIC) else "raw"


def _is_named_gzip(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _interpret(block: bytes, path: Path, *, compressed: bool) -> VolumeHeader:
    header = _parse(block, path)
    grid_shape, num_channels = _layout(tuple(int(size) for size in header.get_data_shape()), path)
    dtype = _voxel_type(header, path)
    affine, notes = _geometry(header, path)
    require_usable(affine, len(grid_shape), path)
    _check_size(path, header, dtype, compressed=compressed)
    version = 2 if header["sizeof_hdr"] == 540 else 1
    misnamed = None
    if compressed != _is_named_gzip(path):
        misnamed = "the file is " + (
            "compressed, although its name does not say so" if compressed else "not compressed, although its name says so"
        )
    return VolumeHeader(
        path=path,
        format=f"NIfTI-{version}" + (", gzip" if compressed else ""),
        grid_shape=grid_shape,
        num_channels=num_channels,
        dtype=dtype.name,
        spacing=spacing_of(affine, len(grid_shape)),
        affine=affine,
        template=header,
        notes=notes,
        details=(("sform, qform", f"codes {int(header['sform_code'])}, {int(header['qform_code'])}"),),
        misnamed=misnamed,
    )


@contextmanager
def open_voxels(header: VolumeHeader) -> Iterator[VoxelStream]:
    """Open the file at its first voxel; one channel follows the other."""
    template: Any = header.template
    slope, intercept = _scaling(template)
    with open_bytes(header.path, _container(header.path)) as reader:
        skip(reader, _data_offset(template))
        finish_reading = partial(finish, reader)
        yield VoxelStream(reader, template.get_data_dtype(), header.path, finish_reading, slope=slope, intercept=intercept)


def voxel_files(path: Path) -> tuple[Path, ...]:
    """Return no files: the voxels follow the header."""
    return ()


def write(path: Path, content: Content, like: Volume, *, kind: str, voxels: Path | None, threads: int) -> None:
    """Write voxels with the geometry of another volume.

    Args:
        path: ends in .nii or .nii.gz.
        content: voxels; channels get the fourth dimension of the file.
        like: its geometry is kept bit for bit if it came from a NIfTI file: both transforms with their codes, and the units.
        kind: what the voxels are; not stored in the file.
        voxels: none, they follow the header.
        threads: for compression.
    """
    num_axes = len(like.spacing)
    shape = content.shape[::-1]
    if content.num_channels is not None:
        shape = shape[:-1] + (1,) * (3 - num_axes) + shape[-1:]
    header = _header_like(like)
    header.set_data_shape(shape)
    header.set_data_dtype(content.dtype)
    header["scl_slope"], header["scl_inter"] = 1.0, 0.0
    header["cal_min"], header["cal_max"] = 0.0, 0.0
    header["intent_code"], header["intent_name"] = 0, b""
    header["intent_p1"], header["intent_p2"], header["intent_p3"] = 0.0, 0.0, 0.0
    header["descrip"], header["aux_file"] = b"crfrefine", b""
    header["magic"] = header.single_magic
    header["vox_offset"] = header.single_vox_offset
    with atomic_file(path) as file:
        parts = _parts(header, content)
        if _is_named_gzip(path):
            write_gzip(file, parts, threads)
        else:
            file.writelines(parts)


def _nibabel() -> Any:
    """Import nibabel: this takes a twentieth of a second, and its headers have no types."""
    import nibabel

    return nibabel


def _parse(block: bytes, path: Path) -> Any:
    nibabel = _nibabel()

    if not block:
        raise UnsupportedFormatError(f"{path}: the file is empty")
    size = {int.from_bytes(block[:4], "little"), int.from_bytes(block[:4], "big")}
    kind = nibabel.Nifti1Header if 348 in size else nibabel.Nifti2Header if 540 in size else None
    if kind is None:
        raise UnsupportedFormatError(f"{path}: not a NIfTI file, although its name says so: it begins with {block[:12]!r}")
    length = 348 if kind is nibabel.Nifti1Header else 540
    if len(block) < length:
        raise UnsupportedFormatError(f"{path}: the file is cut off within its header ({len(block)} of {length} bytes)")
    try:
        header = kind(block[:length], check=False)
        if header["magic"].item() != kind.single_magic:
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


def _check_size(path: Path, header: Any, dtype: np.dtype[Any], *, compressed: bool) -> None:
    needed = _data_offset(header) + math.prod(int(size) for size in header.get_data_shape()) * dtype.itemsize
    size = path.stat().st_size
    if size * (LARGEST_RATIO if compressed else 1) < needed:
        raise UnsupportedFormatError(
            f"{path}: the file is cut off: its header promises {needed} bytes, it holds {size}"
            + (" compressed ones" if compressed else "")
            + "; copy or export it again"
        )


def _data_offset(header: Any) -> int:
    return int(header["vox_offset"]) or int(header.single_vox_offset)


def _scaling(header: Any) -> tuple[float, float]:
    slope, intercept = header.get_slope_inter()
    return (1.0, 0.0) if slope is None else (float(slope), float(intercept or 0.0))


def _geometry(header: Any, path: Path) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Return the affine in mm as nibabel chooses it (sform, else qform, else only the voxel size), and notes about it."""
    try:
        affine = np.asarray(header.get_best_affine(), np.float64)
        qform, sform = header.get_qform(coded=True)[0], header.get_sform(coded=True)[0]
    except ValueError as error:
        raise InputError(f"{path}: the geometry in the header is not usable: {error}; repair the header") from None
    affine[:3] *= MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
    if qform is None and sform is None:
        return affine, ("no orientation in the header (sform and qform codes are 0)",)
    if qform is None or sform is None or np.allclose(qform, sform, atol=1e-3 * min(spacing_of(sform))):
        return affine, ()
    return affine, ("sform and qform differ; the sform is used, and both are kept in output files",)


def _header_like(like: Volume) -> Any:
    nifti1_header = _nibabel().Nifti1Header
    template = like.header.template if like.header is not None else None
    if isinstance(template, nifti1_header):
        # Always little-endian: the same values, and every reader accepts them.
        return template.as_byteswapped("<")
    header = nifti1_header()
    # The quaternion of a qform cannot hold a shear; nibabel would drop it silently.
    if not is_sheared(like.affine):
        header.set_qform(like.affine, code=1)
    header.set_sform(like.affine, code=1)
    header.set_xyzt_units("mm")
    return header


def _parts(header: Any, content: Content) -> Iterator[bytes | memoryview]:
    yield header.binaryblock + bytes(int(header["vox_offset"]) - len(header.binaryblock))
    yield from content.one_after_the_other()
