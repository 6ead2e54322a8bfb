"""The layer's computation from raw intensities on, as a function of tensors: the image is normalized, padding of the logits is left out.

`crfrefine.layer.functional` takes over from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crfrefine.arrays.padding import describe_padding
from crfrefine.errors import InputError
from crfrefine.layer import functional, inputs
from crfrefine.layer.intensity import normalize_batch

if TYPE_CHECKING:
    from crfrefine.engines.base import RecordingKernels
    from crfrefine.parameters.model import CrfParameters

_WORTH_A_WARNING = 0.01
"""Share of voxels without a preference; a few occur by chance in half precision."""


@dataclass(frozen=True)
class Terms:
    """The learned values of a layer.

    Attributes:
        bilateral_weight: (kernels, 1 or L).
        theta_position: (kernels, 1 or axes), mm.
        theta_intensity: (kernels, M).
        spatial_weight: (1 or L,); None without a spatial kernel.
        theta_gamma: (1 or axes,), mm; None without a spatial kernel.
        compatibility: (L, L).
        temperature: one number.
        bias: (L,).
        volume_weight: one number; None without a volume term.
    """

    bilateral_weight: Tensor
    theta_position: Tensor
    theta_intensity: Tensor
    spatial_weight: Tensor | None
    theta_gamma: Tensor | None
    compatibility: Tensor
    temperature: Tensor
    bias: Tensor
    volume_weight: Tensor | None

    def tensors(self) -> list[Tensor | None]:
        """Return the values in the order of the attributes."""
        return [getattr(self, field.name) for field in fields(self)]


@dataclass(frozen=True)
class Run:
    """The settings that a layer does not learn: all parameters except the two that the layer replaces, and the CPU threads."""

    parameters: CrfParameters
    num_iterations: int
    threads: int
    label_threshold: float


def refine(
    logits: Tensor,
    image: Tensor,
    spacing: Callable[[], inputs.Spacing],
    mask: inputs.Mask | None,
    terms: Terms,
    run: Run,
    warn: Callable[[str], None],
    *,
    kernels: Sequence[RecordingKernels] | None = None,
) -> Tensor:
    """Return refined logits (B, L, *grid) from logits (B, L, *grid) and raw intensities (B, M, *grid); see `CrfRnn.forward`.

    The spacing is asked for once image and mask have passed their checks, so that it may warn. Where kernels are given, bandwidths and
    spacing, and the image too unless its gradient is needed, are ignored.
    """
    if kernels is None or (image.requires_grad and torch.is_grad_enabled()):
        image = normalize_batch(image, run.parameters.intensity, mask, inputs.compute_dtype(logits), threads=run.threads)
    logits, mask = _without_padding(logits, mask, kernels, warn)
    return refine_normalized(logits, image, spacing(), mask, terms, run, kernels=kernels)


def refine_normalized(
    logits: Tensor,
    image: Tensor,
    spacing: inputs.Spacing,
    mask: inputs.Mask | None,
    terms: Terms,
    run: Run,
    *,
    kernels: Sequence[RecordingKernels] | None = None,
) -> Tensor:
    """Return refined logits as `refine` does, from an image on the scale of theta_beta and logits without padding."""
    settings = run.parameters.mean_field
    has_spatial = terms.spatial_weight is not None and terms.theta_gamma is not None
    return functional.mean_field(
        logits,
        image,
        bilateral=list(zip(terms.bilateral_weight, terms.theta_position, terms.theta_intensity, strict=True)),
        spatial=(terms.spatial_weight, terms.theta_gamma) if has_spatial else None,  # type: ignore[arg-type]
        compatibility=terms.compatibility,
        temperature=terms.temperature,
        bias=terms.bias,
        volume=terms.volume_weight,
        spacing=spacing,
        mask=mask,
        num_iterations=run.num_iterations,
        normalization=settings.normalization,
        filter=settings.filter,
        positions=settings.positions,
        threads=run.threads,
        label_threshold=run.label_threshold,
        kernels=kernels,
    )


def _without_padding(
    logits: Tensor, mask: inputs.Mask | None, kernels: Sequence[RecordingKernels] | None, warn: Callable[[str], None]
) -> tuple[Tensor, inputs.Mask | None]:
    padding, grid = inputs.find_padding(logits), logits.shape[2:]
    if padding is None:
        return logits, mask
    masks, counts = inputs.masks_without_padding(padding, inputs.masks_by_item(mask, len(logits), grid))
    if not any(counts):
        return logits, mask
    for index, (inside, item) in enumerate(zip(masks, kernels or (), strict=False)):
        if inside is not None and item.num_voxels > int(inside.sum()):
            raise InputError(
                f"all labels have the same logit at {counts[index]} voxels of batch item {index}, but its kernels were built with "
                "these voxels inside the mask; leave them out of the mask that `build_kernels` is given"
            )
    most = max(counts)
    if most > _WORTH_A_WARNING * grid.numel():
        warn(f"batch item {counts.index(most)}: {describe_padding(most, grid.numel())}")
    return inputs.without_huge_padding(logits, padding), inputs.stack_masks(masks, grid, logits.device)
