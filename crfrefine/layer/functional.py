"""The mean field of the dense CRF as a differentiable function of tensors.

The image must be normalized already; `CrfRnn` does that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crfrefine.arrays.arguments import given_spacing
from crfrefine.base import notices
from crfrefine.base.limits import check_threads
from crfrefine.engines.base import Backend, GridImage, Kernels, RunContext
from crfrefine.errors import InputError
from crfrefine.layer import inputs
from crfrefine.layer.autograd import MeanField, of_each, outside_graphs, to_array
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
# A learned weight of the volume term is at least this, so that it has a gradient at 0, too. So
# small a term changes marginals by no more than rounding.
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
            `normalization`, `filter` and `positions`. All steps are taken.

    Raises:
        ConfigError: a setting is out of range; for other errors see `CrfRnn.forward`.

    Source: Krähenbühl & Koltun 2011; Zheng et al. 2015; docs/reference/math.md.
    """
    engine = inputs.check_pair(logits, image)
    check_threads(threads)
    checked = MeanFieldParameters(label_threshold=label_threshold, **settings)
    num_labels = logits.shape[1]
    dtype = inputs.compute_dtype(logits)
    thetas = [(alpha, beta) for _, alpha, beta in bilateral]
    _, gamma = spatial or (None, None)
    bandwidths = _bandwidths(thetas, gamma, image)
    image_shape = tuple(image.shape[1:])
    # Given kernels were built from the image: it matters now only if its gradient is needed.
    if kernels is None or image.requires_grad:
        image = image.to(dtype)
    else:
        image = logits.new_empty(len(logits), 0)

    weights = _weights(bilateral, spatial, num_labels, dtype)
    divisor = _spread(temperature, 1, "temperature", dtype, is_positive=True)
    shift = _spread(bias, num_labels, "bias", dtype)
    penalties = _compatibility(compatibility, num_labels, dtype)
    volume_weight = None if volume is None else _volume_weight(volume)
    model = ModelTensors(weights, *bandwidths, penalties, divisor[0], shift, volume_weight)
    run = _run_of(model, checked.num_iterations)

    masks = inputs.masks_by_item(mask, len(logits), logits.shape[2:])
    labels: list[Tensor | None] = [None] * len(logits)
    if kernels is None:
        if not is_checked:
            inputs.check_values(image.detach(), logits, masks)
        wanted = _kernel_set(bandwidths, image, num_labels, checked)
        labels = _labels_taking_part(logits, masks, ModelSpec(wanted, run), label_threshold)
        specs = _specs_by_item(wanted, labels)
        kernels = _build(engine, image, specs, spacing, masks, threads, copy=False)
    else:
        precision = str(dtype).removeprefix("torch.")
        call = _BuiltFor(len(weights), image_shape, precision, num_labels)
        _check_kernels(kernels, len(logits), call)
        if not is_checked and _masks_are_known(kernels, masks, logits[0, 0].numel()):
            inputs.check_logits(logits, masks)

    batch = _Batch(logits.to(dtype), image, labels, masks)
    refined = _refine_batch(batch, kernels, run, model, _num_at_once(engine, kernels))
    if torch.is_autocast_enabled(logits.device.type):
        return refined.to(dtype)
    return refined.to(logits.dtype)


class Bandwidths(NamedTuple):
    """Bandwidths in float64, on the CPU: rounded ones would give a lattice other vertices."""

    position: Tensor  # (bilateral kernels, axes)
    intensity: Tensor  # (bilateral kernels, M)
    spatial: Tensor | None  # (axes,); None without a spatial kernel


class ModelTensors(NamedTuple):
    """The learnable tensors of the CRF, on the CPU, with the names and the order of `GRADIENTS`.

    The host reads these few numbers; on a GPU, it would have to wait for each.
    """

    weights: Tensor  # (kernels, L)
    theta_position: Tensor
    theta_intensity: Tensor
    theta_gamma: Tensor | None
    compatibility: Tensor  # (L, L)
    temperature: Tensor  # ()
    bias: Tensor  # (L,)
    volume_weight: Tensor | None  # (), float64; None without a volume term

    def among(self, labels: Tensor) -> ModelTensors:
        """Return the model of only some of the labels."""
        return self._replace(
            weights=self.weights[:, labels],
            compatibility=self.compatibility[labels][:, labels],
            bias=self.bias[labels],
        )


def _weights(
    bilateral: Sequence[tuple[Values, Values, Values]],
    spatial: tuple[Values, Values] | None,
    num_labels: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the (kernels, L) weights, the spatial kernel last."""
    rows = []
    for number, (weight, _, _) in enumerate(bilateral):
        rows.append(_spread(weight, num_labels, f"bilateral.{number}.weight", dtype))
    if spatial is not None:
        rows.append(_spread(spatial[0], num_labels, "spatial.weight", dtype))
    return _stack(rows, num_labels, dtype)


def _compatibility(matrix: Tensor | None, num_labels: int, dtype: torch.dtype) -> Tensor:
    """Return the penalties (L, L), Potts for None; raise InputError if they cannot be used."""
    if matrix is None:
        return 1.0 - torch.eye(num_labels, dtype=dtype, device=_HOST)
    penalties = matrix.to(_HOST, dtype)
    shape = (num_labels, num_labels)
    if penalties.shape != shape or not torch.isfinite(penalties.detach()).all():
        raise InputError(
            f"compatibility: expected ({num_labels}, {num_labels}) finite penalties, got a tensor "
            f"{tuple(penalties.shape)}"
        )
    return penalties


def _volume_weight(volume: Tensor | float) -> Tensor:
    """Return the weight of the volume term; raise ConfigError if it is out of range."""
    weight = torch.as_tensor(volume, dtype=torch.float64, device=_HOST).reshape(())
    VolumeParameters(weight=float(weight.detach()))  # raises if it is out of range
    return weight


def _run_of(model: ModelTensors, num_iterations: int) -> MeanFieldSpec:
    volume_weight = 0.0
    if model.volume_weight is not None:
        volume_weight = float(model.volume_weight.detach())
        if model.volume_weight.requires_grad:
            volume_weight = max(volume_weight, _MIN_LEARNED)
    bias = None
    if model.bias.detach().any():
        bias = _double(model.bias)
    return MeanFieldSpec(
        _double(model.weights),
        _double(model.compatibility),
        num_iterations,
        temperature=float(model.temperature.detach()),
        bias=bias,
        volume_weight=volume_weight,
    )


def _labels_taking_part(
    logits: Tensor, masks: Sequence[Tensor | None], model: ModelSpec, label_threshold: float
) -> list[Tensor | None]:
    """Return the labels of each batch item that take part; None means all."""
    everything: list[Tensor | None] = [None] * len(logits)
    # Of two labels, both take part always.
    if label_threshold == 0.0 or model.mean_field.volume_weight > 0.0 or logits.shape[1] == 2:
        return everything
    thresholds = find_thresholds(label_threshold, model)
    if thresholds.leave_out_nothing:
        return everything
    labels = []
    for item, inside in zip(logits, masks, strict=True):
        labels.append(_present(item, inside, model.mean_field, thresholds.present))
    return labels


def _specs_by_item(wanted: KernelSetSpec, labels: Sequence[Tensor | None]) -> list[KernelSetSpec]:
    """Return the kernels of each batch item, for the number of its labels that take part."""
    specs = []
    for item_labels in labels:
        if item_labels is None:
            specs.append(wanted)
        else:
            specs.append(replace(wanted, num_labels=len(item_labels)))
    return specs


class _BuiltFor(NamedTuple):
    """The properties of kernels that a call can compare with its own arguments."""

    num_terms: int
    image_shape: tuple[int, ...]
    precision: str  # "float32" or "float64"
    num_labels: int


def _check_kernels(kernels: Sequence[Kernels], num_items: int, call: _BuiltFor) -> None:
    """Raise InputError if kernels were built for another batch, model or image."""
    if len(kernels) != num_items:
        raise InputError(f"got kernels for {len(kernels)} batch items; the batch has {num_items}")
    for item in kernels:
        built = _BuiltFor(
            len(item.spec.kernels), item.image_shape, item.dtype, item.spec.num_labels
        )
        if built != call:
            raise InputError(
                f"the kernels were built for {built.num_terms} terms, an image of shape "
                f"{built.image_shape} in {built.precision}, and {built.num_labels} labels; the "
                f"call has {call.num_terms} terms, {call.image_shape} in {call.precision}, and "
                f"{call.num_labels} labels; build them anew (`dtype=torch.float64` for float64 "
                "logits)"
            )


def _masks_are_known(
    kernels: Sequence[Kernels], masks: Sequence[Tensor | None], grid_size: int
) -> bool:
    """Return whether a call with given kernels tells which logits count.

    Kernels tell only how many voxels their mask has.
    """
    for item, inside in zip(kernels, masks, strict=True):
        if inside is None and item.num_voxels != grid_size:
            return False
    return True


def _present(
    logits: Tensor, inside: Tensor | None, run: MeanFieldSpec, thresholds: NDArray[np.float64]
) -> Tensor | None:
    """Return the labels whose log-probability exceeds their threshold somewhere inside the mask.

    The thresholds are (L,). At least two labels are returned; None means that all take part.
    """
    values = logits.detach().float()
    if run.bias is not None:
        bias = torch.as_tensor(run.bias, dtype=values.dtype, device=values.device)
        values = values + _per_label(bias, values.ndim)
    values = values / run.temperature
    # A label that is the likeliest one somewhere has a log-probability of -log(L) or more there.
    if thresholds.max() < -math.log(len(values)) and _are_likeliest(values, inside):
        return None
    log_sums = values.logsumexp(0)
    # This takes one label at a time, to avoid another array of all labels.
    maxima = []
    for channel in values:
        log_probability = channel - log_sums
        if inside is not None:
            log_probability = log_probability[inside]
        maxima.append(log_probability.amax())
    largest = torch.stack(maxima)

    takes_part = ~(largest.cpu() <= torch.from_numpy(thresholds))  # True for NaN
    if int(takes_part.sum()) < 2:
        takes_part[largest.topk(2).indices.cpu()] = True
    if takes_part.all():
        return None
    return takes_part.nonzero().squeeze(1)


def _are_likeliest(logits: Tensor, inside: Tensor | None) -> bool:
    """Return whether each label has the largest logit of a voxel inside the mask."""
    largest = logits[0]
    for channel in logits[1:]:
        largest = torch.maximum(largest, channel)
    somewhere = []
    for channel in logits:
        is_largest = channel >= largest
        if inside is not None:
            is_largest = is_largest & inside
        somewhere.append(is_largest.any())
    return bool(torch.stack(somewhere).all())


def _per_label(values: Tensor, num_dims: int) -> Tensor:
    """Return (L,) values in the shape (L, 1, ...), for arrays (L, *grid)."""
    return values.reshape(-1, *[1] * (num_dims - 1))


class _Batch(NamedTuple):
    """The items of a batch: tensors of the precision of the computation, and their settings."""

    logits: Tensor  # (B, L, *grid)
    image: Tensor  # (B, M, *grid)
    labels: Sequence[Tensor | None]  # of each item, those that take part; None means all
    masks: Sequence[Tensor | None]


def _refine_batch(
    batch: _Batch,
    kernels: Sequence[Kernels],
    run: MeanFieldSpec,
    model: ModelTensors,
    num_at_once: int,
) -> Tensor:
    """Return the refined logits (B, L, *grid); `num_at_once` items run side by side."""
    runs = []
    tensors: list[Tensor | None] = []
    for item, logits, image, labels in zip(
        kernels, batch.logits, batch.image, batch.labels, strict=True
    ):
        item_run, *item_tensors = _inputs_of_item(run, logits, image, model, labels)
        runs.append((item, item_run))
        tensors += item_tensors
    results = MeanField.apply(runs, num_at_once, *tensors)  # type: ignore[no-untyped-call]

    refined = []
    for result, logits, labels, inside in zip(
        results, batch.logits, batch.labels, batch.masks, strict=True
    ):
        refined.append(_with_absent_labels(result, logits, model, labels, inside))
    return inputs.stack_items(refined)


def _num_at_once(engine: Backend, items: Sequence[object]) -> int:
    """Return how many items of a batch run side by side: all on the CPU engine, else one."""
    are_several = len({id(item) for item in items}) == len(items)
    if are_several and engine.name == "cpu":
        return len(items)
    return 1  # Kernels serve one call at a time.


def _inputs_of_item(
    run: MeanFieldSpec,
    logits: Tensor,
    image: Tensor,
    model: ModelTensors,
    labels: Tensor | None,
) -> tuple[Any, ...]:
    """Return the run of a batch item in which only some labels take part, and its `ItemInputs`.

    `labels` has those that take part; None means all.
    """
    if labels is None:
        return run, logits, image, *model
    numbers = labels.numpy()
    weights = run.weights[:, numbers]
    penalties = run.compatibility[np.ix_(numbers, numbers)]
    bias = None if run.bias is None else run.bias[numbers]
    part_of_run = replace(run, weights=weights, compatibility=penalties, bias=bias)
    return part_of_run, logits[labels.to(logits.device)], image, *model.among(labels)


def _with_absent_labels(
    refined: Tensor,
    logits: Tensor,
    model: ModelTensors,
    labels: Tensor | None,
    inside: Tensor | None,
) -> Tensor:
    """Return the refined logits (L, *grid) of a batch item in which only some labels took part.

    Each of the others gets the largest penalty of these, since its own cannot be smaller.
    """
    if labels is None:
        return refined
    places = labels.to(logits.device)
    shift = _per_label(model.bias.to(logits), logits.ndim)
    if inside is not None:
        shift = shift * inside
    unrefined = (logits + shift) / model.temperature.to(logits)
    penalty = (refined - unrefined[places]).detach().amin(0)
    return (unrefined + penalty).index_copy(0, places, refined)


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
    """Build everything that depends only on images and bandwidths, for `mean_field`.

    Each batch item has an object, which serves one call at a time. Arguments and errors are those
    of `mean_field`, but `bilateral` has no weights; the type of the image sets the precision.
    Without `copy` the image must never be overwritten.
    """
    inputs.check_image(image)
    check_threads(threads)
    checked = MeanFieldParameters(**settings)
    bandwidths = _bandwidths(bilateral, theta_gamma, image)
    wanted = _kernel_set(bandwidths, image, num_labels, checked)
    masks = inputs.masks_by_item(mask, len(image), image.shape[2:])
    inputs.check_finite(image.detach())
    engine = inputs.engine_for(image.device, inputs.compute_dtype(image))
    return _build(engine, image, [wanted] * len(image), spacing, masks, threads, copy=copy)


def _bandwidths(
    bilateral: Sequence[tuple[Values, Values]], gamma: Values | None, image: Tensor
) -> Bandwidths:
    dtype = torch.float64
    num_modalities = image.shape[1]
    num_axes = image.ndim - 2
    positions = []
    intensities = []
    for m, (alpha, beta) in enumerate(bilateral):
        name = f"bilateral.{m}.theta_alpha"
        positions.append(_spread(alpha, num_axes, name, dtype, is_positive=True))
        name = f"bilateral.{m}.theta_beta"
        intensities.append(_spread(beta, num_modalities, name, dtype, is_positive=True))
    spatial = None
    if gamma is not None:
        spatial = _spread(gamma, num_axes, "spatial.theta_gamma", dtype, is_positive=True)
    position = _stack(positions, num_axes, dtype)
    intensity = _stack(intensities, num_modalities, dtype)
    return Bandwidths(position, intensity, spatial)


def _kernel_set(
    bandwidths: Bandwidths, image: Tensor, num_labels: int, settings: MeanFieldParameters
) -> KernelSetSpec:
    """Return the kernels as engines take them."""
    moved = [image, *(value for value in bandwidths if value is not None)]
    # A gradient of the image takes the same sums as one of the bandwidths.
    moves_bandwidths = torch.is_grad_enabled() and any(value.requires_grad for value in moved)
    kernels = []
    for alpha, beta in zip(bandwidths.position, bandwidths.intensity, strict=True):
        kernels.append(KernelSpec(tuple(alpha.tolist()), tuple(beta.tolist())))
    if bandwidths.spatial is not None:
        kernels.append(KernelSpec(tuple(bandwidths.spatial.tolist())))
    fields = own_fields(KernelSetSpec, vars(settings))
    return KernelSetSpec(
        tuple(kernels), num_labels=num_labels, moves_bandwidths=moves_bandwidths, **fields
    )


def _build(
    engine: Backend,
    image: Tensor,
    specs: Sequence[KernelSetSpec],
    spacing: inputs.Spacing | None,
    masks: Sequence[Tensor | None],
    threads: int | None,
    *,
    copy: bool,
) -> list[Kernels]:
    if spacing is None:
        is_used = specs[0].positions != "voxels" and len(specs[0].kernels) > 0
        spacing = notices.assumed_spacing(matters=is_used)
    distances: Any = spacing
    if isinstance(spacing, Tensor):
        distances = spacing.detach().cpu().numpy()
    if np.ndim(distances) != 2 or len(distances) != len(image):
        distances = [distances] * len(image)
    distances = [given_spacing(row, image.ndim - 2) for row in distances]
    items = image.detach().unbind()
    num_at_once = _num_at_once(engine, items)
    context = RunContext(max(1, (threads or torch.get_num_threads()) // num_at_once))
    dtype = inputs.compute_dtype(image)
    device = image.device
    if engine.name.startswith("torch"):
        device = _HOST

    def build(index: int) -> Kernels:
        values = to_array(items[index].to(device, dtype, copy=copy))
        inside = masks[index]
        mask = None if inside is None else inside.cpu().numpy()
        grid = GridImage(values, mask, distances[index])
        return engine.kernels(grid, specs[index], context)

    return of_each(build, len(image), num_at_once)


def _spread(
    value: Values, size: int, name: str, dtype: torch.dtype, *, is_positive: bool = False
) -> Tensor:
    """Return a tensor of `size` values on the CPU, from one value for all, or from one each.

    Raises InputError, naming the argument, for other numbers of values, and for values that are
    not finite, or not positive.
    """
    kind = "positive" if is_positive else "finite"
    expected = f"expected one {kind} value"
    if size > 1:
        expected += f" or {size}"
    if isinstance(value, list | tuple) and any(isinstance(entry, Tensor) for entry in value):
        raise InputError(
            f"{name} is a list of tensors, whose gradients would be lost; pass one tensor "
            "(torch.stack)"
        )
    try:
        if isinstance(value, Tensor):
            tensor = value.to(_HOST, dtype)
        else:
            # A number must not pass through PyTorch's default type, which has fewer digits.
            tensor = torch.as_tensor(value, dtype=dtype, device=_HOST)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is {value!r}; {expected}") from error

    values = tensor.detach()
    are_usable = torch.isfinite(values)
    if is_positive:
        are_usable = are_usable & (values > 0.0)
    if tensor.numel() not in (1, size) or tensor.ndim > 1 or not are_usable.all():
        raise InputError(f"{name} is {values.tolist()}; {expected}")
    return tensor.reshape(-1).expand(size)


def _stack(rows: Sequence[Tensor], size: int, dtype: torch.dtype) -> Tensor:
    """Return the (rows, size) matrix; it may have no rows."""
    empty = torch.zeros(0, size, dtype=dtype, device=_HOST)
    return torch.cat([empty, *[row[None] for row in rows]])


def _double(tensor: Tensor) -> NDArray[np.float64]:
    """Return a copy of the values in float64: a spec must not change with the tensor."""
    return np.array(tensor.detach().double().cpu().numpy())
