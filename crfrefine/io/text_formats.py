"""MetaImage (.mhd, .mha) and NRRD (.nrrd, .nhdr): a text header, then voxels. Every byte of them is read by code of this folder.

ITK's libraries crash on damaged headers, and give damaged voxels back without an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.errors import CrfRefineError, UnsupportedFormatError
from crfrefine.io import metaimage, metaimage_header, nrrd, nrrd_header
from crfrefine.io.geometry import require_usable
from crfrefine.io.paths import METAIMAGE, suffix_of
from crfrefine.io.source import VoxelSource
from crfrefine.io.volume import VolumeHeader, is_sheared, spacing_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.io.volume import Volume
    from crfrefine.io.world import TextHeader


@dataclass(frozen=True)
class TextTemplate:
    """What the text of a header says beyond the grid.

    Attributes:
        family: "metaimage" or "nrrd".
        geometry: the lines that place its grid in the world, as they stand in the file.
        source: where its voxels are.
    """

    family: str
    geometry: tuple[str, ...]
    source: VoxelSource


def read_header(path: Path) -> VolumeHeader:
    """Read the header alone.

    Raises:
        UnsupportedFormatError: not such a file, damaged, cut off, or a layout that has no meaning here.
        InputError: the file with the voxels is missing, or the geometry is not usable.
    """
    header = _parse(path)
    header.source.check()
    num_axes = len(header.grid_shape)
    require_usable(header.affine, num_axes, path)
    return VolumeHeader(
        path=path,
        format="MetaImage" if header.family == "metaimage" else "NRRD",
        grid_shape=header.grid_shape,
        num_channels=header.num_channels,
        dtype=header.source.dtype.name,
        spacing=spacing_of(header.affine, num_axes),
        affine=header.affine,
        template=TextTemplate(header.family, header.geometry, header.source),
    )


def detached_voxels(path: Path) -> tuple[Path, ...]:
    """Return the files of their own that the voxels of a header are in; none where they have none, or the header does not tell."""
    try:
        return _parse(path).source.detached
    except CrfRefineError:
        return ()  # Reading the file says what is wrong with it.


def read_into(header: VolumeHeader, values: NDArray[np.float32]) -> None:
    """Read the voxels into an array of shape (channels, [z,] y, x).

    Raises:
        UnsupportedFormatError: the file is damaged or cut off.
        InputError: a value is NaN or infinite.
    """
    source: VoxelSource = header.template.source
    source.read_into(values)


def write(path: Path, values: NDArray[Any], like: Volume, *, threads: int = 1) -> None:
    """Write voxels with the geometry of another volume.

    Args:
        path: ends in .mhd, .mha, .nrrd or .nhdr.
        values: ([z,] y, x), or (channels, [z,] y, x); uint8, uint16 or float32.
        like: the lines of its header that place the grid are kept as they are if it came from a file of the same format.
        threads: for compression, where the format allows more than one.

    Raises:
        UnsupportedFormatError: the axes are sheared, which these formats cannot hold or ITK does not take.
    """
    num_axes = len(like.spacing)
    if values.ndim > num_axes:
        values = np.moveaxis(values, 0, -1)
    is_meta = suffix_of(path) in METAIMAGE
    template = like.header.template if like.header is not None else None
    lines: tuple[str, ...] = ()
    if isinstance(template, TextTemplate) and template.family == ("metaimage" if is_meta else "nrrd"):
        lines = template.geometry
    if not lines:
        lines = (metaimage if is_meta else nrrd).geometry_lines(*_world_lps(path, like))
    if is_meta:
        metaimage.write(path, values, num_axes, lines)
    else:
        nrrd.write(path, values, num_axes, lines, threads=threads)


def _parse(path: Path) -> TextHeader:
    return metaimage_header.read(path) if suffix_of(path) in METAIMAGE else nrrd_header.read(path)


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
