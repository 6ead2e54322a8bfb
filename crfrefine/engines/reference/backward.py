"""The backward pass of the mean field with dense N x N matrices, in float64: the reference for the gradients of every engine.

Nothing is recomputed, filtered or summed cleverly: full gradient matrices are formed and reduced
(docs/reference/math.md has the equations).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.base.array_types import Float64
from crfrefine.engines.reference.mean_field import (
    Filter,
    MeanFieldTrace,
    NormalizedKernel,
    softmax_gradient,
    volume_term,
    with_bias,
    with_penalties,
)

if TYPE_CHECKING:
    from crfrefine.parameters.specs import MeanFieldSpec


@dataclass(frozen=True)
class Gradients:
    """Gradients of a loss."""

    logits: Float64  # (N, L)
    weights: Float64  # (kernels, L)
    compatibility: Float64  # (L, L), including the diagonal
    temperature: float  # number
    bias: Float64  # (L,)
    volume_slack: float  # number; 0 without a volume term
    features: tuple[Float64, ...]  # (N, D) per kernel, with respect to its features


def mean_field_backward(
    trace: MeanFieldTrace,
    gradient: Float64,
    logits: Float64,
    kernels: Sequence[Filter],
    features: Sequence[Float64],
    spec: MeanFieldSpec,
    *,
    normalization: str,
) -> Gradients:
    """Return the gradients of a loss with respect to all inputs of `mean_field`.

    Args:
        trace: the run.
        gradient: (N, L), gradient of the loss with respect to the run's logits.
        logits: (N, L), input of the run.
        kernels: the plain kernels.
        features: (N, D) of each kernel.
        spec: weights, compatibility, temperature and bias of the run, in float64.
        normalization: "symmetric", "after" or "none".
    """
    num_points, num_channels = logits.shape
    held = np.broadcast_to(np.arange(num_channels), logits.shape)
    plain = [kernel.filter(np.eye(num_points)) for kernel in kernels]
    normalized = [NormalizedKernel(kernel, num_points, normalization).message(np.eye(num_points)) for kernel in kernels]
    by_normalized = [np.zeros((num_points, num_points)) for _ in kernels]
    by_weights = np.zeros((len(kernels), spec.num_labels))
    by_compatibility = np.zeros((spec.num_labels, spec.num_labels))
    by_scores = np.zeros_like(logits)
    by_x = gradient.astype(np.float64)
    part = slice(None) if trace.volume_part is None else trace.volume_part
    volume = volume_term(trace.marginals[0][part], spec)
    by_slack = 0.0
    by_target = np.zeros(num_channels)
    for index in reversed(range(trace.num_iterations)):
        marginals = trace.marginals[index]
        if volume is not None:
            marginals_after = trace.marginals[index + 1][part]
            by_x[part], of_target, of_slack = volume.backward(by_x[part], marginals_after, trace.volume_biases[index])
            by_target += of_target
            by_slack += of_slack
        by_scores += by_x
        by_marginals = np.zeros_like(marginals)
        for kernel, matrix in enumerate(normalized):
            message = matrix @ marginals
            weight = spec.weights[kernel]
            by_sent = -with_penalties(by_x, spec, transpose=True)
            pairs = (message * weight)[:, :, None] * by_x[:, None, :]
            np.subtract.at(by_compatibility, (held[:, :, None], held[:, None, :]), pairs)
            np.add.at(by_weights[kernel], held, message * by_sent)
            by_normalized[kernel] += (by_sent * weight) @ marginals.T
            by_marginals += matrix.T @ (by_sent * weight)
        by_x = softmax_gradient(marginals, by_marginals)
    by_scores += by_x
    if volume is not None and not spec.keeps_counts:  # the masses of the first marginals
        by_scores[part] += softmax_gradient(trace.marginals[0][part], by_target)
    by_features = [
        _by_features(_by_plain(matrix, by_matrix, normalization), matrix, columns)
        for matrix, by_matrix, columns in zip(plain, by_normalized, features, strict=True)
    ]
    by_bias = np.zeros(spec.num_labels)
    np.add.at(by_bias, held, by_scores / spec.temperature)
    return Gradients(
        logits=by_scores / spec.temperature,
        weights=by_weights,
        compatibility=by_compatibility,
        temperature=float(-(by_scores * with_bias(logits, spec.bias)).sum() / spec.temperature**2),
        bias=by_bias,
        volume_slack=by_slack,
        features=tuple(by_features),
    )


def _by_plain(kernel: Float64, by_normalized: Float64, normalization: str) -> Float64:
    """Turn the gradient for the normalized kernel into that for the plain kernel, which also determines the row sums D."""
    row_sum = kernel.sum(axis=1)
    if normalization == "none":
        return by_normalized
    if normalization == "after":
        by_row_sum = -(by_normalized * kernel).sum(axis=1) / row_sum**2
        return np.asarray(by_normalized / row_sum[:, None] + by_row_sum[:, None])
    scale = 1.0 / np.sqrt(row_sum)
    by_scale = (by_normalized * kernel * scale[None, :]).sum(axis=1) + (by_normalized * kernel * scale[:, None]).sum(axis=0)
    return np.asarray(by_normalized * scale[:, None] * scale[None, :] + (-0.5 * scale**3 * by_scale)[:, None])


def _by_features(by_kernel: Float64, kernel: Float64, features: Float64) -> Float64:
    """Turn the gradient for K_ij = exp(-|f_i - f_j|^2 / 2) into that for each f_i."""
    pull = by_kernel * kernel
    pull = pull + pull.T
    return np.stack([(pull * (column[None, :] - column[:, None])).sum(axis=1) for column in features.T], axis=1)
