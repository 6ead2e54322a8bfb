"""What a caller passes to `refine`, opened once images are arrays: `open_arguments`.

Arrays are checked, and become a network's output, a mask and strokes. Errors name the argument.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from crfrefine.arrays.label_maps import channels_of, present_labels
from crfrefine.arrays.network import AUTO, ArrayNetwork, LabelMapNetwork
from crfrefine.arrays.region_scheme import GivenRegions, RegionScheme
from crfrefine.arrays.strokes import Strokes
from crfrefine.base.array_types import Array, Bool, Labels, Shape, Spacing
from crfrefine.base.geometry import SPACING_RANGE
from crfrefine.base.limits import MAX_LABEL, MAX_LABELS
from crfrefine.base.notices import assumed_spacing
from crfrefine.errors import ConfigError, InputError
from crfrefine.parameters.model import CrfParameters


def given_array(value: Any, name: str) -> Array:
    """Return a real numeric array without copying it; raise InputError for anything else.

    `name` is that of the argument, for the message.
    """
    kind = type(value).__name__
    library = library_of(value)
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


def library_of(value: Any) -> str:
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


def given_network_spacing(given: ArrayLike | None, num_dims: int) -> Spacing | str | None:
    """Return mm between voxels of a network as one number per axis; AUTO and None stay.

    Raises the error of `given_spacing`.
    """
    if given is None or (isinstance(given, str) and given == AUTO):
        return given
    try:
        return given_spacing(given, num_dims)
    except InputError as error:
        raise InputError(f"network {error}") from None


def _label_map_network(
    labels: Labels, parameters: CrfParameters, network_spacing: Spacing | str | None
) -> LabelMapNetwork:
    """Return a label map with as many labels as the parameters have values for."""
    channels = channels_of(present_labels(labels))
    num_labels = parameters.num_labels or channels[-1] + 1
    if channels[-1] >= num_labels:
        raise InputError(
            f"the label map holds labels up to {channels[-1]}, but the parameters have values "
            f"for {num_labels} labels; give parameters for all labels, or merge labels"
        )
    return LabelMapNetwork(labels, channels, num_labels, network_spacing)


def open_arguments(
    arrays: Mapping[str, Array],
    *,
    spacing: ArrayLike | None,
    input_type: str,
    network_spacing: ArrayLike | str | None,
    regions: GivenRegions | None,
    parameters: CrfParameters,
) -> tuple[ArrayNetwork | LabelMapNetwork, Array, Spacing, Bool | None, Strokes | None]:
    """Return the network's output, the image, its spacing, the mask, and the strokes of a case.

    Arguments and errors are those of `crfrefine.refine`, the arrays by their names. Logits and
    image are not copied. The mask is (*grid), True where the model applies; None means everywhere.
    """
    values = arrays["logits"]
    image = arrays["image"]
    if input_type == "labels":
        if regions is not None:
            raise ConfigError(
                "regions: they are those of the channels of logits, and a label map has none; "
                "leave regions out"
            )
        values = given_label_map(values, image)
        grid = values.shape
        network_spacing = given_network_spacing(network_spacing, len(grid))
    else:
        if network_spacing is not None:
            raise ConfigError(
                f"network_spacing: it is that of a label map, and input_type is '{input_type}'; "
                "logits on a coarser grid are interpolated onto the image's before. For a label "
                "map, input_type='labels'"
            )
        check_logits(values, image, input_type, are_regions=regions is not None)
        grid = values.shape[1:]
    if spacing is None:
        rules = parameters.postprocess
        has_rules = rules.min_component_ml != 0.0 or rules.protect_min_ml != 0.0
        is_in_mm = has_rules or parameters.mean_field.positions != "voxels"
        spacing = assumed_spacing(matters=is_in_mm or network_spacing is not None)
    distances = given_spacing(spacing, len(grid))
    inside = None
    if "mask" in arrays:
        inside = given_voxels(arrays["mask"], grid)

    network: ArrayNetwork | LabelMapNetwork
    if input_type == "labels":
        network = _label_map_network(values, parameters, network_spacing)
        num_labels = parameters.num_labels or MAX_LABELS  # Strokes may draw further labels.
    else:
        scheme = None if regions is None else RegionScheme.of(regions)
        network = ArrayNetwork(values, input_type, scheme)
        num_labels = network.num_labels
    drawn = None
    if "strokes" in arrays:
        drawn = Strokes.of_array(arrays["strokes"], grid, num_labels)
    return network, image, distances, inside, drawn
