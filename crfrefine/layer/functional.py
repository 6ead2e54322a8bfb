"""The mean field of the dense CRF as a differentiable function of tensors.

The image must be normalized already; `CrfRnn` does that.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from crfrefine.base import notices
from crfrefine.base.limits import check_threads, run_all
from crfrefine.engines.base import Backend, GridImage, Kernels, RunContext
from crfrefine.errors import InputError
from crfrefine.layer import inputs
from crfrefine.layer.autograd import MeanField, outside_graphs, to_array
from crfrefine.layer.crf_model import (
    HOST,
    CrfModel,
    SomeLabels,
    Term,
    Values,
    make_kernel_set,
    make_model,
)
from crfrefine.layer.gaussian import gaussian_filter as gaussian_filter
from crfrefine.layer.inputs import ItemMasks, Mask, Spacing
from crfrefine.layer.taking_part import labels_taking_part, with_absent_labels
from crfrefine.parameters.sections import KERNELS, MeanFieldParameters
from crfrefine.parameters.specs import KernelSetSpec


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
    spacing: Spacing | None = None,
    mask: Mask = None,
    threads: int | None = None,
    label_threshold: float = 0.0,
    kernels: Sequence[Kernels] | None = None,
    is_checked: bool = False,
    **settings: Any,
) -> Tensor:
    """Refine logits with the dense CRF.

    The result has gradients with respect to logits, image and every parameter that is a tensor.
    Logits, spacing, mask, kernels, result and errors are as in `CrfRnn.forward`, `threads` and
    `label_threshold` as in `CrfRnn`.

    Args:
        logits: (B, L, *grid), higher is better.
        image: (B, M, *grid), intensities on the scale of theta_beta, finite.
        bilateral: weight (one, or L), theta_alpha (one, or one per axis; mm) and theta_beta (one,
            or M) of each appearance kernel.
        spatial: weight and theta_gamma (one, or one per axis; mm) of the smoothness kernel; None
            means no smoothness kernel.
        compatibility: (L, L) penalty; row: label of the neighbor, column: own label; zero
            diagonal. None means Potts.
        temperature: divides the logits, positive.
        bias: added to the logits inside the mask before the temperature divides them; one, or L.
        volume: weight (0 to 1) of the volume term; None means no volume term.
        spacing: mm; one number, one per axis, or (B, axes).
        mask: nonzero where the model applies.
        threads: CPU threads.
        label_threshold: labels whose marginals all stay below it take no part around a tile.
        kernels: one object for each batch item, from `build_kernels`; image, bandwidths, spacing
            and mask are then ignored.
        is_checked: NaN and infinity are not looked for, which saves a wait for a GPU.
        settings: other keys of `[mean_field]` (docs/reference/parameters.md): `num_iterations`,
            `normalization`, `filter` and `positions`. All steps are taken. Other kernels are given
            as `spatial` is, by the names of their tables.

    Raises:
        ConfigError: a setting is out of range; for other errors see `CrfRnn.forward`.

    Source: Krähenbühl & Koltun 2011; Zheng et al. 2015; docs/reference/math.md.
    """
    inputs.check_pair(logits, image)
    terms: list[Term] = [("bilateral", values) for values in bilateral]
    others: dict[str, Any] = {"spatial": spatial, **settings}
    for kind in KERNELS:
        values = others.pop(kind, None)
        if values is not None:
            terms.append((kind, values))
    model = make_model(
        logits.shape[1],
        image.shape[1],
        image.ndim - 2,
        inputs.compute_dtype(logits),
        terms=terms,
        compatibility=compatibility,
        temperature=temperature,
        bias=bias,
        volume=volume,
        # `others` now holds the other keys of `[mean_field]`.
        settings=MeanFieldParameters(label_threshold=label_threshold, **others),
    )
    return refine_batch(
        logits,
        image,
        model,
        spacing=spacing,
        mask=mask,
        threads=threads,
        kernels=kernels,
        is_checked=is_checked,
    )


def refine_batch(
    logits: Tensor,
    image: Tensor,
    model: CrfModel,
    *,
    spacing: Spacing | None,
    mask: Mask,
    threads: int | None,
    kernels: Sequence[Kernels] | None,
    is_checked: bool,
) -> Tensor:
    """Refine logits with a model, which may serve many calls; see `mean_field`."""
    engine = inputs.check_pair(logits, image)
    check_threads(threads)
    dtype = model.weights.dtype
    masks = inputs.masks_by_item(mask, len(logits), logits.shape[2:])
    labels: list[SomeLabels | None] = [None] * len(logits)
    if kernels is None:
        image = image.to(dtype)
        if not is_checked:
            inputs.check_finite(image)
            inputs.check_logits(logits, masks)
        for index, inside in enumerate(masks):
            present = labels_taking_part(logits[index], inside, model)
            labels[index] = SomeLabels.of(present, logits.device)
        kernels = _build(image, model.kernels, spacing, masks, threads, copy=False)
    else:
        _check_kernels(kernels, logits, image, model)
        # Of masks that are not given, kernels know only the number of voxels.
        num_voxels = min(item.num_voxels for item in kernels)
        is_known = mask is not None or num_voxels == logits[0, 0].numel()
        if not is_checked and is_known:
            inputs.check_logits(logits, masks)
        # The kernels were built from the image: it matters now only if its gradient is needed.
        if image.requires_grad:
            image = image.to(dtype)
        else:
            image = logits.new_empty(len(logits), 0)

    values = logits.to(dtype)
    runs = []
    tensors: list[Tensor] = []
    for item, some, item_logits, item_image in zip(kernels, labels, values, image, strict=True):
        channels = item_logits
        if some is not None:
            channels = item_logits[some.on_device]
        part = model.among(some)
        runs.append((item, part.run))
        tensors += [channels, item_image, *part.tensors]
    num_at_once = _num_at_once(engine, kernels)
    results = MeanField.apply(runs, num_at_once, *tensors)  # type: ignore[no-untyped-call]

    items = []
    for result, item_logits, some, inside in zip(results, values, labels, masks, strict=True):
        items.append(with_absent_labels(result, item_logits, model, some, inside))
    refined = inputs.stack_items(items)
    if torch.is_autocast_enabled(logits.device.type):
        return refined
    return refined.to(logits.dtype)


def _check_kernels(
    kernels: Sequence[Kernels], logits: Tensor, image: Tensor, model: CrfModel
) -> None:
    """Raise InputError if kernels were built for another batch, model or image."""
    if len(kernels) != len(logits):
        raise InputError(f"got kernels for {len(kernels)} batch items; the batch has {len(logits)}")
    precision = str(model.weights.dtype).removeprefix("torch.")
    call = (len(model.run.weights), tuple(image.shape[1:]), precision, logits.shape[1])
    for item in kernels:
        built = (len(item.spec.kernels), item.image_shape, item.dtype, item.spec.num_labels)
        if built != call:
            what = "{} terms, an image of shape {} in {}, and {} labels"
            raise InputError(
                f"the kernels were built for {what.format(*built)}; the call has "
                f"{what.format(*call)}; build them anew (`dtype=torch.float64` for float64 logits)"
            )


def _num_at_once(engine: Backend, items: Sequence[object]) -> int:
    """Return how many items of a batch run side by side: all on the CPU engine, else one."""
    are_several = len({id(item) for item in items}) == len(items)
    if are_several and engine.name == "cpu":
        return len(items)
    return 1  # Kernels serve one call at a time.


def build_kernels(
    image: Tensor,
    terms: Sequence[Term],
    *,
    spacing: Spacing | None,
    mask: Mask,
    num_labels: int,
    settings: MeanFieldParameters,
    threads: int | None = None,
    copy: bool = True,
) -> list[Kernels]:
    """Build everything that depends only on images and bandwidths, for `mean_field`.

    Each batch item has an object, which serves one call at a time. Weights of the terms do not
    matter; the type of the image sets the precision. With `copy` the image may be overwritten
    later. Other arguments and the errors are those of `mean_field`.
    """
    spec, _ = make_kernel_set(terms, num_labels, image.shape[1], image.ndim - 2, settings)
    check_threads(threads)
    masks = inputs.masks_by_item(mask, len(image), image.shape[2:])
    inputs.check_finite(image)
    return _build(image, spec, spacing, masks, threads, copy=copy)


def _build(
    image: Tensor,
    spec: KernelSetSpec,
    spacing: Spacing | None,
    masks: ItemMasks,
    threads: int | None,
    *,
    copy: bool,
) -> list[Kernels]:
    if spacing is None:
        spacing = notices.assumed_spacing(
            matters=spec.positions != "voxels" and len(spec.kernels) > 0
        )
    distances = inputs.spacings_by_item(spacing, len(image), image.ndim - 2)
    items = image.detach().unbind()
    dtype = inputs.compute_dtype(image)
    device = image.device
    engine = inputs.engine_for(device, dtype)
    num_at_once = _num_at_once(engine, items)
    context = RunContext(max(1, (threads or torch.get_num_threads()) // num_at_once))
    if engine.name.startswith("torch"):
        device = HOST

    def build(item: Tensor, inside: Tensor | None, steps: Sequence[float]) -> Kernels:
        values = to_array(item.to(device, dtype, copy=copy))
        mask = None if inside is None else inside.cpu().numpy()
        return engine.kernels(GridImage(values, mask, steps), spec, context)

    jobs = [partial(build, *arguments) for arguments in zip(items, masks, distances, strict=True)]
    return run_all(jobs, num_at_once)
