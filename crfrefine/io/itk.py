"""MetaImage (.mhd, .mha) and NRRD (.nrrd, .nhdr), whose world is LPS: SimpleITK says what a header means.

The voxels are read here where that can be: SimpleITK gives damaged compressed voxels back without an error.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.errors import UnsupportedFormatError
from crfrefine.io import metaimage, nrrd
from crfrefine.io.decode import require_finite
from crfrefine.io.geometry import require_usable
from crfrefine.io.paths import METAIMAGE, cannot_read, suffix_of
from crfrefine.io.source import VoxelSource
from crfrefine.volume import VolumeHeader, is_sheared, spacing_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.volume import Volume


@dataclass(frozen=True)
class ItkTemplate:
    """What the text of a header says.

    Attributes:
        family: "metaimage" or "nrrd".
        geometry: the lines that place its grid in the world, as they stand in the file.
        source: where its voxels are; None where only SimpleITK can tell.
    """

    family: str
    geometry: tuple[str, ...]
    source: VoxelSource | None


def read_header(path: Path) -> VolumeHeader:
    """Read the header alone.

    Raises:
        UnsupportedFormatError: not such a file, damaged, cut off, or a layout that has no meaning here.
        InputError: the file with the voxels is missing, or the geometry is not usable.
    """
    is_meta = suffix_of(path) in METAIMAGE
    module = metaimage if is_meta else nrrd
    try:
        fields = module.parse(path)
        if is_meta:
            metaimage.check_slices(path, fields)
    except OSError as error:
        raise cannot_read(path, error) from error
    # Before SimpleITK looks for voxels that are not there: it would say so in C++, on standard error.
    source = module.voxel_source(path, fields)
    if source is not None:
        source.check(path)
    reader = _reader(path)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _damaged(path, error) from None
    grid_shape, num_channels = _layout(reader, path)
    if source is not None and math.prod(source.sizes) != num_channels * math.prod(grid_shape):
        source = None  # SimpleITK understands the header otherwise: let it read the voxels as well.
    num_axes = len(grid_shape)
    affine = _affine(reader, num_axes)
    require_usable(affine, num_axes, path)
    return VolumeHeader(
        path=path,
        format="MetaImage" if is_meta else "NRRD",
        grid_shape=grid_shape,
        num_channels=num_channels,
        dtype=_voxel_type(reader, path),
        spacing=spacing_of(affine, num_axes),
        affine=affine,
        template=ItkTemplate("metaimage" if is_meta else "nrrd", module.geometry(fields, num_axes), source),
    )


def detached_voxels(path: Path) -> Path | None:
    """Return the file of their own that the voxels of a header are in; None where they have none, or the header does not tell."""
    module = metaimage if suffix_of(path) in METAIMAGE else nrrd
    try:
        source = module.voxel_source(path, module.parse(path))
    except (OSError, UnsupportedFormatError):
        return None  # Reading the file says what is wrong with it.
    return None if source is None or source.path == path else source.path


def read_into(header: VolumeHeader, values: NDArray[np.float32]) -> None:
    """Read the voxels into an array of shape (channels, [z,] y, x).

    Raises:
        UnsupportedFormatError: the file is damaged or cut off.
        InputError: a value is NaN or infinite.
    """
    source: VoxelSource | None = header.template.source
    if source is not None:
        source.read_into(values)
        return
    try:
        image = _reader(header.path).Execute()
    except RuntimeError as error:
        raise _damaged(header.path, error) from None
    stored = _simpleitk().GetArrayViewFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        stored = np.moveaxis(stored, -1, 0)
    with np.errstate(over="ignore"):
        values[...] = stored.reshape(values.shape) if values.shape[0] == 1 else stored
    require_finite(values, header.path)


def write(path: Path, values: NDArray[Any], like: Volume, *, threads: int = 1) -> None:
    """Write voxels with the geometry of another volume.

    Args:
        path: ends in .mhd, .mha, .nrrd or .nhdr.
        values: ([z,] y, x), or (channels, [z,] y, x); uint8, uint16 or float32.
        like: the lines of its header that place the grid are kept as they are if it came from a file of the same format.
        threads: for compression, where the format allows more than one.

    Raises:
        UnsupportedFormatError: the axes are sheared, which these formats cannot hold or SimpleITK does not take.
    """
    num_axes = len(like.spacing)
    if values.ndim > num_axes:
        values = np.moveaxis(values, 0, -1)
    is_meta = suffix_of(path) in METAIMAGE
    template = like.header.template if like.header is not None else None
    lines: tuple[str, ...] = ()
    if isinstance(template, ItkTemplate) and template.family == ("metaimage" if is_meta else "nrrd"):
        lines = template.geometry
    if not lines:
        lines = (metaimage if is_meta else nrrd).geometry_lines(*_world_lps(path, like))
    if is_meta:
        metaimage.write(path, values, num_axes, lines)
    else:
        nrrd.write(path, values, num_axes, lines, threads=threads)


def _world_lps(path: Path, like: Volume) -> tuple[NDArray[np.float64], NDArray[np.float64], tuple[float, ...]]:
    """Return (direction, origin, spacing) in LPS, one column of the direction a grid axis."""
    if is_sheared(like.affine):
        raise UnsupportedFormatError(
            f"{path}: this format cannot hold the sheared axes of {like.path or 'the volume'}; write NIfTI (.nii.gz) instead"
        )
    num_axes = len(like.spacing)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ like.affine + 0.0  # Adding zero turns -0 into 0.
    spacing = spacing_of(like.affine, num_axes)
    return lps[:num_axes, :num_axes] / np.array(spacing), lps[:num_axes, 3], spacing


def _simpleitk() -> Any:
    """Import SimpleITK, which takes a tenth of a second and has no types."""
    import SimpleITK

    return SimpleITK


def _reader(path: Path) -> Any:
    reader = _simpleitk().ImageFileReader()
    reader.SetFileName(os.fspath(path))
    reader.SetImageIO("MetaImageIO" if suffix_of(path) in METAIMAGE else "NrrdImageIO")
    return reader


def _damaged(path: Path, error: RuntimeError) -> UnsupportedFormatError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return UnsupportedFormatError(f"{path}: SimpleITK cannot read it; damaged or cut off?\n  {lines[-1]}")


def _layout(reader: Any, path: Path) -> tuple[tuple[int, ...], int]:
    size = tuple(int(n) for n in reader.GetSize())
    components = int(reader.GetNumberOfComponents())
    if len(size) <= 3:
        return size, components
    if len(size) > 4 or components > 1:
        raise UnsupportedFormatError(
            f"{path}: {len(size)} dimensions with {components} values a voxel cannot be told into grid and channels"
        )
    return size[:3], size[3]


def _affine(reader: Any, num_axes: int) -> NDArray[np.float64]:
    num_dims = int(reader.GetDimension())
    direction = np.array(reader.GetDirection()).reshape(num_dims, num_dims)[:num_axes, :num_axes]
    affine = np.eye(4)
    affine[:num_axes, :num_axes] = direction * np.array(reader.GetSpacing()[:num_axes])
    affine[:num_axes, 3] = reader.GetOrigin()[:num_axes]
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine + 0.0


def _voxel_type(reader: Any, path: Path) -> str:
    name = str(_simpleitk().GetPixelIDValueAsString(reader.GetPixelID()))
    if "complex" in name:
        raise UnsupportedFormatError(f"{path}: complex voxels; expected real ones, export the magnitude")
    bits = name.removeprefix("vector of ").split("-bit", 1)[0]
    kind = "float" if "float" in name else "uint" if "unsigned" in name else "int"
    return f"{kind}{bits}"
