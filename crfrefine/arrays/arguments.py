"""The arrays, and images of nibabel and SimpleITK, that a caller passes to `refine`, as numpy's.

Errors name the argument.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from crfrefine.base.array_types import Array, Bool, Float64, Labels, Shape, Spacing
from crfrefine.base.geometry import SPACING_RANGE, same_grid, spacing_of
from crfrefine.base.limits import MAX_LABEL
from crfrefine.errors import GridMismatchError, InputError


def given_array(value: Any, name: str) -> Array:
    """Return a real numeric array without copying it; raise InputError for anything else.

    `name` is that of the argument, for the message.
    """
    kind = type(value).__name__
    library = _library_of(value)
    if isinstance(value, str | os.PathLike):
        raise InputError(
            f"{name} is a path ({str(value)[:200]!r}); expected an array. `crfrefine infer` reads "
            "files"
        )
    if library in ("nibabel", "SimpleITK"):
        raise InputError(
            f"{name} is a {library} {kind}; expected an array with the axes of the other arrays"
        )
    # The first use of np.ma imports it, which takes a twentieth of a small case's time.
    may_be_masked = type(value) is not np.ndarray and isinstance(value, np.ma.MaskedArray)
    if may_be_masked and np.ma.is_masked(value):
        raise InputError(
            f"{name} is a masked array, whose mask would be lost; give {name}.filled(0), and where "
            f"the model applies as mask=~np.ma.getmaskarray({name}), (*grid)"
        )
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        # PyTorch's errors are among these, and say what to do.
        raise InputError(
            f"{name} is a {kind} that numpy cannot take as an array: {error}"
        ) from error
    if array.dtype.kind not in "biuf":
        raise InputError(
            f"{name} has type {array.dtype}; expected an array of real numbers, such as float32"
        )
    return array


def _library_of(value: Any) -> str:
    """Return the name of the package that a value's type comes from."""
    return type(value).__module__.partition(".")[0]


# Advice where the shapes of arguments do not fit.
LAYOUT = (
    "\n  Of a batch, give each case by itself. If channels are the last axis, move them: "
    "np.moveaxis(logits, -1, 0). A label map (*grid) "
    'needs input_type="labels". The one channel of a sigmoid needs input_type="probabilities", '
    'before the sigmoid "logits", or regions={"structure": 1}.'
)


def check_logits(logits: Array, image: Array, input_type: str, *, are_regions: bool) -> None:
    """Raise InputError if logits are rather a label map, or do not fit the image.

    Args:
        logits: (L, *grid).
        image: (M, *grid) or (*grid).
        input_type: the caller's word: "auto", "logits" or "probabilities".
        are_regions: whether the channels are regions. A single channel is one of these, or label 1
            by the caller's word.
    """
    is_label_map = logits.ndim > 0 and logits.shape == image.shape and input_type != "logits"
    if is_label_map and input_type == "probabilities":
        is_label_map = logits.max(initial=0) > 1
    if logits.dtype.kind != "f" or (is_label_map and _holds_whole_numbers(logits)):
        raise InputError(
            f"logits have type {logits.dtype} and shape {logits.shape}, as a label map or a mask "
            "has; expected (labels, *grid), one channel per label, of floating-point numbers: "
            "convert scores with astype; for a label map (*grid), give "
            'input_type="labels"'
        )
    if logits.ndim < 2 or not logits.size:
        raise InputError(
            f"logits have shape {logits.shape}; expected (labels, *grid), and at least one voxel"
        )
    if len(logits) == 1 and input_type == "auto" and not are_regions:
        raise InputError(
            f"logits have 1 label; at least two are needed, the background among them{LAYOUT}"
        )
    grid = logits.shape[1:]
    has_modalities = image.shape[1:] == grid and len(image) > 0
    if image.shape != grid and not has_modalities:
        raise InputError(
            f"image has shape {image.shape}; expected (modalities, *grid) or (*grid) with the "
            f"logits' grid {grid}{LAYOUT}"
        )


def given_voxels(mask: Any, grid: Shape) -> Bool:
    """Return where a caller's mask is not zero, (*grid), for a grid of that shape: a new array.

    Raises InputError for other shapes and values that are not finite.
    """
    values = given_array(mask, "mask")
    if values.shape != grid:
        raise InputError(f"mask has shape {values.shape}; expected the grid {grid}")
    if not _is_finite(values):
        raise InputError(
            "the mask holds values that are not finite (NaN or infinity); expected zero outside "
            "and anything else inside"
        )
    return values.astype(np.bool_)


def given_label_map(labels: Array, image: Array) -> Labels:
    """Return a caller's label map, (*grid), unsigned, in its memory order.

    Raises InputError if it is not a label map, or does not fit the image.
    """
    fits_image = labels.shape in (image.shape, image.shape[1:])
    is_image_empty = labels.size > 0 and not image.size
    if labels.ndim < 1 or not fits_image or is_image_empty:
        raise InputError(
            f"the label map has shape {labels.shape} and the image {image.shape}; expected a label "
            "map (*grid), one label per voxel, and an image (modalities, *grid) or (*grid)"
        )
    if labels.size == 0:
        raise InputError(f"the grid {labels.shape} has no voxels")
    if not _is_finite(labels):
        raise InputError(
            "the label map holds values that are not finite (NaN or infinity); expected whole "
            "numbers from 0 up"
        )
    low = float(labels.min())  # float16 holds no number as large as MAX_LABEL.
    high = float(labels.max())
    if low < 0 or high > MAX_LABEL:
        raise InputError(
            f"the label map holds values from {low:g} to {high:g}; expected labels from 0 to "
            f"{MAX_LABEL}"
        )
    if labels.dtype.kind == "f" and not _holds_whole_numbers(labels):
        raise InputError(
            "the label map holds values that are not whole numbers; for logits or probabilities, "
            'leave input_type="labels" out'
        )
    return labels.astype(np.min_scalar_type(int(high)), order="K")


def _is_finite(values: Array) -> bool:
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())


def _holds_whole_numbers(values: Array) -> bool:
    """Return whether all values are whole numbers from 0 up."""
    for plane in values:  # The first one nearly always tells logits from labels.
        is_whole = (plane >= 0) & (plane == np.floor(plane))
        if not is_whole.all():
            return False
    return True


def given_spacing(spacing: ArrayLike, num_dims: int) -> Spacing:
    """Return the spacing as one number per axis.

    Raises InputError for anything but plausible distances.
    """
    try:
        steps = np.asarray(spacing, dtype=np.float64)
    except (TypeError, ValueError):
        steps = np.empty(0)
    low, high = SPACING_RANGE
    is_plausible = ((steps >= low) & (steps <= high)).all()  # False for NaN.
    if steps.shape not in ((), (num_dims,)) or not is_plausible:
        raise InputError(
            f"spacing is {spacing!s}; expected {num_dims} positive distances in mm (from {low:g} "
            f"to {high:g}; convert other units), one per grid axis, which is not that of a batch "
            "or of channels"
        )
    return tuple(np.broadcast_to(steps, (num_dims,)).tolist())


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
    if _library_of(value) == "SimpleITK" and type(value).__name__ == "Image":
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


def open_arguments(
    required: Mapping[str, Any], optional: Mapping[str, Any], spacing: ArrayLike | None
) -> tuple[dict[str, Array], ArrayLike | None]:
    """Return arrays by the name of the argument, and the caller's or the images' spacing.

    Optional arguments may be None, and have no array then.

    Raises:
        InputError: what `given_array` refuses, images of both libraries, whose arrays have opposite
            axes, or another spacing than the images have.
        GridMismatchError: images on different grids.
    """
    given = dict(required)
    for name, value in optional.items():
        if value is not None:
            given[name] = value
    opened = {}
    for name, value in given.items():
        kind = _kind_of_image(value)
        if kind is not None:
            opened[name] = kind(name, value)
    logits = opened.get("logits")
    image = opened.get("image")
    if isinstance(logits, _NibabelImage) and isinstance(image, _NibabelImage):
        logits.move_channels(image)
    if opened:
        first, *others = opened.values()
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
    for name, opened_image in opened.items():
        given[name] = opened_image.values
    return {name: given_array(value, name) for name, value in given.items()}, spacing
