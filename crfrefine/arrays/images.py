"""Images of nibabel and SimpleITK as arrays and a spacing: what `refine` takes besides plain arrays. Neither library is imported."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from crfrefine.arrays.arguments import given_spacing
from crfrefine.base.array_types import Array, Float64
from crfrefine.base.geometry import same_grid, spacing_of
from crfrefine.errors import GridMismatchError, InputError

ArrayOrImage = ArrayLike | Any
"""An array, or an image of nibabel or SimpleITK."""

_SAME_SPACING = 1e-3


@dataclass(frozen=True)
class _Opened:
    """An image, opened."""

    name: str  # of the argument
    library: str  # "nibabel" or "SimpleITK"
    values: Array  # (*grid), or (C, *grid) of several channels; axes as the library's own arrays have them, (x, y, z) or (z, y, x)
    affine: Float64  # (4, 4) from indices (x, y, z) to mm, in the library's own world
    shape: tuple[int, ...]  # voxels along x, y, z
    spacing: tuple[float, ...]  # mm, one per axis of the array's grid


def open_images(given: dict[str, Any], spacing: ArrayLike | None) -> tuple[dict[str, Any], ArrayLike | None]:
    """Return arrays for all images among the arguments, by name, and the caller's spacing or theirs; anything else unchanged.

    Raises:
        InputError: images of both libraries, whose arrays have opposite axes, or another spacing than the images have.
        GridMismatchError: images on different grids.
    """
    opened = []
    for name, value in given.items():
        if all(hasattr(value, attribute) for attribute in ("dataobj", "header", "affine")):
            opened.append(_of_nibabel(value, name))
        elif type(value).__module__.partition(".")[0] == "SimpleITK" and type(value).__name__ == "Image":
            opened.append(_of_simple_itk(value, name))
    if not opened:
        return given, spacing
    first = opened[0]
    for other in opened[1:]:
        if other.library != first.library:
            raise InputError(
                f"{first.name} is an image of {first.library} and {other.name} one of {other.library}; the axes of their arrays are in "
                "opposite order: give images of one library"
            )
        if not same_grid(first.shape, first.affine, other.shape, other.affine):
            raise GridMismatchError(
                f"{first.name} and {other.name} are on different grids: {first.shape} voxels {_shown(first.spacing)} mm apart and "
                f"{other.shape} voxels {_shown(other.spacing)} mm apart, or elsewhere in the world; resample one of them, as "
                "`crfrefine infer --resample` does"
            )
    if spacing is not None and not np.allclose(given_spacing(spacing, len(first.spacing)), first.spacing, rtol=_SAME_SPACING, atol=0.0):
        raise InputError(f"spacing is {spacing!s}, but that of {first.name} is {_shown(first.spacing)}; leave spacing out, or give arrays")
    return given | {found.name: found.values for found in opened}, first.spacing if spacing is None else spacing


def _of_nibabel(image: Any, name: str) -> _Opened:
    values = np.asanyarray(image.dataobj)
    if values.ndim == 5 and values.shape[3] == 1:
        values = values[:, :, :, 0]
    num_axes = min(values.ndim, 3)
    if values.ndim > 4 or image.affine is None:
        kind = type(image).__name__
        raise InputError(f"{name} is a nibabel {kind} of shape {values.shape}; expected a volume (x, y, z) or (x, y, z, channel)")
    affine = np.array(image.affine, np.float64)
    if hasattr(image.header, "get_xyzt_units"):
        from crfrefine.io.nifti import MM_PER_UNIT

        affine[:3] *= MM_PER_UNIT.get(int(image.header["xyzt_units"]) & 7, 1.0)
    spacing = spacing_of(affine, num_axes)  # As the commands do: pixdim may say something else.
    shape = values.shape[:num_axes]
    return _Opened(name, "nibabel", np.moveaxis(values, 3, 0) if values.ndim == 4 else values, affine, shape, spacing)


def _of_simple_itk(image: Any, name: str) -> _Opened:
    if image.GetPixelIDTypeAsString().startswith("label"):  # SimpleITK ends the process.
        raise InputError(f"{name} is a label map object of SimpleITK; give SimpleITK.Cast({name}, SimpleITK.sitkUInt8)")
    values = sys.modules["SimpleITK"].GetArrayFromImage(image)
    num_axes, dimension = min(image.GetDimension(), 3), image.GetDimension()
    if image.GetNumberOfComponentsPerPixel() > 1:
        values = np.moveaxis(values, -1, 0)
    if values.ndim > num_axes + 1:
        raise InputError(f"{name} is a SimpleITK image of {dimension} axes with several components; expected a volume with or without them")
    spacing = image.GetSpacing()[:num_axes]
    affine = np.eye(4)
    affine[:num_axes, :num_axes] = np.reshape(image.GetDirection(), (dimension, dimension))[:num_axes, :num_axes] * spacing
    affine[:num_axes, 3] = image.GetOrigin()[:num_axes]
    return _Opened(name, "SimpleITK", values, affine, tuple(image.GetSize()[:num_axes]), tuple(spacing[::-1]))


def _shown(spacing: tuple[float, ...]) -> str:
    return " x ".join(f"{step:g}" for step in spacing)
