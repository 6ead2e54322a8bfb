"""Which labels of a batch item take part, and the logits of the others afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from crfrefine.base.array_types import Bool, Float64, Floating
from crfrefine.engines.torch.mean_field import divided
from crfrefine.layer.crf_model import CrfModel, SomeLabels
from crfrefine.parameters.specs import MeanFieldSpec, ModelSpec
from crfrefine.refinement.tiles.survey import find_thresholds

# Leads decide only on log-probabilities that are farther than this from a threshold: logits and
# their sums are rounded.
_ROUNDING = 0.01


def labels_taking_part(
    logits: Tensor,
    inside: Tensor | None,
    model: CrfModel,
    leads: Callable[[], Float64] | None = None,
) -> Bool | None:
    """Return which labels (L,) of a batch item's logits (L, *grid) take part; None means all.

    The host waits for a GPU, unless the leads tell: `leads` returns those of `find_leads`.
    """
    # Of two labels, both take part always.
    if model.run.volume_weight > 0.0 or len(logits) == 2:
        return None
    thresholds = find_thresholds(model.label_threshold, ModelSpec(model.kernels, model.run))
    if thresholds.leave_out_nothing:
        return None
    present = None
    if leads is not None:
        present = present_by_leads(leads(), model.run, thresholds.present)
    if present is None:
        present = present_labels(logits, inside, model.run, thresholds.present)
    return None if present.all() else present


def present_labels(
    logits: Tensor, inside: Tensor | None, run: MeanFieldSpec, thresholds: Float64
) -> Bool:
    """Return which labels (L,) exceed their threshold somewhere inside the mask.

    The thresholds (L,) are logarithms of probabilities. If fewer than two labels exceed theirs, the
    two likeliest ones are present. The mask may be on another device than the logits (L, *grid).
    """
    values = logits.detach().float().flatten(1)
    if run.bias is not None:
        values = values + torch.as_tensor(run.bias).to(values)[:, None]
    values = values / run.temperature
    if inside is not None:
        inside = inside.flatten().to(values.device)
    log_sums = values.logsumexp(0)
    # This takes one label at a time, to avoid another array of all labels.
    maxima = []
    for channel in values:
        log_probability = channel - log_sums
        if inside is not None:
            log_probability = log_probability[inside]
        maxima.append(log_probability.amax())
    largest = torch.stack(maxima).cpu().numpy()

    is_present: Bool = ~(largest <= thresholds)  # True for NaN
    if np.count_nonzero(is_present) < 2:
        is_present[np.argsort(largest)[-2:]] = True
    return is_present


def find_leads(logits: Floating, inside: Bool) -> Float64:
    """Return by how much each label (L,) is ahead of all others where it is most ahead.

    Logits (L, *grid) are looked at inside the mask (*grid), which has a voxel. A lead is negative
    for a label that is nowhere the likeliest one.
    """
    # This takes one label at a time, to avoid another array of all labels.
    largest = np.full(np.count_nonzero(inside), -np.inf, np.float32)
    second = largest
    for channel in logits:
        values = channel[inside].astype(np.float32)
        second = np.maximum(second, np.minimum(values, largest))
        largest = np.maximum(largest, values)
    leads = []
    for channel in logits:
        values = channel[inside].astype(np.float32)
        rival = np.where(values == largest, second, largest)
        leads.append(float((values - rival).max()))
    return np.array(leads)


def present_by_leads(leads: Float64, run: MeanFieldSpec, thresholds: Float64) -> Bool | None:
    """Return which labels (L,) `present_labels` would find, only from the leads of the logits.

    None means that the leads do not tell for sure.
    """
    num_labels = len(leads)
    bias = np.zeros(num_labels) if run.bias is None else run.bias
    others = ~np.eye(num_labels, dtype=bool)
    highest_other = np.where(others, bias, -np.inf).max(axis=1)
    lowest_other = np.where(others, bias, np.inf).min(axis=1)
    # With a bias a label is ahead of all others by at least, and at most, so much where it is most
    # ahead.
    least = (leads + bias - highest_other) / run.temperature
    most = (leads + bias - lowest_other) / run.temperature
    # Its log-probability is lowest if all others are as likely as the next one, and highest if all
    # but the next one are impossible.
    at_least = -np.logaddexp(0.0, math.log(num_labels - 1) - least)
    at_most = -np.logaddexp(0.0, -most)
    is_present: Bool = at_least > thresholds + _ROUNDING
    is_absent = at_most < thresholds - _ROUNDING
    if not (is_present | is_absent).all() or np.count_nonzero(is_present) < 2:
        return None
    return is_present


def with_absent_labels(
    refined: Tensor,
    logits: Tensor,
    model: CrfModel,
    labels: SomeLabels | None,
    inside: Tensor | None,
) -> Tensor:
    """Return the refined logits (L, *grid) of a batch item in which only some labels took part.

    Each of the others gets the largest penalty of these, since its own cannot be smaller.
    """
    if labels is None:
        return refined
    places = labels.on_device
    shift = model.bias.to(logits)[:, None]
    if inside is not None:
        shift = shift * inside.flatten().to(shift.device)
    quotients = divided(logits.flatten(1) + shift, model.temperature.to(logits))
    unrefined = quotients.reshape(logits.shape)
    changes = (refined - unrefined[places]).detach()
    # A label that is forbidden at a voxel is at -infinity there, before and after.
    penalty = changes.masked_fill(changes.isnan(), math.inf).amin(0)
    return (unrefined + penalty).index_copy(0, places, refined)
