"""`partial_cross_entropy`: the cross-entropy on the voxels that someone labeled. Needs PyTorch."""

from __future__ import annotations

from crfrefine.errors import BackendUnavailableError, InputError

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise BackendUnavailableError(f"crfrefine.layer needs PyTorch ({error}): pip install 'crfrefine[train]'") from error

from crfrefine.layer.inputs import check_tensor

__all__ = ["partial_cross_entropy"]


def partial_cross_entropy(logits: Tensor, scribbles: Tensor, *, ignore_index: int) -> Tensor:
    """Return the mean cross-entropy over the labeled voxels of a batch; 0, with a gradient of 0, without labeled voxels.

    `torch.nn.functional.cross_entropy(..., ignore_index=...)` is the same where there is a labeled voxel, and NaN without labeled voxels.

    Args:
        logits: (B, L, *grid), higher is better.
        scribbles: (B, *grid) integers: 0 to L - 1 where someone labeled a voxel, `ignore_index` elsewhere.
        ignore_index: the value of voxels without a label; not one of 0 to L - 1.

    Returns:
        () in the type of the logits; under `torch.autocast` at least float32, as PyTorch's.

    Raises:
        InputError: shapes do not fit, logits that are no floating-point numbers, scribbles that are no integers or hold another value.
    """
    check_tensor(logits, "logits")
    check_tensor(scribbles, "scribbles")
    labels = _checked(logits, scribbles, ignore_index)
    values = logits.to(torch.promote_types(logits.dtype, torch.float32))  # float16 cannot hold the sum of many voxels
    total: Tensor = torch.nn.functional.cross_entropy(values, labels, ignore_index=ignore_index, reduction="sum")
    mean = total / (labels != ignore_index).sum().clamp(min=1)
    # A loss in float16 could not take the gradient that a GradScaler starts with, 65536.
    return mean if torch.is_autocast_enabled(logits.device.type) else mean.to(logits.dtype)


def _checked(logits: Tensor, scribbles: Tensor, ignore_index: int) -> Tensor:
    """Return the scribbles as int64: in a narrow type, the values that they are compared with would wrap around."""
    if logits.ndim < 2 or not logits.is_floating_point():
        raise InputError(f"logits have shape {tuple(logits.shape)} and type {logits.dtype}; expected floating-point (batch, labels, *grid)")
    num_labels = logits.shape[1]
    expected = (logits.shape[0], *logits.shape[2:])
    if tuple(scribbles.shape) != expected:
        raise InputError(f"scribbles have shape {tuple(scribbles.shape)}; the logits {tuple(logits.shape)} need {expected}: no label axis")
    if scribbles.is_floating_point() or scribbles.is_complex():
        raise InputError(f"scribbles have type {scribbles.dtype}; expected integers (scribbles.long())")
    if 0 <= ignore_index < num_labels:
        raise InputError(f"ignore_index is {ignore_index}, which is one of the {num_labels} labels; expected another number")
    labels = scribbles.long()
    other = (labels != ignore_index) & ((labels < 0) | (labels >= num_labels))
    if other.any():
        raise InputError(
            f"scribbles hold the value {int(labels[other][0])}; expected 0 to {num_labels - 1}, or {ignore_index} without a label"
        )
    return labels
