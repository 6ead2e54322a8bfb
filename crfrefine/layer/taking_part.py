"""Which labels of a batch item take part, and the logits of the others afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crfrefine.layer.crf_model import CrfModel
from crfrefine.parameters.specs import MeanFieldSpec, ModelSpec
from crfrefine.refinement.tiles.survey import find_thresholds


def labels_taking_part(
    logits: Tensor, masks: Sequence[Tensor | None], model: CrfModel
) -> list[Tensor | None]:
    """Return the labels of each batch item that take part; None means all.

    The masks may be on another device than the logits (B, L, *grid).
    """
    everything: list[Tensor | None] = [None] * len(logits)
    run = model.run
    # Of two labels, both take part always.
    if model.label_threshold == 0.0 or run.volume_weight > 0.0 or logits.shape[1] == 2:
        return everything
    thresholds = find_thresholds(model.label_threshold, ModelSpec(model.kernels, run))
    if thresholds.leave_out_nothing:
        return everything
    labels = []
    for item, inside in zip(logits, masks, strict=True):
        if inside is not None:
            inside = inside.to(item.device)
        labels.append(_present(item, inside, run, thresholds.present))
    return labels


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


def with_absent_labels(
    refined: Tensor,
    logits: Tensor,
    model: CrfModel,
    labels: Tensor | None,
    inside: Tensor | None,
) -> Tensor:
    """Return the refined logits (L, *grid) of a batch item in which only some labels took part.

    Each of the others gets the largest penalty of these, since its own cannot be smaller.
    """
    if labels is None:
        return refined
    places = labels.to(logits.device)
    shift = _per_label(model.tensors.bias.to(logits), logits.ndim)
    if inside is not None:
        shift = shift * inside.to(shift.device)
    unrefined = (logits + shift) / model.tensors.temperature.to(logits)
    penalty = (refined - unrefined[places]).detach().amin(0)
    return (unrefined + penalty).index_copy(0, places, refined)


def _per_label(values: Tensor, num_dims: int) -> Tensor:
    """Return (L,) values in the shape (L, 1, ...), for arrays (L, *grid)."""
    return values.reshape(-1, *[1] * (num_dims - 1))
