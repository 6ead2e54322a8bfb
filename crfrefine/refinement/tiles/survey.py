"""One pass over a network's channels: sums of exponentials, largest logits and their labels, padding, and where labels are present."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.arrays.padding import padding_among

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.base.array_types import Array, Bool, Float32, Float64
    from crfrefine.parameters.specs import MeanFieldSpec, ModelSpec
    from crfrefine.refinement.tiles.grid import TileGrid


# One of so many planes shows how certain a network is; a smaller probability may be rounding.
SAMPLED_PLANES = 5
MIN_DOUBT = 1e-5


class Survey:
    """Knowledge of each voxel, and each label in each tile, after some channels.

    Channels are added in the order of their labels.

    Attributes:
        log_sum: (*grid) float32, logarithm of the sum of exp((logit + bias) / temperature).
        best: (*grid) float32, the largest logit.
        labels: (*grid) uint16, its label; the lowest of equal ones.
        is_equal: (*grid), True where all labels have exactly the same logit.
        largest: (*grid) float32, the largest logit + bias; the same array as `best` if no label has
            a bias.
        margins: (L, *tiles) float32, upper bound of the logarithm of a label's largest probability
            in a tile, inside the mask.
    """

    def __init__(
        self,
        grid: TileGrid,
        run: MeanFieldSpec,
        mask: Bool | None,
        threads: int | None,
        *,
        is_probability: bool = False,
    ) -> None:
        """Start with no channel.

        The mask is (*grid) C-contiguous, and of probabilities the logarithm is taken.
        """
        self.grid = grid
        self.mask = mask
        self.is_probability = is_probability
        self.num_labels = len(run.compatibility)
        self.temperature = run.temperature
        self._bias = np.zeros(self.num_labels) if run.bias is None else run.bias
        self.log_sum = np.empty(grid.shape, np.float32)
        self.best = np.empty(grid.shape, np.float32)
        self.labels = np.empty(grid.shape, np.uint16)
        self.is_equal = np.empty(grid.shape, np.bool_)
        self.largest = self.best if run.bias is None else np.empty(grid.shape, np.float32)
        self.margins = np.full((self.num_labels, *grid.counts), -np.inf, np.float32)
        self._lowest_sums: Float32 | None = None  # of each tile; None: channels were added since
        self._engine = grid.engine(threads)

    def add(self, label: int, values: Array, first_plane: int = 0) -> None:
        """Add planes of a label's channel, whose rows are contiguous.

        Each plane of each label exactly once, labels in ascending order.
        """
        self._lowest_sums = None
        largest = None if self.largest is self.best else self.largest
        found = self.log_sum, self.best, self.labels, self.is_equal, largest, self.margins[label]
        settings = self.is_probability, float(self._bias[label]), 1.0 / self.temperature
        self._engine.survey(values, first_plane, label, *settings, self.mask, *found)

    def padding(self) -> Bool | None:
        """Return (*grid), True where the channels are padding; None if they are nowhere."""
        return padding_among(self.is_equal, self.best, self.num_labels)

    def release(self) -> None:
        """Give up what only the first pass needs: the largest logits, their labels, and where all logits are equal."""
        del self.best, self.labels, self.is_equal, self.largest

    def best_by_tile(self) -> Float64:
        """Return, for each tile, the sum over its voxels inside the mask of the largest logit, bias included, over the temperature."""
        return self.grid.reduced(np.add, self.largest, np.float64, self.mask) / self.temperature

    def uncertain_share(self, log_probability: float) -> float:
        """Return about what share of the voxels inside the mask have labels, beside the likeliest, above a probability together."""
        # A few planes say enough; float32 tells no doubt below MIN_DOUBT.
        planes = slice(SAMPLED_PLANES // 2, None, SAMPLED_PLANES)
        doubt = -np.expm1(
            self.largest[planes] / np.float32(self.temperature) - self.log_sum[planes]
        )
        if self.mask is not None:
            doubt = doubt[self.mask[planes]]
        if doubt.size:
            return float(np.mean(doubt > max(math.exp(log_probability), MIN_DOUBT)))
        return 1.0

    def margins_of(
        self, label: int, values: Array, tiles: NDArray[np.int64], exact_above: float = -math.inf
    ) -> Float32:
        """Return the logarithm of a label's largest probability beside the channels so far in each of some tiles."""
        # Results not above `exact_above` may be upper bounds. The values are the whole channel,
        # (*grid), or those of the tiles, (tiles, voxels of a tile).
        if self._lowest_sums is None:
            self._lowest_sums = self.grid.reduced(np.minimum, self.log_sum, np.float32)
        margins = np.empty(len(tiles), np.float32)
        settings = self.is_probability, float(self._bias[label]), 1.0 / self.temperature
        if len(tiles):
            sums = self.log_sum, self._lowest_sums
            self._engine.margins(
                values, values.ndim == 3, tiles, *settings, self.mask, *sums, exact_above, margins
            )
        return margins


# Share of 1 / L that the threshold may reach: each voxel's most probable label must be above it.
SHARE_OF_UNIFORM = 0.5


@dataclass(frozen=True, eq=False)
class Thresholds:
    """When a label is present in a tile, and when it may matter there.

    Logarithms of probabilities, -inf if it always does.
    """

    present: Float64  # (L,), a label above it is present
    # (L,), the marginal of a label below it stays below the threshold, whatever the marginals
    # around it are; -inf without such a bound.
    may_matter: Float64
    leave_out_nothing: bool = False  # whether all labels take part everywhere


def find_thresholds(threshold: float, spec: ModelSpec) -> Thresholds:
    """Return the thresholds of a model.

    A message raises a label's logarithm relative to the others by at most the sum of the weights
    times a row sum of the normalized kernel,
    1. A Potts model raises no label that is absent around a voxel: its penalty is largest. A
      penalty matrix may raise an absent label by the difference between the largest penalty of any
      label and the smallest of this one; the first threshold is lowered by as much. With negative
      penalties or weights a region of one label may flip by itself (docs/reference/math.md). The
      threshold is `mean_field.label_threshold`, where 0 means all labels everywhere.
    """
    run = spec.mean_field
    num_labels = spec.kernels.num_labels
    if threshold <= 0.0 or (run.weights < 0).any() or (run.compatibility < 0).any():
        everywhere = np.full(num_labels, -np.inf)
        return Thresholds(everywhere, everywhere, leave_out_nothing=True)
    lowest = np.full(num_labels, np.log(min(threshold, SHARE_OF_UNIFORM / num_labels)))
    weight = float(np.asarray(run.weights, np.float64).max(axis=1).sum())
    most = weight * float(run.compatibility.max())
    if not run.is_potts:
        penalties = np.asarray(run.compatibility, np.float64)
        others = np.where(np.eye(num_labels, dtype=bool), np.inf, penalties)
        lowest = lowest - weight * np.maximum(0.0, penalties.max() - others.min(axis=0))
        # Its neighbors of that label penalize the labels of a voxel differently, also where it does
        # not matter itself.
        return Thresholds(lowest, np.full_like(lowest, -np.inf))
    return Thresholds(lowest, lowest - most)
