"""Losses for networks that learn from a few labeled voxels.

`crf_loss` is the dense CRF as a term of a loss, `partial_cross_entropy` the one on the labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crfrefine.base.limits import check_threads
from crfrefine.engines.base import Kernels
from crfrefine.errors import InputError
from crfrefine.layer import autograd, inputs
from crfrefine.layer.crf_model import Values
from crfrefine.layer.functional import build_kernels
from crfrefine.layer.inputs import Mask, Spacing
from crfrefine.layer.intensity import normalize_batch
from crfrefine.parameters.sections import IntensityParameters, MeanFieldParameters
from crfrefine.parameters.specs import MeanFieldSpec

# Log-probabilities are raised to this (1e-35), since the engine takes only finite logits.
_LEAST = -80.0
_TOLD: set[str] = set()  # warnings that this process has issued


@autograd.outside_graphs
def crf_loss(
    logits: Tensor,
    image: Tensor,
    spacing: Spacing,
    *,
    theta_alpha: Values,
    theta_beta: Values,
    mask: Mask = None,
    intensity: IntensityParameters | Literal["percentile", "zscore", "none"] = "percentile",
    filter: Literal["auto", "exact", "truncated", "lattice", "grid"] = "auto",  # noqa: A002
    threads: int | None = None,
) -> Tensor:
    """Return how much similar neighbors disagree about their labels.

    The loss is the Potts energy of a network's probabilities: with Q = softmax(logits) and the
    appearance kernel K, normalized as K~ = R^-1/2 K R^-1/2, the mean over voxels of
    sum_l Q_l (K~ (1 - Q_l)). Add it, times a weight, to the cross-entropy on the labeled voxels:
    by itself it is lowest, 0, where all voxels have the same label. The gradient reaches the
    logits only.

    Args:
        logits: (B, L, *grid), higher is better; -inf forbids a label. float64 is computed in
            float64, every other type in float32.
        image: (B, M, *grid), raw intensities, finite, any real type.
        spacing: mm between neighboring voxels; one number, one per axis, or (B, axes).
        theta_alpha: bandwidth of position in mm, positive; one number, or one per axis.
        theta_beta: bandwidth of normalized intensity, positive; one number, or one per modality.
        mask: nonzero where voxels count; (*grid), (B, *grid) or (B, 1, *grid). None means
            everywhere. The others neither send nor receive.
        intensity: normalization of each item, with statistics taken inside the mask: "percentile"
            (percentiles 1 and 99 become 0 and 1), "zscore", "none", or the `[intensity]` section
            of parameters.
        filter: "auto", "exact", "truncated", "lattice" or "grid" (one or two modalities, float32,
            on a CPU).
        threads: CPU threads; None means as many as `torch.get_num_threads()`.

    Returns:
        () float32, or float64 for float64 logits. From 0 to 1 - 1 / L, up to the filter's error.

    Raises:
        InputError: as in `CrfRnn.forward`; also an image or bandwidth that requires a gradient.
        ConfigError: `filter` or `intensity` is not one of the words.
        ExportError, BackendUnavailableError, CapacityError: as in `CrfRnn.forward`.

    Examples:
        >>> import torch
        >>> import crfrefine
        >>> logits = torch.randn(1, 3, 5, 6, 7, requires_grad=True)
        >>> image = torch.randn(1, 2, 5, 6, 7)
        >>> bandwidths = {"theta_alpha": 4.0, "theta_beta": 0.2}
        >>> crfrefine.crf_loss(logits, image, spacing=(1, 1, 2), **bandwidths).backward()
        >>> logits.grad.shape
        torch.Size([1, 3, 5, 6, 7])

    Source: the dense CRF loss of Tang et al. 2018 (arXiv:1803.09569), with a normalized kernel;
    docs/reference/math.md.
    """
    inputs.check_pair(logits, image)
    check_threads(threads)
    for name, value in (("image", image), ("theta_alpha", theta_alpha), ("theta_beta", theta_beta)):
        if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
            raise InputError(
                f"{name} requires a gradient, which crf_loss does not have; pass {name}.detach()"
            )
    if not isinstance(intensity, IntensityParameters):
        intensity = IntensityParameters(normalization=intensity)
    inputs.warn_of_probabilities(logits, _TOLD)
    dtype = inputs.compute_dtype(logits)
    log_q = logits.detach().to(dtype).log_softmax(1)
    for index, item in enumerate(log_q):
        count = int(torch.isnan(item).any(0).sum())
        if count:
            raise InputError(
                f"the logits of batch item {index} define no probabilities at {count} voxels (NaN, "
                "infinity, or -infinity for all labels); has the training diverged?"
            )
    inputs.check_finite(image)
    kernels = build_kernels(
        normalize_batch(image, intensity, mask, dtype, threads=threads),
        [("bilateral", (1.0, theta_alpha, theta_beta))],
        spacing=spacing,
        mask=mask,
        num_labels=logits.shape[1],
        settings=MeanFieldParameters(filter=filter, num_iterations=1),
        threads=threads,
        copy=False,
    )
    log_q = log_q.clamp(min=_LEAST)
    return _Energy.apply(logits, log_q, kernels)  # type: ignore[no-untyped-call]


class _Energy(torch.autograd.Function):
    """The mean of sum_l Q_l (K~ (1 - Q_l)).

    The forward pass also computes the gradient, since both need the same messages.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_q: Tensor, kernels: Sequence[Kernels]) -> Tensor:
        """Return the loss of `log_q`, the finite logarithms of the probabilities.

        `logits` are an argument only so that they get the gradient.
        """
        num_labels = log_q.shape[1]
        potts = 1.0 - np.eye(num_labels)
        spec = MeanFieldSpec(np.ones((1, num_labels)), potts, num_iterations=1)
        num_voxels = sum(item.num_voxels for item in kernels)
        gradient = torch.empty_like(log_q) if ctx.needs_input_grad[0] else None
        total = 0.0
        for index, (item, item_log_q) in enumerate(zip(kernels, log_q, strict=True)):
            tape = item.forward(autograd.to_array(item_log_q), spec)
            # One step of the mean field subtracts K~ (1 - Q_l) from the logits inside the mask,
            # and nothing outside.
            penalty = item_log_q - autograd.to_tensor(tape.logits)
            q = item_log_q.exp()
            disagreement = q * penalty
            total += float(disagreement.sum(dtype=torch.float64))
            if gradient is not None:
                centered = penalty - disagreement.sum(0, keepdim=True)
                gradient[index] = (2.0 / num_voxels) * q * centered
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return log_q.new_tensor(total / num_voxels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient with respect to the logits."""
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None


_UNLABELED = -100


def partial_cross_entropy(
    logits: Tensor, scribbles: Tensor, *, ignore_index: int, background: int = 0
) -> Tensor:
    """Return the mean cross-entropy over the labeled voxels of a batch.

    Without labeled voxels it is 0, and so is its gradient, where
    `torch.nn.functional.cross_entropy(..., ignore_index=...)` is NaN. Otherwise both are the same.

    Args:
        logits: (B, L, *grid), higher is better.
        scribbles: (B, *grid) integers: 1 to L - 1 or `background` where someone labeled a voxel,
            `ignore_index` elsewhere.
        ignore_index: the value of voxels without a label; neither a label nor `background`.
        background: the value of voxels labeled as background, label 0; 255 in files of
            `crfrefine infer --strokes`, with `ignore_index=0`.

    Returns:
        () in the type of the logits; under `torch.autocast` at least float32, as in PyTorch.

    Raises:
        InputError: shapes do not fit, logits that are no floating-point numbers, scribbles that
            are no integers or hold another value.
    """
    inputs.check_tensor(logits, "logits", 2, "(batch, labels, *grid)")
    inputs.check_tensor(scribbles, "scribbles", 1, "(batch, *grid)", is_floating=False)
    num_labels = logits.shape[1]
    grid = (logits.shape[0], *logits.shape[2:])
    if tuple(scribbles.shape) != grid or scribbles.is_floating_point():
        raise InputError(
            f"scribbles have shape {tuple(scribbles.shape)} and type {scribbles.dtype}; the logits "
            f"{tuple(logits.shape)} need integers of shape {grid}: no label axis (scribbles.long())"
        )
    if ignore_index == background or 0 < ignore_index < num_labels or 0 < background < num_labels:
        raise InputError(
            f"ignore_index is {ignore_index} and background is {background}; expected two numbers, "
            f"neither of them one of the labels 1 to {num_labels - 1}"
        )

    # Labels are compared as int64: in a narrow type, the other numbers would wrap around.
    labels = scribbles.long()
    is_labeled = labels != ignore_index
    is_background = labels == background
    is_unknown = is_labeled & ~is_background & ((labels < 1) | (labels >= num_labels))
    if is_unknown.any():
        expected = f"1 to {num_labels - 1}, {background} for background"
        if background == 0:
            expected = f"0 to {num_labels - 1}"
        raise InputError(
            f"scribbles hold the value {int(labels[is_unknown][0])}; expected {expected}, or "
            f"{ignore_index} without a label"
        )

    labels = labels.masked_fill(is_background, 0).masked_fill(~is_labeled, _UNLABELED)
    # float16 cannot hold the sum of many voxels.
    values = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total: Tensor = torch.nn.functional.cross_entropy(
        values, labels, ignore_index=_UNLABELED, reduction="sum"
    )
    mean = total / is_labeled.sum().clamp(min=1)
    # A loss in float16 could not take the gradient that a GradScaler starts with, 65536.
    if torch.is_autocast_enabled(logits.device.type):
        return mean
    return mean.to(logits.dtype)
