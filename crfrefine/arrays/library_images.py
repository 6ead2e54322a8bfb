"""The arrays, and images of nibabel and SimpleITK, that a caller passes to `refine`, as numpy's."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from crfrefine.arrays.arguments import given_array, given_spacing, library_of
from crfrefine.base.array_types import Array, Float64, Shape, Spacing
from crfrefine.base.geometry import same_grid, spacing_of
from crfrefine.errors import GridMismatchError, InputError

ArrayOrImage = ArrayLike | Any  # an array, or an image of nibabel or SimpleITK
_SAME_SPACING = 1e-3


class _LibraryImage:
    """An image of a library, with its array and its grid."""

    library: ClassVar[str]
    name: str  # of the argument
    # (*grid), or (C, *grid) of several channels; axes as the library's own arrays have them,
    # (x, y, z) or (z, y, x)
    values: Array
    affine: Float64  # (4, 4) from indices (x, y, z) to mm, in the library's own world
    shape: Shape  # voxels along x, y, z
    spacing: Spacing  # mm, one per axis of the array's grid

    @property
    def grid(self) -> str:
        """The grid for messages, in the order of the array's axes."""
        shape = self.values.shape[-len(self.spacing) :]
        steps = " x ".join(f"{step:g}" for step in self.spacing)
        return f"{shape} voxels {steps} mm apart"


class _NibabelImage(_LibraryImage):
    library = "nibabel"

    def __init__(self, name: str, image: Any) -> None:
        """Open an image; raise InputError unless it is a volume, of channels or not."""
        values = np.asanyarray(image.dataobj)
        if values.ndim == 5 and values.shape[3] == 1:
            values = values[:, :, :, 0]
        if values.ndim > 4 or image.affine is None:
            kind = type(image).__name__
            raise InputError(
                f"{name} is a nibabel {kind} of shape {values.shape}; expected a volume (x, y, z) "
                "or (x, y, z, channel)"
            )
        self.name = name
        self.shape = values.shape[:3]
        if values.ndim == 4:
            values = np.moveaxis(values, 3, 0)
        self.values = values
        self.affine = np.array(image.affine, np.float64)
        if hasattr(image.header, "get_xyzt_units"):
            from crfrefine.io.nifti import MM_PER_UNIT

            self.affine[:3] *= MM_PER_UNIT.get(int(image.header["xyzt_units"]) & 7, 1.0)
        # The commands take the spacing from the affine, too: pixdim may say something else.
        self.spacing = spacing_of(self.affine, len(self.shape))

    def move_channels(self, plane: _LibraryImage) -> None:
        """Give logits (x, y[, 1], label) over a plane its grid, and channels first."""
        if (*plane.shape, 1)[2] > 1 or self.shape[:2] != plane.shape[:2]:
            return
        values = self.values
        if values.ndim == 3 and values.shape[2] > 1:
            values = np.moveaxis(values, 2, 0)
        elif values.ndim < 4:  # a label map
            return
        self.values = values.reshape(len(values), *plane.shape)
        self.shape = plane.shape
        self.spacing = plane.spacing


class _SimpleItkImage(_LibraryImage):
    library = "SimpleITK"

    def __init__(self, name: str, image: Any) -> None:
        """Open an image; raise InputError unless it is a volume, of channels or not."""
        if image.GetPixelIDTypeAsString().startswith("label"):  # SimpleITK would end the process.
            raise InputError(
                f"{name} is a label map object of SimpleITK; give SimpleITK.Cast({name}, "
                "SimpleITK.sitkUInt8)"
            )
        values = sys.modules["SimpleITK"].GetArrayFromImage(image)
        dimension = image.GetDimension()
        num_axes = min(dimension, 3)
        if image.GetNumberOfComponentsPerPixel() > 1:
            values = np.moveaxis(values, -1, 0)
        if values.ndim > num_axes + 1:
            raise InputError(
                f"{name} is a SimpleITK image of {dimension} axes with several components; "
                "expected a volume with or without them"
            )
        self.name = name
        self.values = values
        self.shape = tuple(image.GetSize()[:num_axes])
        spacing = image.GetSpacing()[:num_axes]
        self.spacing = tuple(spacing[::-1])
        directions = np.reshape(image.GetDirection(), (dimension, dimension))
        self.affine = np.eye(4)
        self.affine[:num_axes, :num_axes] = directions[:num_axes, :num_axes] * spacing
        self.affine[:num_axes, 3] = image.GetOrigin()[:num_axes]


def _kind_of_image(value: Any) -> type[_NibabelImage | _SimpleItkImage] | None:
    """Return the class for an image of a library; None for anything else."""
    if all(hasattr(value, attribute) for attribute in ("dataobj", "header", "affine")):
        return _NibabelImage
    if library_of(value) == "SimpleITK" and type(value).__name__ == "Image":
        return _SimpleItkImage
    return None


def copied(value: Any, name: str) -> Any:
    """Return a copy of an array in its memory order, or of an image; None stays None.

    Later changes of the caller's object then have no effect. Raises the errors of `given_array`.
    """
    if value is None:
        return None
    if _kind_of_image(value) is not None:
        return copy.deepcopy(value)
    return given_array(value, name).copy(order="K")


def open_arrays(
    required: Mapping[str, Any], optional: Mapping[str, Any], spacing: ArrayLike | None
) -> tuple[dict[str, Array], ArrayLike | None]:
    """Return arrays by the name of the argument, and the caller's or the images' spacing.

    Optional arguments may be None, and have no array then.

    Raises:
        InputError: what `given_array` refuses, images of both libraries, whose arrays have opposite
            axes, or another spacing than the images have.
        GridMismatchError: images on different grids.
    """
    values = dict(required)
    for name, value in optional.items():
        if value is not None:
            values[name] = value
    images = {}
    for name, value in values.items():
        kind = _kind_of_image(value)
        if kind is not None:
            images[name] = kind(name, value)
    logits = images.get("logits")
    image = images.get("image")
    if isinstance(logits, _NibabelImage) and isinstance(image, _NibabelImage):
        logits.move_channels(image)
    if images:
        first, *others = images.values()
        for other in others:
            if other.library != first.library:
                raise InputError(
                    f"{first.name} is an image of {first.library} and {other.name} one of "
                    f"{other.library}; the axes of their arrays are in opposite order: give images "
                    "of one library"
                )
            if not same_grid(first.shape, first.affine, other.shape, other.affine):
                raise GridMismatchError(
                    f"{first.name} and {other.name} are on different grids: {first.grid} and "
                    f"{other.grid}, or elsewhere in the world; resample one of them, as "
                    "`crfrefine infer --resample` does"
                )
        if spacing is None:
            spacing = first.spacing
        else:
            steps = given_spacing(spacing, len(first.spacing))
            if not np.allclose(steps, first.spacing, rtol=_SAME_SPACING, atol=0.0):
                raise InputError(
                    f"spacing is {spacing!s}, but {first.name} has {first.grid}; leave spacing "
                    "out, or give arrays"
                )
    for name, opened in images.items():
        values[name] = opened.values
    return {name: given_array(value, name) for name, value in values.items()}, spacing
