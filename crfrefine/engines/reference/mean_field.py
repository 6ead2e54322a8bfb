"""The mean-field iteration, its energy and its stopping rule, in float64 over the masked voxels.

Grids, files and the choice of filters are elsewhere: voxels are rows, kernels are objects that filter. docs/reference/math.md has the
equations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.array_types import Bool, Float64
from crfrefine.engines.reference.volume import VolumeTerm

if TYPE_CHECKING:
    from crfrefine.parameters.specs import MeanFieldSpec


FLIPPED_SHARE = 1e-4
"""Share of voxels whose label may still change in a step that counts as converged."""


class Filter(Protocol):
    """A kernel matrix K of N points that can be applied to values."""

    def filter(self, values: Float64) -> Float64:
        """K values, for (N, V) values."""
        ...


class NormalizedKernel:
    """A kernel with its normalization: D^-1/2 K D^-1/2 (symmetric), D^-1 K (after) or K (none), with D = diag(K 1)."""

    def __init__(self, kernel: Filter, num_points: int, normalization: str) -> None:
        """Compute the normalizer.

        Args:
            kernel: the plain kernel.
            num_points: N.
            normalization: "symmetric", "after" or "none".
        """
        self._kernel = kernel
        row_sum = np.ones((num_points, 1)) if normalization == "none" else kernel.filter(np.ones((num_points, 1)))
        self._before = 1.0 / np.sqrt(row_sum) if normalization == "symmetric" else np.ones_like(row_sum)
        self._after = self._before if normalization == "symmetric" else 1.0 / row_sum

    def message(self, values: Float64) -> Float64:
        """Filter (N, V) values."""
        return self._after * self._kernel.filter(self._before * values)


@dataclass(frozen=True)
class MeanFieldTrace:
    """Result of a run."""

    logits: Float64  # x of the last step, (N, L)
    num_iterations: int  # steps taken
    converged: bool  # whether the stopping rule was met
    energy: tuple[float, ...]  # free energy of the marginals at the start of each step
    marginals: tuple[Float64, ...]  # those marginals, (N, L) each; with a volume term those after the last step, too
    volume_biases: tuple[Float64, ...] = ()  # (L,) each, the bias per label of each step; none without a volume term
    volume_part: Bool | None = None  # (N,), where the volume term applies; None: everywhere, or there is no term


def log_softmax(logits: Float64) -> Float64:
    """Logarithm of the softmax over the last axis; finite for any finite logits."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def softmax_gradient(marginals: Float64, by_marginals: Float64) -> Float64:
    """Turn the gradient with respect to (N, L) marginals into that with respect to their logits."""
    return np.asarray(marginals * (by_marginals - (marginals * by_marginals).sum(axis=1, keepdims=True)))


def with_bias(logits: Float64, bias: NDArray[np.floating[Any]] | None) -> Float64:
    """Add the bias (L,) of the labels to (N, L) logits."""
    return logits if bias is None else np.asarray(logits + bias, dtype=np.float64)


def with_penalties(messages: Float64, spec: MeanFieldSpec, *, transpose: bool = False) -> Float64:
    """Multiply (N, L) weighted messages by the compatibility, or by its transpose."""
    return np.asarray(messages @ (spec.compatibility.T if transpose else spec.compatibility), dtype=np.float64)


def volume_term(marginals: Float64, spec: MeanFieldSpec) -> VolumeTerm | None:
    """The volume term of a run whose first marginals are these where the term applies; None without one."""
    return VolumeTerm.of_network(marginals, spec.volume_slack, counts=spec.keeps_counts) if spec.volume_weight > 0.0 else None


def mean_field(
    logits: Float64,
    kernels: Sequence[NormalizedKernel],
    spec: MeanFieldSpec,
    *,
    volume_part: Bool | None = None,
    progress: Callable[[int], None] | None = None,
) -> MeanFieldTrace:
    """Run parallel mean-field updates x = (a + bias) / temperature - pairwise, Q = softmax(x).

    With a volume term, a bias per label is added to each update. The energy is reported and changes nothing. The run has converged when the
    mean KL from the old to the new marginals is below a tolerance and almost no label flips.

    Args:
        logits: a, (N, L), higher is better.
        kernels: of the pairwise terms.
        spec: weights, compatibility, number of steps and all other settings.
        volume_part: (N,), where the volume term applies; None: everywhere.
        progress: called with the number of steps done.
    """
    scores = with_bias(logits, spec.bias) / spec.temperature
    x = scores
    log_marginals = log_softmax(x)
    energies: list[float] = []
    record: list[Float64] = []
    part = slice(None) if volume_part is None else volume_part
    volume = volume_term(np.exp(log_marginals[part]), spec)
    biases: list[Float64] = []
    converged = False
    while len(energies) < spec.num_iterations and not converged:
        marginals = np.exp(log_marginals)
        pairwise = np.zeros_like(x)
        for kernel, weight in zip(kernels, spec.weights, strict=True):
            pairwise += with_penalties(kernel.message(marginals) * weight, spec)
        energy = float((marginals * (log_marginals - scores + 0.5 * pairwise)).sum())
        x = scores - pairwise
        if volume is not None:
            energy += volume.energy(marginals[part].sum(axis=0))
            biases.append(volume.balance(x[part], biases[-1] if biases else np.zeros(spec.num_labels)))
            x[part] += biases[-1]
        energies.append(energy)
        record.append(marginals)
        new_log_marginals = log_softmax(x)
        if spec.tolerance > 0.0:
            divergence = (np.exp(new_log_marginals) * (new_log_marginals - log_marginals)).sum(axis=1).mean()
            flipped = (new_log_marginals.argmax(axis=1) != log_marginals.argmax(axis=1)).mean()
            converged = bool(divergence < spec.tolerance and flipped < FLIPPED_SHARE)
        log_marginals = new_log_marginals
        if progress is not None:
            progress(len(energies))
    if volume is not None:
        record.append(np.exp(log_marginals))
    return MeanFieldTrace(x, len(energies), converged, tuple(energies), tuple(record), tuple(biases), volume_part)
