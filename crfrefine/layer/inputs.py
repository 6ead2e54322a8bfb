"""The tensors that the trainable layer is given: checked, split into batch items, normalized."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crfrefine.arrays.arguments import given_array, given_spacing
from crfrefine.arrays.padding import EQUAL_LOGITS, MAX_SCORE, check_share, padding_among
from crfrefine.arrays.probabilities import SUM_TOLERANCE, look_at
from crfrefine.base import notices
from crfrefine.base.array_types import Array
from crfrefine.base.notes import NoteKind
from crfrefine.engines import get_backend
from crfrefine.engines.base import Backend, Kernels
from crfrefine.errors import BackendUnavailableError, InputError

# Share of voxels that are padding, above which a warning reports them.
_WARNED_SHARE = 0.01
_SAMPLED = 8  # most voxels along an axis that are looked at to tell probabilities from logits

# mm: one number, one per axis, or one row per batch item.
Spacing = float | np.number[Any] | Sequence[float] | Sequence[Sequence[float]] | Tensor | Array
Mask = Tensor | Array | None  # nonzero inside; None means everywhere
ItemMasks = list[Tensor | None]  # of each batch item, (*grid), True inside; None means everywhere


def check_tensor(
    value: Any, name: str, min_axes: int, axes: str, *, is_floating: bool = True
) -> None:
    """Raise InputError unless a value is a tensor of at least `min_axes` axes, none of them empty.

    It must hold floating-point numbers, or without `is_floating` real numbers of any type.
    """
    if not isinstance(value, Tensor):
        raise InputError(
            f"{name}: expected a tensor of PyTorch, got {type(value).__name__}; torch.from_numpy "
            "makes one of an array"
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        raise InputError(
            f"{name}: the layer does not work with torch.func; use loss.backward() or "
            "torch.autograd.grad"
        )
    if value.layout != torch.strided:
        raise InputError(f"{name}: expected a dense tensor, got {value.layout}; use to_dense()")
    if is_floating:
        kind = "floating-point"
        is_kind = value.is_floating_point() and value.element_size() > 1  # PyTorch has 8-bit floats
    else:
        kind = "real"
        is_kind = not value.is_complex()
    if not is_kind or value.ndim < min_axes or min(value.shape) == 0:
        raise InputError(
            f"{name}: expected {kind} numbers of shape {axes}, none of them empty; got "
            f"{value.dtype} of {tuple(value.shape)}"
        )


def spacings_by_item(spacing: Spacing, num_items: int, num_axes: int) -> list[Sequence[float]]:
    """Return mm between voxels along each axis, for each batch item.

    Raises InputError for anything but plausible distances, and for a sequence of tensors, which may
    be of items or of axes: a DataLoader collates the spacings of items, (axes,) each, to one tensor
    of items per axis.
    """
    if isinstance(spacing, list | tuple):
        for row in spacing:
            if isinstance(row, Tensor) and row.ndim > 0:
                raise InputError(
                    f"spacing: expected one tensor of (batch, axes), got {len(spacing)} tensors; "
                    "torch.stack(spacing, 1) makes one of what a DataLoader collates, "
                    "torch.stack(spacing) of one tensor per item"
                )
    distances: Any = spacing
    if isinstance(spacing, Tensor):
        distances = spacing.detach().cpu().numpy()
    if np.ndim(distances) != 2 or len(distances) != num_items:
        distances = [distances] * num_items
    return [given_spacing(row, num_axes) for row in distances]


def check_image(image: Tensor) -> None:
    """Raise InputError unless the image is a tensor (B, M, *grid) of real numbers."""
    check_tensor(image, "image", 3, "(batch, modalities, *grid)", is_floating=False)


def check_pair(logits: Tensor, image: Tensor) -> Backend:
    """Return the engine for logits (B, L, *grid) and an image (B, M, *grid).

    Raises InputError unless they fit, BackendUnavailableError if their device has no engine.
    """
    check_tensor(logits, "logits", 3, "(batch, labels, *grid)")
    if logits.shape[1] < 2:
        raise InputError(
            f"logits have {logits.shape[1]} label; at least two are needed, the background among "
            "them; for the one channel of a sigmoid, before the sigmoid, give "
            "torch.cat([torch.zeros_like(logits), logits], 1)"
        )
    check_image(image)
    if image.shape[0] != logits.shape[0] or image.shape[2:] != logits.shape[2:]:
        raise InputError(
            f"image has shape {tuple(image.shape)}; expected (batch, modalities, *grid) with the "
            f"batch and the grid of the logits, whose shape is {tuple(logits.shape)}"
        )
    if image.device != logits.device:
        raise InputError(
            f"the image is on {image.device}, the logits are on {logits.device}; move one of them"
        )
    return engine_for(logits.device, logits.dtype)


def warn_of_probabilities(logits: Tensor, told: set[str]) -> None:
    """Warn of logits (B, L, *grid) within [0, 1] that sum to 1 over labels.

    The warning is issued once for all calls that share `told`.
    """
    if "probabilities" in told:
        return
    # On a GPU only the first call looks, since the host has to wait for the GPU.
    if logits.device.type != "cpu":
        told.add("probabilities")
    # A few voxels tell, without padding.
    places = [slice(None), slice(None)]
    for extent in logits.shape[2:]:
        places.append(slice(None, None, math.ceil(extent / _SAMPLED)))
    sample = logits.detach()[tuple(places)].movedim(1, 0)
    look = look_at(sample.float().resolve_neg().cpu().numpy())
    sums = look.sums[~look.is_equal]
    tolerance = max(SUM_TOLERANCE, 4.0 * torch.finfo(logits.dtype).eps)
    have_sum_of_one = sums.size > 0 and (np.abs(sums - 1.0) <= tolerance).all()
    if look.outside is None and have_sum_of_one:
        told.add("probabilities")
        notices.warn(
            "the logits look like probabilities: they lie in [0, 1] and sum to 1 over labels; give "
            "a network's output before its softmax; for probabilities, pass "
            "probabilities.clamp_min(1e-7).log()"
        )


def engine_for(device: torch.device, dtype: torch.dtype = torch.float32) -> Backend:
    """Return the engine for a tensor's device; for float64 it is that of plain tensor operations.

    Raises BackendUnavailableError without one.
    """
    name = str(device)
    if dtype == torch.float64:
        name = "torch" if device.type == "cpu" else f"torch:{device}"
    try:
        if device.type not in ("cpu", "cuda"):
            raise BackendUnavailableError("expected cpu or cuda")
        return get_backend(name)
    except BackendUnavailableError as error:
        raise BackendUnavailableError(
            f"no engine for tensors on {device} ({error}); move the layer and its inputs to the CPU"
        ) from error


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the precision to compute in: float64 for float64 tensors, float32 for all others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def masks_by_item(mask: Mask, num_items: int, grid_shape: Sequence[int]) -> ItemMasks:
    """Return the mask of each batch item.

    Raises InputError if a mask is empty or does not fit.
    """
    if mask is None:
        return [None] * num_items
    grid = tuple(grid_shape)
    if not isinstance(mask, Tensor):
        # A copy, as PyTorch takes no array that is flipped, read-only, or of the other byte order.
        array = given_array(mask, "mask")
        mask = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
    inside = mask.detach()
    if inside.is_floating_point() and not torch.isfinite(inside).all():
        raise InputError(
            "the mask holds values that are not finite (NaN or infinity); expected zero outside "
            "and anything else inside"
        )
    shape = tuple(inside.shape)
    if shape not in (grid, (num_items, *grid), (num_items, 1, *grid)):
        raise InputError(
            f"mask has shape {shape}; expected {grid}, {(num_items, *grid)} or "
            f"{(num_items, 1, *grid)}"
        )
    masks: ItemMasks = []
    for index, item in enumerate((inside != 0).reshape(-1, *grid).expand(num_items, *grid)):
        if not item.any():
            raise InputError(
                f"the mask of batch item {index} is empty: there is no voxel to refine; leave such "
                "items out"
            )
        masks.append(item)
    return masks


def look_at_batch(logits: Tensor, images: Sequence[Tensor]) -> tuple[bool, bool, Tensor]:
    """Look at logits (B, L, *grid) and images (B, M, *grid); the host waits once for a GPU.

    Returns:
        Whether images are finite, and logits neither NaN nor +infinity; whether there are ties;
        and where all labels have the same logit, (B, *grid).
    """
    first, *others = logits.detach().unbind(1)
    ties = torch.ones_like(first, dtype=torch.bool)
    for channel in others:  # One at a time, to avoid (B, L, *grid) booleans.
        ties &= channel == first
    answers = [ties.any(), _are_usable(logits), *map(_is_finite, images)]
    has_ties, *are_usable = torch.stack(answers).tolist()
    return all(are_usable), has_ties, ties


def without_padding(
    logits: Tensor, ties: Tensor, mask: Mask, kernels: Sequence[Kernels] | None
) -> tuple[Tensor, Mask]:
    """Return logits (B, L, *grid), and a mask without padding, as `crfrefine.refine` finds it.

    The ties are those of `look_at_batch`. Padding with a huge constant becomes 0: the gradient with
    respect to the temperature sums such values times gradients that cancel. Raises InputError if
    almost nothing would be left of an item, or its kernels were built with these voxels.
    """
    values = logits.detach()
    grid = logits.shape[2:]
    # On the CPU, which judges padding by its shape.
    padding = torch.zeros(ties.shape, dtype=torch.bool, device="cpu")
    inside = torch.ones_like(padding)
    counts = []
    for index, item_mask in enumerate(masks_by_item(mask, len(logits), grid)):
        common = values[index, 0].to(compute_dtype(logits)).resolve_neg().cpu().numpy()
        found = padding_among(ties[index].cpu().numpy(), common, logits.shape[1])
        if found is not None:
            padding[index] = torch.from_numpy(found)
        if item_mask is not None:
            inside[index] = item_mask
        count = int((inside[index] & padding[index]).sum())
        check_share(count, int(inside[index].sum()), f"the logits of batch item {index}")
        counts.append(count)
    if not any(counts):
        return logits, mask

    inside &= ~padding
    for index, item in enumerate(kernels or ()):
        if item.num_voxels > int(inside[index].sum()):
            raise InputError(
                f"all labels have the same logit at {counts[index]} voxels of batch item {index}, "
                "but its kernels were built with these voxels inside the mask; leave them out of "
                "the mask that `build_kernels` is given"
            )

    highest = max(counts)
    size = grid.numel()
    share = highest / size
    if share > _WARNED_SHARE:
        note = NoteKind.PADDING(what=EQUAL_LOGITS, padding=highest, voxels=size, share=share)
        notices.warn(str(note.about(f"batch item {counts.index(highest)}")))
    is_huge = padding.to(values.device) & (values[:, 0].abs() > MAX_SCORE)
    if is_huge.any():
        logits = logits.masked_fill(is_huge.unsqueeze(1), 0.0)
    return logits, inside.to(logits.device)


def check_logits(logits: Tensor, masks: ItemMasks) -> None:
    """Raise InputError if logits (B, L, *grid) hold NaN or +infinity inside the items' masks.

    One such voxel would spread to all others of its item.
    """
    if _are_usable(logits):
        return
    unusable = ~(logits.detach() < math.inf).all(1)
    for index, (item, inside) in enumerate(zip(unusable, masks, strict=True)):
        if inside is not None:
            item = item & inside.to(item.device)
        count = int(item.sum())
        if count:
            raise InputError(
                f"the logits of batch item {index} hold NaN or +infinity at {count} voxels inside "
                "the mask, which would spread to all others; has the training diverged?"
            )


def _are_usable(logits: Tensor) -> Tensor:
    """Return whether logits contain neither NaN nor +infinity, without waiting for a GPU."""
    return logits.detach().amax() < math.inf  # False for NaN


def _is_finite(image: Tensor) -> Tensor:
    """Return whether an image contains neither NaN nor infinity, without waiting for a GPU."""
    if not image.is_floating_point():
        return torch.ones((), dtype=torch.bool, device=image.device)
    return torch.stack(image.detach().aminmax()).isfinite().all()


def check_finite(image: Tensor) -> None:
    """Raise InputError if the image (B, M, *grid) contains NaN or infinity."""
    if _is_finite(image):
        return
    for index, item in enumerate(image):
        for modality, channel in enumerate(item):
            count = channel.numel() - int(torch.isfinite(channel).sum())
            if count:
                raise InputError(
                    f"image: modality {modality} of batch item {index} has {count} values that are "
                    "not finite (NaN or infinity)"
                )


def stack_items(items: list[Tensor]) -> Tensor:
    """Return the batch of items; a single item is not copied, as `torch.stack` would."""
    if len(items) == 1:
        return items[0].unsqueeze(0)
    return torch.stack(items)
