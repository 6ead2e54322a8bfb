"""The mean field of the dense CRF as a differentiable function of tensors: the computation of `CrfRnn` without a module.

The image must be normalized; `crfrefine.CrfRnn` takes raw intensities. Needs PyTorch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.base import notices
from crfrefine.errors import BackendUnavailableError, InputError

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise BackendUnavailableError(f"the trainable layer needs PyTorch ({error}): pip install 'crfrefine[train]'") from error

from crfrefine.base.threads import check_threads
from crfrefine.engines.base import RunContext
from crfrefine.engines.grid_image import GridImage
from crfrefine.layer import inputs
from crfrefine.layer.autograd import MeanField, outside_graphs, to_array
from crfrefine.parameters.sections import MeanFieldParameters, VolumeParameters
from crfrefine.parameters.specs import KernelSetSpec, KernelSpec, MeanFieldSpec, ModelSpec
from crfrefine.refinement.tiles.survey import find_thresholds

if TYPE_CHECKING:
    from crfrefine.engines.base import Kernels

__all__ = ["build_kernels", "mean_field"]

_HOST = torch.device("cpu")

Values = Tensor | Sequence[float] | float | np.number[Any] | NDArray[Any]
"""One number for all labels, axes or modalities, or one each."""

MIN_LEARNED = 1e-6
"""Weight of the volume term instead of 0 where it is learned: it changes marginals by rounding, and its slope is that at 0."""


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
    num_iterations: int = 5,
    normalization: str = "symmetric",
    filter: str = "auto",  # noqa: A002 - the parameter's name in the configuration
    positions: str = "mm",
    threads: int | None = None,
    label_threshold: float = 0.0,
    kernels: Sequence[Kernels] | None = None,
) -> Tensor:
    """Refine logits with the dense CRF, differentiable in logits, image and every parameter that is a tensor.

    Args:
        logits: (B, L, *grid), higher is better. float64 is computed in float64, by plain tensor
            operations; every other type in float32.
        image: (B, M, *grid), intensities on the scale of theta_beta, finite.
        bilateral: weight (one, or L), theta_alpha (one, or one per axis; mm) and theta_beta (one, or M) of each appearance kernel.
        spatial: weight and theta_gamma (one, or one per axis; mm) of the smoothness kernel; None means no smoothness kernel.
        compatibility: (L, L) penalty; row: label of the neighbor, column: own label; zero diagonal. None: Potts.
        temperature: divides the logits, positive.
        bias: added to the logits inside the mask before the temperature divides them; one, or L.
        volume: weight (0 to 1) of the volume term; None means no volume term.
        spacing: mm; one number, one per axis, or (B, axes). None: 1 mm, with a warning if it matters.
        mask: nonzero where the model applies; (*grid), (B, *grid) or (B, 1, *grid). None: everywhere.
        num_iterations: number of steps; all are taken.
        normalization: "symmetric" or "after".
        filter: "auto", "exact", "truncated", "lattice" or "grid" (one or two modalities; on the CPU float32).
        positions: "mm", or "voxels": bandwidths count voxels, the spacing is not used.
        threads: None: as many as `torch.get_num_threads()`.
        label_threshold: on the CPU in float32, on grids of up to three axes: labels whose marginals all stay below it around a tile take no
            part there. 0: all labels everywhere.
        kernels: one for each batch item, from `build_kernels`; image, bandwidths, spacing and mask are then ignored.

    Returns:
        (B, L, *grid) refined logits in the type of `logits` (under `torch.autocast` at least float32); their softmax over labels are
        the marginals. Outside the mask: logits / temperature.

    Raises:
        InputError: shapes do not fit, an empty mask, logits that hold NaN or +infinity inside the mask, an image that is not finite, a
            bandwidth or temperature that is not positive.
        ConfigError: a setting is not one of its allowed words, or is out of range.
        BackendUnavailableError: there is no engine for the tensors' device.
        CapacityError: not enough memory, or bandwidths too small for the lattice.

    Source: Krähenbühl & Koltun 2011; Zheng et al. 2015; docs/reference/math.md.
    """
    inputs.check_pair(logits, image)
    inputs.engine_for(logits.device, logits.dtype)
    check_threads(threads)
    settings = MeanFieldParameters(
        num_iterations=num_iterations,
        normalization=normalization,
        filter=filter,
        positions=positions,
        label_threshold=label_threshold,
    )
    num_labels, image_shape = logits.shape[1], tuple(image.shape[1:])
    dtype = inputs.compute_dtype(logits)
    out_dtype = dtype if torch.is_autocast_enabled(logits.device.type) else logits.dtype
    # The host reads these few numbers: from a GPU, each look at one would wait for it.
    spread = functools.partial(_spread, dtype=dtype)
    weights = [spread(weight, num_labels, f"bilateral.{m}.weight") for m, (weight, _, _) in enumerate(bilateral)]
    thetas = _Thetas([kernel[1:] for kernel in bilateral], None if spatial is None else spatial[1], image)
    if spatial is not None:
        weights.append(spread(spatial[0], num_labels, "spatial.weight"))
    # Given kernels were built from the image: it matters now only if its gradient is needed.
    image = image.to(dtype) if kernels is None or image.requires_grad else logits.new_empty(len(logits), 0)
    divisor = spread(temperature, 1, "temperature")
    _positive(divisor, "temperature")
    matrix = _matrix(compatibility, num_labels, dtype)
    shift = spread(bias, num_labels, "bias")
    kept, least = _volume(volume)
    for name, values in (("weight", torch.cat(weights) if weights else divisor), ("compatibility", matrix), ("bias", shift)):
        if not torch.isfinite(values.detach()).all():
            raise InputError(f"{name} holds values that are not finite (NaN or infinity)")
    weight = torch.stack(weights) if weights else torch.zeros(0, num_labels, dtype=dtype, device=_HOST)
    parameters = (
        weight,
        torch.stack(thetas.position) if bilateral else torch.zeros(0, logits.ndim - 2, dtype=torch.float64, device=_HOST),
        torch.stack(thetas.intensity) if bilateral else torch.zeros(0, image_shape[0], dtype=torch.float64, device=_HOST),
        thetas.spatial,
        matrix,
        divisor[0],
        shift,
        kept,
    )
    run = MeanFieldSpec(
        _double(weight),
        _double(matrix),
        num_iterations,
        temperature=float(divisor[0].detach()),
        bias=_double(shift) if shift.detach().any() else None,
        volume_weight=0.0 if kept is None else max(float(kept.detach()), least),
    )
    masks = inputs.masks_by_item(mask, len(logits), logits.shape[2:])
    labels: list[Tensor | None] = [None] * len(logits)
    if kernels is None:
        wanted = thetas.resolve(settings, num_labels)
        if label_threshold > 0.0 and run.volume_weight == 0.0:
            thresholds = find_thresholds(label_threshold, ModelSpec(wanted, run))
            if thresholds is not None:
                labels = [_present(item, inside, run, thresholds.present) for item, inside in zip(logits, masks, strict=True)]
        counts = [num_labels if of_item is None else len(of_item) for of_item in labels]
        kernels = _build(image, wanted, _known_spacing(spacing, wanted), masks, threads, copy=False, num_labels=counts)
    _check_kernels(kernels, len(logits), len(weights), image_shape, str(dtype).removeprefix("torch."))
    if mask is not None or all(item.num_voxels == logits[0, 0].numel() for item in kernels):  # else only the kernels know their mask
        inputs.check_logits(logits, masks)
    items = [
        _refine_item(item, run, item_logits.to(dtype), item_image, parameters, of_item, inside)
        for item, item_logits, item_image, of_item, inside in zip(kernels, logits, image, labels, masks, strict=True)
    ]
    refined = items[0].unsqueeze(0) if len(items) == 1 else torch.stack(items)  # A stack of one would be a copy.
    return refined.to(out_dtype)


def _present(logits: Tensor, inside: Tensor | None, run: MeanFieldSpec, thresholds: NDArray[np.float64]) -> Tensor | None:
    """Return the labels whose probability exceeds their threshold somewhere inside the mask; None means all labels take part.

    Args:
        logits: (L, *grid).
        inside: (*grid), True where the model applies; None means everywhere.
        run: with temperature and bias.
        thresholds: (L,) logarithms of probabilities.
    """
    values = logits.detach().float()
    if run.bias is not None:
        values = values + torch.as_tensor(run.bias, dtype=values.dtype, device=values.device).reshape(-1, *[1] * (values.ndim - 1))
    values = values / run.temperature
    log_sums = values.logsumexp(0)
    # One label at a time, to avoid another array of all labels.
    largest = torch.stack([(channel - log_sums if inside is None else (channel - log_sums)[inside]).amax() for channel in values])
    is_there = ~(largest.cpu() <= torch.as_tensor(thresholds))  # True for NaN
    if int(is_there.sum()) < 2:
        is_there[largest.topk(2).indices.cpu()] = True
    return None if is_there.all() else is_there.nonzero().squeeze(1)


def _refine_item(
    kernels: Kernels,
    run: MeanFieldSpec,
    logits: Tensor,
    image: Tensor,
    parameters: Sequence[Tensor | None],
    labels: Tensor | None,
    inside: Tensor | None,
) -> Tensor:
    """Return the refined logits (L, *grid) of a batch item in which only some labels take part, or with None all.

    The other labels get the largest penalty of those that take part, since theirs cannot be smaller.
    """
    if labels is None:
        refined: Tensor = MeanField.apply(kernels, run, logits, image, *parameters)  # type: ignore[no-untyped-call]
        return refined
    weight, position, intensity, spatial, matrix, temperature, bias, volume = parameters
    assert weight is not None
    assert matrix is not None
    assert temperature is not None
    assert bias is not None
    numbers, own = labels.numpy(), labels.to(logits.device)
    spec = replace(
        run,
        weights=run.weights[:, numbers],
        compatibility=run.compatibility[np.ix_(numbers, numbers)],
        bias=None if run.bias is None else run.bias[numbers],
    )
    changed = weight[:, labels], position, intensity, spatial, matrix[labels][:, labels], temperature, bias[labels], volume
    refined = MeanField.apply(kernels, spec, logits[own], image, *changed)  # type: ignore[no-untyped-call]
    shift = bias.to(logits).reshape(-1, *[1] * (logits.ndim - 1))
    alone = (logits + (shift if inside is None else shift * inside)) / temperature.to(logits)
    penalty = (refined - alone[own]).detach().amin(0)
    return (alone + penalty).index_copy(0, own, refined)


def build_kernels(
    image: Tensor,
    *,
    bilateral: Sequence[tuple[Values, Values]],
    theta_gamma: Values | None = None,
    spacing: inputs.Spacing | None = None,
    mask: inputs.Mask | None = None,
    normalization: str = "symmetric",
    filter: str = "auto",  # noqa: A002 - the parameter's name in the configuration
    positions: str = "mm",
    num_labels: int,
    num_iterations: int = 5,
    threads: int | None = None,
    copy: bool = True,
) -> list[Kernels]:
    """Build everything that depends only on images and bandwidths, for many calls of `mean_field` while these stay the same.

    Arguments are those of `mean_field`, with `bilateral` without weights; the image's type, float32 or float64, sets the precision. The
    kernels keep their own copy of the image, which the backward pass reads again; without `copy` it must never be overwritten.

    Returns:
        One object for each batch item; each may be used in one call at a time.

    Raises:
        InputError, ConfigError, BackendUnavailableError, CapacityError: as `mean_field`.
    """
    inputs.check_image(image)
    inputs.engine_for(image.device)
    check_threads(threads)
    settings = MeanFieldParameters(num_iterations=num_iterations, normalization=normalization, filter=filter, positions=positions)
    wanted = _Thetas(bilateral, theta_gamma, image).resolve(settings, num_labels)
    masks = inputs.masks_by_item(mask, len(image), image.shape[2:])
    return _build(image, wanted, _known_spacing(spacing, wanted), masks, threads, copy=copy)


def _known_spacing(spacing: inputs.Spacing | None, wanted: KernelSetSpec) -> inputs.Spacing:
    """Return the spacing, or 1 mm with a warning; it matters if there is a kernel in mm."""
    return notices.known_spacing(spacing, matters=wanted.positions != "voxels" and len(wanted.kernels) > 0)


_ALPHA, _BETA, _GAMMA = "bilateral.{}.theta_alpha", "bilateral.{}.theta_beta", "spatial.theta_gamma"


class _Thetas:
    """Bandwidths for images (B, M, *grid) with all their digits: rounded ones would give a lattice with different vertices.

    Attributes:
        position: of each appearance kernel, one per axis.
        intensity: of each appearance kernel, one per modality.
        spatial: of the spatial kernel, one per axis; None without one.
    """

    def __init__(self, bilateral: Sequence[tuple[Values, Values]], gamma: Values | None, image: Tensor) -> None:
        spread, num_axes = functools.partial(_spread, dtype=torch.float64), image.ndim - 2
        self.position = [spread(alpha, num_axes, _ALPHA.format(m)) for m, (alpha, _) in enumerate(bilateral)]
        self.intensity = [spread(beta, image.shape[1], _BETA.format(m)) for m, (_, beta) in enumerate(bilateral)]
        self.spatial = None if gamma is None else spread(gamma, num_axes, _GAMMA)

    def resolve(self, settings: MeanFieldParameters, num_labels: int) -> KernelSetSpec:
        """Return the kernels; raise InputError for a bandwidth that is not positive."""
        pairs = enumerate(zip(self.position, self.intensity, strict=True))
        wanted = [KernelSpec(_positive(alpha, _ALPHA.format(m)), _positive(beta, _BETA.format(m))) for m, (alpha, beta) in pairs]
        if self.spatial is not None:
            wanted.append(KernelSpec(_positive(self.spatial, _GAMMA)))
        of_run = settings.normalization, settings.filter, num_labels, settings.num_iterations, settings.positions
        return KernelSetSpec(tuple(wanted), *of_run)


def _build(
    image: Tensor,
    wanted: KernelSetSpec,
    spacing: inputs.Spacing,
    masks: Sequence[Tensor | None],
    threads: int | None,
    *,
    copy: bool,
    num_labels: Sequence[int] | None = None,
) -> list[Kernels]:
    """Return the kernels of each batch item; `num_labels` are the labels that take part in each, None means all."""
    engine = inputs.engine_for(image.device, inputs.compute_dtype(image))
    steps = inputs.spacing_by_item(spacing, len(image), image.ndim - 2)
    context = RunContext(threads or torch.get_num_threads())
    result: list[Kernels] = []
    for index, (item, inside) in enumerate(zip(image.detach(), masks, strict=True)):
        inputs.check_finite(item, index)
        where_to = "cpu" if engine.name.startswith("torch") else item.device
        values = to_array(item.to(where_to, inputs.compute_dtype(item), copy=copy))
        where = None if inside is None else inside.cpu().numpy()
        own = wanted if num_labels is None else replace(wanted, num_labels=num_labels[index])
        result.append(engine.kernels(GridImage(values, where, steps[index]), own, context))
    return result


def _spread(value: Values, size: int, name: str, *, dtype: torch.dtype) -> Tensor:
    """Return a tensor of `size` values on the CPU from one value for all, or from one each."""
    if isinstance(value, list | tuple) and any(isinstance(one, Tensor) for one in value):
        raise InputError(f"{name} is a list of tensors, whose gradients would be lost; pass one tensor (torch.stack)")
    try:
        # A plain number must not pass through PyTorch's default type, which has fewer digits.
        tensor = value.to(_HOST, dtype) if isinstance(value, Tensor) else torch.as_tensor(value, dtype=dtype, device=_HOST)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is {value!r}; expected one number" + (f" or {size}" if size > 1 else "")) from error
    if tensor.numel() not in (1, size) or tensor.ndim > 1:
        raise InputError(f"{name} has shape {tuple(tensor.shape)}; expected one value" + (f" or {size}" if size > 1 else ""))
    return tensor.expand(size) if tensor.ndim else tensor.unsqueeze(0).expand(size)


def _positive(tensor: Tensor, name: str) -> tuple[float, ...]:
    """Return the numbers of a tensor; raise InputError unless they are positive, and so not NaN."""
    values: list[float] = tensor.detach().tolist()
    if not all(0.0 < value < math.inf for value in values):
        raise InputError(f"{name} is {values}; expected positive numbers")
    return tuple(values)


def _volume(volume: Tensor | float | None) -> tuple[Tensor | None, float]:
    """Return the weight of the volume term, and the least weight of the run."""
    if volume is None:
        return None, 0.0
    weight = torch.as_tensor(volume, dtype=torch.float64, device=_HOST).reshape(())
    VolumeParameters(weight=float(weight.detach()))  # checks
    return weight, MIN_LEARNED if weight.requires_grad else 0.0


def _double(tensor: Tensor) -> NDArray[np.float64]:
    """Return a copy of the values: a spec must not change with the tensor."""
    array: NDArray[np.float64] = tensor.detach().double().cpu().numpy().copy()
    return array


def _matrix(compatibility: Tensor | None, num_labels: int, dtype: torch.dtype) -> Tensor:
    if compatibility is None:
        return 1.0 - torch.eye(num_labels, dtype=dtype, device=_HOST)
    if compatibility.shape != (num_labels, num_labels):
        raise InputError(f"compatibility has shape {tuple(compatibility.shape)}; the logits have {num_labels} labels")
    return compatibility.to(device=_HOST, dtype=dtype)


def _check_kernels(kernels: Sequence[Kernels], num_items: int, num_kernels: int, image_shape: tuple[int, ...], dtype: str) -> None:
    if len(kernels) != num_items:
        raise InputError(f"got kernels for {len(kernels)} batch items; the batch has {num_items}")
    for item in kernels:
        if len(item.spec.kernels) != num_kernels:
            raise InputError(f"kernels were built for {len(item.spec.kernels)} terms, the model has {num_kernels}; build them anew")
        if item.image_shape != image_shape or item.dtype != dtype:
            raise InputError(
                f"kernels were built for an image of shape {item.image_shape} in {item.dtype}, the call has {image_shape} in {dtype}; "
                "build them anew (`dtype=torch.float64` for float64 logits)"
            )
