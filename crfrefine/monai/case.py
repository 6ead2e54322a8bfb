"""Take one case apart for `refine`: arrays, and grids and spacing from the metadata of MetaTensors, with checks that name the files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils.enums import MetaKeys

from crfrefine.base.geometry import describe_difference, same_grid, spacing_of
from crfrefine.base.text import MAX_OF_A_PATH, shorten, shorten_value
from crfrefine.errors import GridMismatchError, InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FILE = "filename_or_obj"
_MAX_AXES = 3
"""Axes that an affine of MONAI places in the world."""


def file_of(*values: Any) -> str | None:
    """Return the file that the first MetaTensor with such an entry was read from; None if unknown."""
    for value in values:
        name = value.meta.get(_FILE) if isinstance(value, MetaTensor) else None
        if isinstance(name, str) and name:
            return shorten(name, MAX_OF_A_PATH)
    return None


def check_kind(*values: Any) -> None:
    """Raise InputError unless all values are tensors or arrays, or None."""
    for value in values:
        if value is not None and not isinstance(value, torch.Tensor | np.ndarray):
            raise InputError(f"expected tensors or arrays, got {shorten_value(value)}; LoadImage reads files")


def is_batch_of(logits: Any, image: Any, spacing: float | Sequence[float] | None) -> bool:
    """Return whether logits are a batch (B, L, *grid) and not one case (L, *grid).

    The number of distances decides, else the metadata, else, with one distance for all axes, the shapes.

    Raises:
        InputError: nothing decides, or it does not fit the shape.
    """
    if isinstance(spacing, Sequence):
        if logits.ndim - len(spacing) not in (1, 2):
            raise InputError(
                f"logits have shape {tuple(logits.shape)}, but spacing has {len(spacing)} distances; expected one per axis of the grid, "
                "and logits (labels, *grid), or (batch, labels, *grid)"
            )
        return bool(logits.ndim - len(spacing) == 2)
    known = next((value for value in (logits, image) if isinstance(value, MetaTensor)), None)
    if known is not None:
        return bool(known.is_batch)
    if spacing is None:
        raise InputError(f"the spacing is unknown: {_no_place('the image', image)}; {_ADVICE}")
    return _is_batch_by_shape(tuple(logits.shape), tuple(image.shape))


def _is_batch_by_shape(logits: tuple[int, ...], image: tuple[int, ...]) -> bool:
    """Return whether shapes are those of a batch; where they may be either, a grid has at most three axes."""
    may_be_batch = len(logits) > 2 and logits[:1] + logits[2:] == image[:1] + image[2:]
    if len(logits) == _MAX_AXES + 1 and may_be_batch and logits == image:
        raise InputError(
            f"logits and image both have shape {logits}: of one case in 3-D, or of a batch in 2-D? Give spacing as one distance per axis "
            "of the grid, which tells"
        )
    return may_be_batch and (logits[1:] != image[1:] or len(logits) > _MAX_AXES + 1)


def case_spacing(logits: Any, image: Any, mask: Any | None, spacing: float | Sequence[float] | None) -> tuple[float, ...]:
    """Return the distance between neighboring voxels of one case in mm, one per axis, after checking that all are on one grid.

    Args:
        logits: (L, *grid).
        image: (M, *grid).
        mask: (1, *grid) or (*grid); None: everywhere.
        spacing: mm, one per axis or one for all, not that of the metadata; None means that of the affine of the image, or of the logits.

    Raises:
        GridMismatchError: the shapes or the affines differ.
        InputError: the spacing is unknown, or lazy operations are pending.
    """
    grid = tuple(logits.shape[1:])
    named = [("logits", logits, grid), ("image", image, tuple(image.shape[1:]))]
    if mask is not None:
        if mask.ndim > len(grid) and len(mask) != 1:
            raise InputError(f"the mask has shape {tuple(mask.shape)}; expected one channel, {(1, *grid)}")
        named.append(("mask", mask, tuple(mask.shape[mask.ndim > len(grid) :])))
    for name, value, _ in named:
        if isinstance(value, MetaTensor) and value.has_pending_operations:
            raise InputError(f"{_label(name, value)}: lazy operations are pending; apply them first, with ApplyPending or Compose")
    places = [affine_of(value) for _, value, _ in named]
    for (name, value, shape), place in zip(named[1:], places[1:], strict=True):
        _check_grid(("logits", logits, grid, places[0]), (name, value, shape, place))
    if spacing is not None:
        return tuple(spacing) if isinstance(spacing, Sequence) else (spacing,) * len(grid)
    known = next((place for place in (places[1], places[0]) if place is not None), None)
    if known is None:
        raise InputError(f"the spacing is unknown: {_no_place(_label('image', image), image)}, and neither have the logits one; {_ADVICE}")
    if not 1 <= len(grid) <= _MAX_AXES:
        raise InputError(f"{_label('logits', logits)}: shape {tuple(logits.shape)} on {len(grid)} axes; an affine has at most {_MAX_AXES}")
    return spacing_of(known, len(grid))


_ADVICE = "give spacing=(...), in mm, one per axis of the grid, or read files with LoadImage"


def affine_of(value: Any) -> NDArray[np.float64] | None:
    """Return the (4, 4) affine of a MetaTensor; None without one.

    MONAI gives the unit matrix to tensors without a place in the world. It counts only where a file is known, whose affine it then is.
    """
    if not isinstance(value, MetaTensor) or MetaKeys.AFFINE not in value.meta:
        return None
    given = np.asarray(torch.as_tensor(value.meta[MetaKeys.AFFINE]).cpu(), np.float64)
    if given.ndim != 2 or given.shape[0] != given.shape[1] or not 2 <= len(given) <= 4:
        raise InputError(f"{file_of(value) or 'a MetaTensor'}: an affine of shape {given.shape}; expected (4, 4)")
    is_default = np.array_equal(given, np.eye(len(given)))
    if is_default and file_of(value) is None and MetaKeys.ORIGINAL_AFFINE not in value.meta:
        return None
    affine = np.eye(4)
    axes = len(given) - 1
    affine[:axes, :axes], affine[:axes, 3] = given[:axes, :axes], given[:axes, axes]
    return affine


def to_numpy(value: Any) -> NDArray[Any]:
    """Return the values of a tensor on any device, or of an array; what numpy has no type for becomes float32."""
    if not isinstance(value, torch.Tensor):
        return value  # type: ignore[no-any-return] # `refine` refuses masked arrays
    plain = value.as_tensor() if isinstance(value, MetaTensor) else value
    plain = plain.detach().cpu()
    array: NDArray[Any] = (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
    return array


def _check_grid(one: tuple[str, Any, tuple[int, ...], Any], other: tuple[str, Any, tuple[int, ...], Any]) -> None:
    """Raise GridMismatchError if two tensors of a case, each with name, shape and affine, are on different grids."""
    (name, value, shape, affine), (other_name, other_value, other_shape, other_affine) = one, other
    are_placed = affine is not None and other_affine is not None and len(shape) <= _MAX_AXES
    if shape == other_shape and not (are_placed and not same_grid(shape, affine, other_shape, other_affine)):
        return
    both = (_label(name, value), shape, affine), (_label(other_name, other_value), other_shape, other_affine)
    lines = describe_difference(*both[0], *both[1])
    raise GridMismatchError(
        f"{name} and {other_name} are on different grids\n{lines}\n"
        "  Invert the spatial transforms of both (Invertd), or refine before they are inverted."
    )


def _label(name: str, value: Any) -> str:
    file = file_of(value)
    return name if file is None else f"{name} ({file})"


def _no_place(name: str, value: Any) -> str:
    """Say why a value has no affine."""
    if isinstance(value, MetaTensor):
        return f"{name} is a MetaTensor without an affine of its own"
    return f"{name} is a {type(value).__name__} without metadata"
