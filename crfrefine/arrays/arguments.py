"""Convert arrays, and images of nibabel and SimpleITK, passed to `refine` to numpy; errors name the argument."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from crfrefine.base.array_types import Array, Bool, Float64, Labels
from crfrefine.base.geometry import SPACING_RANGE, is_plausible, same_grid, spacing_of
from crfrefine.base.limits import MAX_LABEL
from crfrefine.errors import GridMismatchError, InputError

# What distances are taken, for messages.
BOUNDS = f"from {SPACING_RANGE[0]:g} to {SPACING_RANGE[1]:g}; convert other units"


def given_array(value: Any, name: str) -> Array:
    """Return a real numeric array without copying it; raise InputError for anything else, named for the message."""
    library = type(value).__module__.partition(".")[0]
    if isinstance(value, str | os.PathLike):
        raise InputError(f"{name} is a path ({str(value)[:200]!r}); expected an array. `crfrefine infer` reads files")
    if library in ("nibabel", "SimpleITK"):
        raise InputError(f"{name} is a {library} {type(value).__name__}; expected an array with the axes of the other arrays")
    # numpy imports numpy.ma when it is asked for; the time of that is a twentieth of a small case's.
    if type(value) is not np.ndarray and isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        own = f"~np.ma.getmaskarray({name})"
        advice = f", and where the model applies as mask={own}, (*grid); of an array with channels, mask={own}.any(0)"
        raise InputError(f"{name} is a masked array, whose mask would be lost; give {name}.filled(0){'' if name == 'mask' else advice}")
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        # PyTorch's message for tensors on a GPU, with a gradient, or of a type that numpy does not have.
        advice = f"; give {name}.detach().float().cpu()" if library == "torch" else ""
        raise InputError(f"{name} is a {type(value).__name__} that numpy cannot take as an array: {error}{advice}") from error
    if array.dtype.kind not in "biuf":
        advice = f"; give {name}.astype(np.float32)" if array.dtype.name == "bfloat16" else ""
        raise InputError(f"{name} has type {array.dtype}; expected an array of real numbers{advice}")
    return array


def check_logits(logits: Array, image: Array, input_type: str, *, min_channels: int) -> None:
    """Raise InputError if logits (L, *grid) are rather a label map, or do not fit an image, (M, *grid) or (*grid)."""
    expected = "logits are (labels, *grid), one channel per label, of floating-point numbers"
    advice = 'to refine a label map (*grid), give input_type="labels"'
    if logits.dtype.kind != "f":
        what = "a mask" if logits.dtype.kind == "b" else "a label map"
        raise InputError(
            f"logits have type {logits.dtype} and shape {logits.shape}, as {what} has; {expected}: convert scores with astype; {advice}"
        )
    are_surely_scores = input_type == "logits" or (input_type == "probabilities" and logits.max(initial=0) <= 1)
    if logits.shape == image.shape and not are_surely_scores and _holds_whole_numbers(logits):
        raise InputError(
            f"logits have the image's shape {logits.shape} and hold whole numbers from 0 up, as a label map does; {expected}; {advice}"
        )
    if logits.ndim < 2:
        raise InputError(f"logits have shape {logits.shape}; expected (labels, *grid)")
    grid = logits.shape[1:]
    if math.prod(logits.shape) == 0:
        raise InputError(f"logits have shape {logits.shape}, which has no voxels")
    shape = (1, *image.shape) if image.ndim == len(grid) else image.shape
    fits = shape[1:] == grid and shape[0] > 0
    if len(logits) < min_channels:
        # A grid has seldom more than three axes: a batch of one case is likelier.
        advice = _describe_layout(logits.shape, shape)
        if fits and logits.ndim <= 4 and _holds_whole_numbers(logits):
            advice = (
                "\n  They hold whole numbers from 0 up, as a label map does: give the label map (*grid), logits[0], with "
                'input_type="labels" (crfrefine.monai takes its channel, too).'
            )
        elif fits and logits.ndim <= 4:
            is_probability = logits.min() >= 0 and logits.max() <= 1
            more = ' and input_type="probabilities".' if is_probability else "."
            advice = f'\n  For the one channel of a sigmoid, give regions={{"structure": 1}}{more}'
        raise InputError(f"logits have 1 label; at least two are needed, the background among them{advice}")
    if not fits:
        raise InputError(
            f"image has shape {shape}; expected (modalities, *grid) or (*grid) with the logits' grid {grid}"
            + _describe_layout(logits.shape, shape)
        )


def _describe_layout(logits: tuple[int, ...], image: tuple[int, ...]) -> str:
    """Return what to give for a batch, or for channels that are the last axis; nothing if shapes look like neither."""
    if len(logits) > 2 and logits[2:] == image[len(image) - len(logits) + 2 :]:
        return (
            "\n  If the first axis is that of a batch, give each of its cases by itself: refine(logits[i], ...) with the image of that "
            "case, (modalities, *grid) or (*grid)."
        )
    if logits[:-1] in (image, image[1:], image[:-1]):
        of_image = ", and np.moveaxis(image, -1, 0)" if logits[:-1] == image[:-1] else ""
        return f"\n  If the last axis of the logits is that of the labels, give np.moveaxis(logits, -1, 0){of_image}."
    return ""


def given_voxels(mask: Any, grid: tuple[int, ...]) -> Bool:
    """Return where a caller's mask is not zero, (*grid) for a grid of that shape; raise InputError for other shapes and infinite values."""
    values = given_array(mask, "mask")
    if values.shape != grid:
        raise InputError(f"mask has shape {values.shape}; expected the grid {grid}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise InputError("the mask holds values that are not finite (NaN or infinity); expected zero outside and anything else inside")
    return values.astype(np.bool_, copy=False)


def given_label_map(labels: Array, image: Array) -> Labels:
    """Return a caller's label map, (*grid), unsigned, in its memory order; raise InputError if it is not a label map."""
    if labels.ndim < 1 or labels.shape not in (image.shape, image.shape[1:]) or (labels.size and not image.size):
        raise InputError(
            f"the label map has shape {labels.shape} and the image {image.shape}; expected a label map (*grid), one label per voxel, and "
            "an image (modalities, *grid) or (*grid)"
        )
    if labels.size == 0:
        raise InputError(f"the grid {labels.shape} has no voxels")
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise InputError("the label map holds values that are not finite (NaN or infinity); expected whole numbers from 0 up")
    low, high = labels.min(), labels.max()
    if low < 0 or high > MAX_LABEL:
        raise InputError(f"the label map holds values from {low:g} to {high:g}; expected labels from 0 to {MAX_LABEL}")
    if labels.dtype.kind == "f" and not _holds_whole_numbers(labels):
        raise InputError(
            'the label map holds values that are not whole numbers; for logits or probabilities, leave input_type="labels" out'
        )
    return labels.astype(np.min_scalar_type(int(high)), order="K")


def _holds_whole_numbers(values: Array) -> bool:
    # The first plane nearly always tells logits from labels.
    return all(bool((plane >= 0).all() and (plane == np.floor(plane)).all()) for plane in values)


def given_spacing(spacing: ArrayLike, num_dims: int) -> tuple[float, ...]:
    """Return the spacing as one number per axis; raise InputError for anything but plausible distances."""
    try:
        steps = np.asarray(spacing, dtype=np.float64)
    except (TypeError, ValueError):
        steps = np.empty(0)
    if steps.shape not in ((), (num_dims,)) or not is_plausible(steps.flat):
        is_batch = steps.size > 0 and steps.shape == (num_dims - 1,)
        raise InputError(
            f"spacing is {spacing!s}; expected {num_dims} positive distances in mm ({BOUNDS}), one per grid axis"
            + ("\n  If the first axis of the arrays is that of a batch, give each of its cases by itself." if is_batch else "")
        )
    return tuple(float(step) for step in np.broadcast_to(steps, (num_dims,)))


ArrayOrImage = ArrayLike | Any  # an array, or an image of nibabel or SimpleITK
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
