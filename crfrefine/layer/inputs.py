"""Checks of the tensors that the trainable layer is given, their split into batch items, and the image normalized."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from crfrefine.arrays.arguments import given_array
from crfrefine.arrays.intensity import normalize_intensity
from crfrefine.arrays.padding import MAX_SCORE, padding_among
from crfrefine.arrays.probabilities import SUM_TOLERANCE, check_share, describe_padding, look_at
from crfrefine.base import notices
from crfrefine.base.array_types import Array
from crfrefine.engines import get_backend
from crfrefine.errors import BackendUnavailableError, InputError
from crfrefine.parameters.sections import IntensityParameters

if TYPE_CHECKING:
    from crfrefine.engines.base import Backend, Kernels


_WORTH_A_WARNING = (
    0.01  # share of voxels without a preference; a few occur by chance in half precision
)
_LOOKED_AT = 8  # most voxels along an axis that are looked at to tell probabilities from logits

# mm: one number, one per axis, or one row per batch item.
Spacing = float | np.number[Any] | Sequence[float] | Sequence[Sequence[float]] | Tensor | Array
Mask = Tensor | Array  # nonzero inside


def check_tensor(
    value: Any, name: str, min_axes: int, axes: str, *, is_floating: bool = True
) -> None:
    """Raise InputError unless a value is a tensor of real or floating-point numbers with so many axes, none of them empty."""
    if not isinstance(value, Tensor):
        raise InputError(
            f"{name}: expected a tensor of PyTorch, got {type(value).__name__}; torch.from_numpy makes one of an array"
        )
    if (
        value.ndim < min_axes
        or min(value.shape) == 0
        or (not value.is_floating_point() if is_floating else value.is_complex())
    ):
        kind = "floating-point" if is_floating else "real"
        raise InputError(
            f"{name}: expected {kind} numbers of shape {axes}, none of them empty; got {value.dtype} of {tuple(value.shape)}"
        )


def check_image(image: Tensor) -> None:
    """Raise InputError unless the image is a tensor (B, M, *grid) of real numbers."""
    check_tensor(image, "image", 3, "(batch, modalities, *grid)", is_floating=False)


def check_pair(logits: Tensor, image: Tensor) -> None:
    """Raise InputError unless logits (B, L, *grid) and image (B, M, *grid) fit; BackendUnavailableError if their device has no engine."""
    check_tensor(logits, "logits", 3, "(batch, labels, *grid)")
    if logits.shape[1] < 2:
        raise InputError(
            f"logits have {logits.shape[1]} label; at least two are needed, the background among them; for the one channel of a sigmoid, "
            "before the sigmoid, give torch.cat([torch.zeros_like(logits), logits], 1)"
        )
    check_image(image)
    if image.shape[0] != logits.shape[0] or image.shape[2:] != logits.shape[2:]:
        raise InputError(
            f"image has shape {tuple(image.shape)}; expected (batch, modalities, *grid) with the batch and the grid of the logits, "
            f"whose shape is {tuple(logits.shape)}"
        )
    if image.device != logits.device:
        raise InputError(
            f"the image is on {image.device}, the logits are on {logits.device}; move one of them"
        )
    engine_for(logits.device, logits.dtype)


def warn_of_probabilities(logits: Tensor, told: set[str]) -> None:
    """Warn, once for all calls that share `told`, of logits (B, L, *grid) within [0, 1] that sum to 1 over labels."""
    # A few voxels tell, padding does not count. Only the first call on a GPU looks, since the host has to wait for it.
    if "probabilities" in told:
        return
    places = tuple(slice(None, None, math.ceil(extent / _LOOKED_AT)) for extent in logits.shape[2:])
    look = look_at(
        logits.detach()[(slice(None), slice(None), *places)].movedim(1, 0).float().cpu().numpy()
    )
    sums, tolerance = (
        look.sums[~look.is_equal],
        max(SUM_TOLERANCE, 4.0 * torch.finfo(logits.dtype).eps),
    )
    are_probabilities = (
        look.outside is None and sums.size > 0 and bool((np.abs(sums - 1.0) <= tolerance).all())
    )
    if are_probabilities or logits.device.type != "cpu":
        told.add("probabilities")
    if are_probabilities:
        notices.warn(
            "the logits look like probabilities: they lie in [0, 1] and sum to 1 over labels; give a network's output before its softmax; "
            "for probabilities, pass probabilities.clamp_min(1e-7).log()"
        )


def engine_for(device: torch.device, dtype: torch.dtype = torch.float32) -> Backend:
    """Return the engine for a tensor's device: for float64 plain tensor operations; may raise BackendUnavailableError."""
    try:
        if device.type not in ("cpu", "cuda"):
            raise BackendUnavailableError("expected cpu or cuda")
        return get_backend(
            str(device)
            if dtype != torch.float64
            else "torch"
            if device.type == "cpu"
            else f"torch:{device}"
        )
    except BackendUnavailableError as error:
        raise BackendUnavailableError(
            f"no engine for tensors on {device} ({error}); move the layer and its inputs to the CPU"
        ) from error


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The precision of the computation: float64 for float64 tensors, float32 for all others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def masks_by_item(
    mask: Mask | None, num_items: int, grid_shape: Sequence[int]
) -> list[Tensor | None]:
    """Return a boolean mask (*grid), or None, for each batch item; raise InputError if a mask is empty or does not fit."""
    if mask is None:
        return [None] * num_items
    grid = tuple(grid_shape)
    if not isinstance(
        mask, Tensor
    ):  # A copy, as PyTorch takes no array that is flipped, read-only, or of the other byte order.
        array = given_array(mask, "mask")
        mask = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
    inside = mask.detach()
    if inside.is_floating_point() and not torch.isfinite(inside).all():
        raise InputError(
            "the mask holds values that are not finite (NaN or infinity); expected zero outside and anything else inside"
        )
    shape = tuple(inside.shape)
    if shape not in (grid, (num_items, *grid), (num_items, 1, *grid)):
        raise InputError(
            f"mask has shape {shape}; expected {grid}, {(num_items, *grid)} or {(num_items, 1, *grid)}"
        )
    masks = list((inside != 0).reshape(-1, *grid).expand(num_items, *grid))
    for index, item in enumerate(masks):
        if not item.any():
            raise InputError(
                f"the mask of batch item {index} is empty: there is no voxel to refine; leave such items out"
            )
    return list(masks)


def without_padding(
    logits: Tensor, mask: Mask | None, kernels: Sequence[Kernels] | None
) -> tuple[Tensor, Mask | None]:
    """Return logits (B, L, *grid), and a mask without padding, as `crfrefine.refine` finds it.

    Padding with a huge constant becomes 0: the gradient with respect to the temperature sums such values times gradients that cancel.
    Raises InputError if almost nothing would be left of an item, or its kernels were built with these voxels.
    """
    values, grid = logits.detach(), logits.shape[2:]
    ties = values[:, 1] == values[:, 0]
    for label in range(
        2, values.shape[1]
    ):  # One channel at a time, to avoid (B, L, *grid) booleans.
        ties &= values[:, label] == values[:, 0]
    if not ties.any():
        return logits, mask
    padding = _padding_among(ties, values)
    if not padding.any():
        return logits, mask
    masks = masks_by_item(mask, len(logits), grid)
    inside = torch.stack(
        [torch.ones_like(padding[0]) if own is None else own.to(padding.device) for own in masks]
    )
    counts = [int(item.sum()) for item in inside & padding]
    if not any(counts):
        return logits, mask
    for index, count in enumerate(counts):
        check_share(count, int(inside[index].sum()), f"the logits of batch item {index}")
    inside &= ~padding
    for index, item in enumerate(kernels or ()):
        if item.num_voxels > int(inside[index].sum()):
            raise InputError(
                f"all labels have the same logit at {counts[index]} voxels of batch item {index}, but its kernels were built with "
                "these voxels inside the mask; leave them out of the mask that `build_kernels` is given"
            )
    most = max(counts)
    if most > _WORTH_A_WARNING * grid.numel():
        notices.warn(f"batch item {counts.index(most)}: {describe_padding(most, grid.numel())}")
    huge = padding & (values[:, 0].abs() > MAX_SCORE)
    return logits.masked_fill(huge.unsqueeze(1), 0.0) if huge.any() else logits, inside


def _padding_among(ties: Tensor, logits: Tensor) -> Tensor:
    """Return which of the ties (B, *grid) are padding; the CPU judges their shapes."""
    padding = torch.zeros_like(ties)
    for index, item in enumerate(ties):
        if not item.any():
            continue
        common = logits[index, 0].to(compute_dtype(logits)).cpu().numpy()
        found = padding_among(item.cpu().numpy(), common, logits.shape[1])
        if found is not None:
            padding[index] = torch.from_numpy(found)
    return padding


def check_logits(logits: Tensor, masks: Sequence[Tensor | None]) -> None:
    """Raise InputError if logits (B, L, *grid) hold NaN or +infinity inside the items' masks: one such voxel would spread to its item."""
    if logits.detach().amax() < math.inf:  # False for NaN
        return
    bad = ~(logits.detach() < math.inf).all(1)
    for index, (item, inside) in enumerate(zip(bad, masks, strict=True)):
        count = int((item if inside is None else item & inside.to(item.device)).sum())
        if count:
            raise InputError(
                f"the logits of batch item {index} hold NaN or +infinity at {count} voxels inside the mask, which would spread to all "
                "others; has the training diverged?"
            )


def check_finite(image: Tensor, index: int) -> None:
    """Raise InputError if an image (M, *grid) of the batch contains NaN or infinity."""
    for modality, channel in enumerate(image if image.is_floating_point() else ()):
        bad = channel.numel() - int(torch.isfinite(channel).sum())
        if bad:
            raise InputError(
                f"image: modality {modality} of batch item {index} has {bad} values that are not finite (NaN or infinity)"
            )


_CONSTANT = float(torch.finfo(torch.float32).tiny)


def normalize_batch(
    image: Tensor,
    parameters: IntensityParameters,
    mask: Mask | None,
    dtype: torch.dtype,
    *,
    threads: int | None = None,
) -> Tensor:
    """Map the intensities of each item of a batch (B, M, *grid) to the scale that theta_beta is measured in.

    Statistics are taken inside the mask and have gradients, too; without a gradient this is what `crfrefine.refine` does.
    """
    for index, item in enumerate(image):
        check_finite(item, index)
    masks = masks_by_item(mask, len(image), image.shape[2:])
    items = [
        _normalize(item, parameters, inside, dtype, threads)
        for item, inside in zip(image, masks, strict=True)
    ]
    return items[0].unsqueeze(0) if len(items) == 1 else torch.stack(items)


def _normalize(
    image: Tensor,
    parameters: IntensityParameters,
    mask: Tensor | None,
    dtype: torch.dtype,
    threads: int | None,
) -> Tensor:
    settings = parameters.spread({"modality": len(image)})
    if set(settings["normalization"]) == {"none"}:
        return image.to(dtype)
    is_followed = image.requires_grad and torch.is_grad_enabled()
    if not is_followed and dtype == torch.float32 and image.device.type == "cpu":
        raw = image.detach()
        raw = raw if raw.dtype not in (torch.float16, torch.bfloat16, torch.bool) else raw.float()
        inside = None if mask is None else mask.numpy()
        return torch.from_numpy(
            normalize_intensity(raw.numpy(), parameters, inside, threads=threads)
        )
    work = image.to(torch.promote_types(image.dtype, dtype))
    channels = []
    plans = (settings[key] for key in ("normalization", "percentiles", "window"))
    for channel, kind, percentiles, window in zip(work, *plans, strict=True):
        if kind == "none":
            channels.append(channel)
        elif kind == "window" and window is not None:
            channels.append(((channel - window[0]) / (window[1] - window[0])).clamp(0.0, 1.0))
        else:
            values = channel.flatten() if mask is None else channel[mask]
            if (
                kind == "zscore"
            ):  # The (population) deviation of a constant is 0 and has no gradient.
                variance, shift = torch.var_mean(values, correction=0)
                width = (
                    variance.sqrt()
                    if float(variance.detach()) > 0.0
                    else torch.zeros_like(variance)
                )
            else:
                shift, width = _percentile_range(values, percentiles)
            channels.append(
                (channel - shift) / width
                if float(width.detach()) > _CONSTANT
                else torch.zeros_like(channel)
            )
    return torch.stack(channels).to(dtype)


def _percentile_range(values: Tensor, percentiles: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """The lower percentile, and the distance to the upper one; from the smallest to the largest value where both are equal."""
    # They are interpolated between order statistics, whose voxels get the gradients.
    positions = [(values.numel() - 1) * (percent / 100.0) for percent in percentiles]
    ranks = [
        min(math.floor(position) + more, values.numel() - 1)
        for position in positions
        for more in (0, 1)
    ]
    fixed = values.detach()
    if fixed.device.type == "cpu":  # A CPU partitions several times faster than it sorts.
        places = torch.from_numpy(np.argpartition(fixed.numpy(), ranks)[ranks])
    else:
        places = fixed.sort(stable=True).indices[ranks]
    pairs = zip(values[places[::2]], values[places[1::2]], positions, strict=True)
    low, high = (start + (end - start) * (position % 1.0) for start, end, position in pairs)
    if float(high.detach()) <= float(low.detach()):
        low, high = values.amin(), values.amax()
    return low, high - low
