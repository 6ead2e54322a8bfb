"""The mean field of the dense CRF as a differentiable function of tensors, whose image is normalized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crfrefine.arrays.arguments import given_spacing
from crfrefine.base import notices
from crfrefine.base.limits import check_threads
from crfrefine.engines.base import GridImage, Kernels, RunContext
from crfrefine.errors import InputError
from crfrefine.layer import inputs
from crfrefine.layer.autograd import MeanField, outside_graphs, to_array
from crfrefine.layer.gaussian import gaussian_filter as gaussian_filter
from crfrefine.parameters.sections import MeanFieldParameters, VolumeParameters
from crfrefine.parameters.specs import (
    KernelSetSpec,
    KernelSpec,
    MeanFieldSpec,
    ModelSpec,
    own_fields,
)
from crfrefine.refinement.tiles.survey import find_thresholds

# One number for all labels, axes or modalities, or one each.
Values = Tensor | Sequence[float] | float | np.number[Any] | NDArray[Any]
_HOST = torch.device("cpu")
# Weight of the volume term instead of 0 where it is learned: it changes marginals by rounding, and its slope is that at 0.
_MIN_LEARNED = 1e-6


@outside_graphs
def mean_field(
    logits: Tensor,
    image: Tensor,
    *,
    bilateral: Sequence[tuple[Values, Values, Values]],
    spatial: tuple[Values, Values] | None = None,
    compatibility: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    bias: Values = 0.0,
    volume: Tensor | float | None = None,
    spacing: inputs.Spacing | None = None,
    mask: inputs.Mask | None = None,
    threads: int | None = None,
    label_threshold: float = 0.0,
    kernels: Sequence[Kernels] | None = None,
    **settings: Any,
) -> Tensor:
    """Refine logits with the dense CRF, differentiable in logits, image and every parameter that is a tensor.

    Logits, spacing, mask, kernels, result and errors are as of `CrfRnn.forward`, `threads` and `label_threshold` as of `CrfRnn`.

    Args:
        logits: (B, L, *grid), higher is better.
        image: (B, M, *grid), intensities on the scale of theta_beta, finite.
        bilateral: weight (one, or L), theta_alpha (one, or one per axis; mm) and theta_beta (one, or M) of each appearance kernel.
        spatial: weight and theta_gamma (one, or one per axis; mm) of the smoothness kernel; None means no smoothness kernel.
        compatibility: (L, L) penalty; row: label of the neighbor, column: own label; zero diagonal. None means Potts.
        temperature: divides the logits, positive.
        bias: added to the logits inside the mask before the temperature divides them; one, or L.
        volume: weight (0 to 1) of the volume term; None means no volume term.
        spacing: mm; one number, one per axis, or (B, axes).
        mask: nonzero where the model applies.
        threads: CPU threads.
        label_threshold: below which a label takes no part around a tile.
        kernels: one for each batch item, from `build_kernels`; image, bandwidths, spacing and mask are then ignored.
        settings: other keys of `[mean_field]` (docs/reference/parameters.md): `num_iterations`, `normalization`, `filter` and
            `positions`. All steps are taken.

    Raises:
        ConfigError: a setting is out of range; for other errors see `CrfRnn.forward`.

    Source: Krähenbühl & Koltun 2011; Zheng et al. 2015; docs/reference/math.md.
    """
    inputs.check_pair(logits, image)
    check_threads(threads)
    checked = vars(MeanFieldParameters(label_threshold=label_threshold, **settings))
    num_labels, dtype = logits.shape[1], inputs.compute_dtype(logits)
    out_dtype = dtype if torch.is_autocast_enabled(logits.device.type) else logits.dtype
    terms, bandwidths = _bandwidths(
        [kernel[1:] for kernel in bilateral], None if spatial is None else spatial[1], image
    )
    image_shape = tuple(image.shape[1:])
    # Given kernels were built from the image: it matters now only if its gradient is needed.
    image = (
        image.to(dtype)
        if kernels is None or image.requires_grad
        else logits.new_empty(len(logits), 0)
    )
    # The host reads these few numbers: from a GPU, each look at one would wait for it.
    weights = [
        _spread(weight, num_labels, f"bilateral.{m}.weight", dtype)
        for m, (weight, _, _) in enumerate(bilateral)
    ]
    weights += [] if spatial is None else [_spread(spatial[0], num_labels, "spatial.weight", dtype)]
    weight = _stack(weights, num_labels, dtype)
    divisor, shift = (
        _spread(temperature, 1, "temperature", dtype, is_positive=True),
        _spread(bias, num_labels, "bias", dtype),
    )
    matrix = (
        1.0 - torch.eye(num_labels, dtype=dtype, device=_HOST)
        if compatibility is None
        else compatibility.to(_HOST, dtype)
    )
    if matrix.shape != (num_labels, num_labels) or not torch.isfinite(matrix.detach()).all():
        raise InputError(
            f"compatibility: expected ({num_labels}, {num_labels}) finite penalties, got a tensor {tuple(matrix.shape)}"
        )
    kept, volume_weight = None, 0.0
    if volume is not None:
        kept = torch.as_tensor(volume, dtype=torch.float64, device=_HOST).reshape(())
        volume_weight = VolumeParameters(weight=float(kept.detach())).weight  # checked
        volume_weight = max(volume_weight, _MIN_LEARNED) if kept.requires_grad else volume_weight
    values = {
        "temperature": float(divisor[0].detach()),
        "bias": _double(shift) if shift.detach().any() else None,
        "tolerance": 0.0,
    }
    own = own_fields(MeanFieldSpec, checked | values)
    run = MeanFieldSpec(_double(weight), _double(matrix), volume_weight=volume_weight, **own)
    parameters = (weight, *bandwidths, matrix, divisor[0], shift, kept)
    masks = inputs.masks_by_item(mask, len(logits), logits.shape[2:])
    labels: list[Tensor | None] = [None] * len(logits)
    if kernels is None:
        wanted = KernelSetSpec(terms, num_labels=num_labels, **own_fields(KernelSetSpec, checked))
        if label_threshold > 0.0 and run.volume_weight == 0.0:
            thresholds = find_thresholds(label_threshold, ModelSpec(wanted, run))
            if not thresholds.leave_out_nothing:
                labels = [
                    _present(item, inside, run, thresholds.present)
                    for item, inside in zip(logits, masks, strict=True)
                ]
        specs = [
            wanted if of_item is None else replace(wanted, num_labels=len(of_item))
            for of_item in labels
        ]
        kernels = _build(image, specs, spacing, masks, threads, copy=False)
    else:
        if len(kernels) != len(logits):
            raise InputError(
                f"got kernels for {len(kernels)} batch items; the batch has {len(logits)}"
            )
        wanted_for = len(weights), image_shape, str(dtype).removeprefix("torch."), num_labels
        for item in kernels:
            built_for = len(item.spec.kernels), item.image_shape, item.dtype, item.spec.num_labels
            if built_for != wanted_for:
                raise InputError(
                    "the kernels were built for {} terms, an image of shape {} in {}, and {} labels; the call has {} terms, {} in {}, and "
                    "{} labels; build them anew (`dtype=torch.float64` for float64 logits)".format(
                        *built_for, *wanted_for
                    )
                )
    if mask is not None or all(
        item.num_voxels == logits[0, 0].numel() for item in kernels
    ):  # else only the kernels know their mask
        inputs.check_logits(logits, masks)
    items = [
        _refine_item(item, run, item_logits.to(dtype), item_image, parameters, of_item, inside)
        for item, item_logits, item_image, of_item, inside in zip(
            kernels, logits, image, labels, masks, strict=True
        )
    ]
    refined = (
        items[0].unsqueeze(0) if len(items) == 1 else torch.stack(items)
    )  # A stack of one would be a copy.
    return refined.to(out_dtype)


def _present(
    logits: Tensor, inside: Tensor | None, run: MeanFieldSpec, thresholds: NDArray[np.float64]
) -> Tensor | None:
    """Return the labels whose log-probability exceeds their threshold (L,) somewhere inside the mask; None means all take part."""
    values = logits.detach().float()
    if run.bias is not None:
        values = values + torch.as_tensor(
            run.bias, dtype=values.dtype, device=values.device
        ).reshape(-1, *[1] * (values.ndim - 1))
    values = values / run.temperature
    log_sums = values.logsumexp(0)
    # One label at a time, to avoid another array of all labels.
    largest = torch.stack(
        [
            (channel - log_sums if inside is None else (channel - log_sums)[inside]).amax()
            for channel in values
        ]
    )
    is_there = ~(largest.cpu() <= torch.from_numpy(thresholds))  # True for NaN
    if int(is_there.sum()) < 2:
        is_there[largest.topk(2).indices.cpu()] = True
    return None if is_there.all() else is_there.nonzero().squeeze(1)


def _refine_item(
    kernels: Kernels,
    run: MeanFieldSpec,
    logits: Tensor,
    image: Tensor,
    parameters: Sequence[Any],
    labels: Tensor | None,
    inside: Tensor | None,
) -> Tensor:
    """Return the refined logits (L, *grid) of a batch item in which only some labels take part; None means all.

    The other labels get the largest penalty of those that take part, since theirs cannot be smaller.
    """
    refined: Tensor
    if labels is None:
        refined = MeanField.apply(kernels, run, logits, image, *parameters)  # type: ignore[no-untyped-call]
        return refined
    weight, position, intensity, spatial, matrix, temperature, bias, volume = parameters
    numbers, own = labels.numpy(), labels.to(logits.device)
    penalties, biases = (
        run.compatibility[np.ix_(numbers, numbers)],
        None if run.bias is None else run.bias[numbers],
    )
    spec = replace(run, weights=run.weights[:, numbers], compatibility=penalties, bias=biases)
    changed = (
        weight[:, labels],
        position,
        intensity,
        spatial,
        matrix[labels][:, labels],
        temperature,
        bias[labels],
        volume,
    )
    refined = MeanField.apply(kernels, spec, logits[own], image, *changed)  # type: ignore[no-untyped-call]
    shift = bias.to(logits).reshape(-1, *[1] * (logits.ndim - 1))
    alone = (logits + (shift if inside is None else shift * inside)) / temperature.to(logits)
    penalty = (refined - alone[own]).detach().amin(0)
    refined = (alone + penalty).index_copy(0, own, refined)
    return refined


def build_kernels(
    image: Tensor,
    *,
    bilateral: Sequence[tuple[Values, Values]],
    theta_gamma: Values | None = None,
    spacing: inputs.Spacing | None = None,
    mask: inputs.Mask | None = None,
    num_labels: int,
    threads: int | None = None,
    copy: bool = True,
    **settings: Any,
) -> list[Kernels]:
    """Build everything that depends only on images and bandwidths, an object per batch item, for `mean_field`.

    Arguments and errors are those of `mean_field`, with `bilateral` without weights; the image's type sets the precision. Each object
    serves one call at a time. Without `copy` the image must never be overwritten.
    """
    inputs.check_image(image)
    check_threads(threads)
    own = own_fields(KernelSetSpec, vars(MeanFieldParameters(**settings)))
    wanted = KernelSetSpec(
        _bandwidths(bilateral, theta_gamma, image)[0], num_labels=num_labels, **own
    )
    masks = inputs.masks_by_item(mask, len(image), image.shape[2:])
    return _build(image, [wanted] * len(image), spacing, masks, threads, copy=copy)


def _bandwidths(
    bilateral: Sequence[tuple[Values, Values]], gamma: Values | None, image: Tensor
) -> tuple[tuple[KernelSpec, ...], tuple[Tensor, Tensor, Tensor | None]]:
    """Return the kernels for images (B, M, *grid), and their bandwidths (kernels, axes), (kernels, M) and of the spatial kernel (axes,)."""
    # The bandwidths are float64: rounded ones would give a lattice with different vertices.
    num_modalities, num_axes, dtype = image.shape[1], image.ndim - 2, torch.float64
    named = [(f"bilateral.{m}", *thetas) for m, thetas in enumerate(bilateral)]
    positions = [
        _spread(alpha, num_axes, f"{name}.theta_alpha", dtype, is_positive=True)
        for name, alpha, _ in named
    ]
    intensities = [
        _spread(beta, num_modalities, f"{name}.theta_beta", dtype, is_positive=True)
        for name, _, beta in named
    ]
    spatial = (
        None
        if gamma is None
        else _spread(gamma, num_axes, "spatial.theta_gamma", dtype, is_positive=True)
    )
    terms = [
        KernelSpec(tuple(alpha.tolist()), tuple(beta.tolist()))
        for alpha, beta in zip(positions, intensities, strict=True)
    ]
    terms += [] if spatial is None else [KernelSpec(tuple(spatial.tolist()))]
    return tuple(terms), (
        _stack(positions, num_axes, dtype),
        _stack(intensities, num_modalities, dtype),
        spatial,
    )


def _build(
    image: Tensor,
    specs: Sequence[KernelSetSpec],
    spacing: inputs.Spacing | None,
    masks: Sequence[Tensor | None],
    threads: int | None,
    *,
    copy: bool,
) -> list[Kernels]:
    """Return the kernels of each batch item."""
    dtype = inputs.compute_dtype(image)
    engine = inputs.engine_for(image.device, dtype)
    matters = specs[0].positions != "voxels" and len(specs[0].kernels) > 0
    known = notices.assumed_spacing(matters=matters) if spacing is None else spacing
    plain: Any = known.detach().cpu().numpy() if isinstance(known, Tensor) else known
    rows = (
        plain if np.ndim(plain) == 2 and len(plain) == len(image) else [plain] * len(image)
    )  # one per item of the batch
    steps = [given_spacing(row, image.ndim - 2) for row in rows]
    context = RunContext(threads or torch.get_num_threads())
    where = _HOST if engine.name.startswith("torch") else image.device
    result: list[Kernels] = []
    for index, (item, inside) in enumerate(zip(image.detach(), masks, strict=True)):
        inputs.check_finite(item, index)
        grid = GridImage(
            to_array(item.to(where, dtype, copy=copy)),
            None if inside is None else inside.cpu().numpy(),
            steps[index],
        )
        result.append(engine.kernels(grid, specs[index], context))
    return result


def _spread(
    value: Values, size: int, name: str, dtype: torch.dtype, *, is_positive: bool = False
) -> Tensor:
    """Return a tensor of `size` values on the CPU from one value for all, or from one each."""
    expected = f"expected one {'positive' if is_positive else 'finite'} value{f' or {size}' if size > 1 else ''}"
    if isinstance(value, list | tuple) and any(isinstance(entry, Tensor) for entry in value):
        raise InputError(
            f"{name} is a list of tensors, whose gradients would be lost; pass one tensor (torch.stack)"
        )
    try:
        # A plain number must not pass through PyTorch's default type, which has fewer digits.
        tensor = (
            value.to(_HOST, dtype)
            if isinstance(value, Tensor)
            else torch.as_tensor(value, dtype=dtype, device=_HOST)
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is {value!r}; {expected}") from error
    values = tensor.detach()
    are_usable = torch.isfinite(values) & (values > 0.0) if is_positive else torch.isfinite(values)
    if tensor.numel() not in (1, size) or tensor.ndim > 1 or not are_usable.all():
        raise InputError(f"{name} is {values.tolist()}; {expected}")
    return tensor.reshape(-1).expand(size)


def _stack(rows: Sequence[Tensor], size: int, dtype: torch.dtype) -> Tensor:
    """Return the matrix of any number of rows."""
    return torch.cat(
        [torch.zeros(0, size, dtype=dtype, device=_HOST), *(row[None] for row in rows)]
    )


def _double(tensor: Tensor) -> NDArray[np.float64]:
    """Return a copy of the values: a spec must not change with the tensor."""
    return np.array(tensor.detach().double().cpu().numpy())
