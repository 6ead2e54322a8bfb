"""What one pass over a network's channels tells, and when a label may be left out of a tile.

The pass finds sums of exponentials, the largest logits and their labels, padding, and where labels
are present.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from crfrefine.arrays.padding import padding_among
from crfrefine.base.array_types import Array, Bool, Float32, Float64, Labels
from crfrefine.parameters.specs import MeanFieldSpec, ModelSpec
from crfrefine.refinement.tiles.grid import TileGrid, TileNumbers


class Thresholds(NamedTuple):
    """When a label is present in a tile, and when it may matter there.

    The thresholds are logarithms of probabilities; -inf means always.
    """

    present: Float64  # (L,), a label above it is present
    # The marginal of a label below it stays below the threshold, whatever the marginals around it
    # are; -inf without a bound. It is float64, as `present` is.
    may_matter: np.float64

    @property
    def leave_out_nothing(self) -> bool:
        """Whether all labels take part everywhere."""
        return bool(np.isneginf(self.present).all())


# One of so many planes shows how certain a network is; a smaller probability may be rounding.
SAMPLED_PLANES = 5
MIN_DOUBT = 1e-5


class Survey:
    """Knowledge of each voxel, and each label in each tile, after some channels.

    Channels are added in the order of their labels.

    Attributes:
        bias: (L,), what is added to each label's logits.
        is_probability: whether channels are probabilities, whose logarithm is taken.
        log_sum: (*grid) float32, logarithm of the sum of exp((logit + bias) / temperature).
        best: (*grid) float32, the largest logit.
        labels: (*grid) uint16, its label; the lowest of equal ones.
        is_equal: (*grid), True where all labels have exactly the same logit.
        largest: (*grid) float32, the largest logit + bias; the same array as `best` if no label has
            a bias.
        margins: (L, *tiles) float32, upper bound of the logarithm of a label's largest probability
            in a tile, inside the mask.
        present: (L, *tiles), where labels were marked as present.
        may_matter: (L, *tiles), where labels were marked as such that may matter.
    """

    def __init__(
        self,
        grid: TileGrid,
        mean_field: MeanFieldSpec,
        mask: Bool | None,
        thresholds: Thresholds,
        threads: int | None,
    ) -> None:
        """Start with no channel.

        The mask, (*grid) C-contiguous, is True where the model applies; None means everywhere. The
        thresholds are those of `mark`.
        """
        self.grid = grid
        self.mask = mask
        self.thresholds = thresholds
        self.is_probability = False
        self.num_labels = len(mean_field.compatibility)
        self.temperature = mean_field.temperature
        bias = mean_field.bias
        self.bias = np.zeros(self.num_labels) if bias is None else bias
        self.log_sum = np.empty(grid.shape, np.float32)
        self.best = np.empty(grid.shape, np.float32)
        self.labels = np.empty(grid.shape, np.uint16)
        self.is_equal = np.empty(grid.shape, np.bool_)
        self.largest = self.best
        if bias is not None:
            self.largest = np.empty(grid.shape, np.float32)
        shape_of_margins = (self.num_labels, *grid.counts)
        self.margins = np.full(shape_of_margins, -np.inf, np.float32)
        self.present = np.zeros(shape_of_margins, np.bool_)
        self.may_matter = np.zeros(shape_of_margins, np.bool_)
        # Lowest `log_sum` of each tile; None means that channels were added since it was found.
        self._lowest_sums: Float32 | None = None
        self._engine = grid.engine(threads)

    def add(self, label: int, values: Array, first_plane: int = 0) -> None:
        """Add planes of a label's channel, whose rows are contiguous.

        Each plane of each label comes exactly once, and labels come in ascending order.
        """
        self._lowest_sums = None
        largest = None if self.largest is self.best else self.largest
        results = (self.log_sum, self.best, self.labels, self.is_equal, largest)
        settings = self._settings(label)
        self._engine.survey(values, first_plane, label, *settings, *results, self.margins[label])

    def _settings(self, label: int) -> tuple[Any, ...]:
        """Return how the engine reads a label's channel: arguments of its functions."""
        bias = float(self.bias[label])
        return self.is_probability, bias, 1.0 / self.temperature, self.mask

    def padding(self) -> Bool | None:
        """Return (*grid), True where the channels are padding; None means nowhere."""
        return padding_among(self.is_equal, self.best, self.num_labels)

    def label_map(self) -> Labels:
        """Return (*grid), the label of the largest logit, in the smallest unsigned type."""
        return self.labels.astype(np.min_scalar_type(self.num_labels - 1), copy=False)

    def release(self) -> None:
        """Give up the arrays that only the first pass needs."""
        del self.best, self.labels, self.is_equal, self.largest

    def largest_sums(self) -> Float64:
        """Return the sum of `largest` over the temperature inside the mask, (*tiles)."""
        sums = self.grid.reduced(np.add, self.largest, np.float64, self.mask)
        return sums / self.temperature

    def uncertain_share(self) -> float:
        """Return about what share of the voxels inside the mask are uncertain.

        Those are the voxels where the labels beside the likeliest together may matter.
        """
        # A few planes say enough; float32 tells no doubt below MIN_DOUBT.
        planes = slice(SAMPLED_PLANES // 2, None, SAMPLED_PLANES)
        logits = self.largest[planes] / self.temperature
        doubt = -np.expm1(logits - self.log_sum[planes])
        if self.mask is not None:
            doubt = doubt[self.mask[planes]]
        if not doubt.size:
            return 1.0
        smallest = max(math.exp(self.thresholds.may_matter), MIN_DOUBT)
        return float(np.mean(doubt > smallest))

    def mark(
        self, label: int, tiles: TileNumbers, values: Array, *, exact_above: float | None = None
    ) -> Bool:
        """Mark in which of some tiles a label is present or may matter; return (n,), the latter.

        What counts is its largest probability in each tile, beside the channels added so far. The
        values are the whole channel, (*grid), or those in the n tiles, (n, voxels of a tile).
        Logarithms of probabilities not above `exact_above`, by default the threshold, may be upper
        bounds.
        """
        if self._lowest_sums is None:
            self._lowest_sums = self.grid.reduced(np.minimum, self.log_sum, np.float32)
        lowest = self.thresholds.may_matter
        margins = np.empty(len(tiles), np.float32)
        if len(tiles):
            is_whole_channel = values.ndim == 3
            sums = (self.log_sum, self._lowest_sums)
            bound = lowest if exact_above is None else exact_above
            settings = self._settings(label)
            self._engine.margins(values, is_whole_channel, tiles, *settings, *sums, bound, margins)
        matters: Bool = margins > lowest
        self.may_matter[label].flat[tiles] = matters
        self.present[label].flat[tiles] = margins > self.thresholds.present[label]
        return matters


# Share of 1 / L that the threshold may reach: each voxel's most probable label must be above it.
SHARE_OF_UNIFORM = 0.5


def row_sum_margin(num_features: int) -> float:
    """Return the factor by which row sums may exceed those of Gaussians of so many features.

    The kernels of the lattice and of the grid are not quite Gaussian, the lattice's the less so the
    more features there are. The factors are measured (docs/reference/math.md, section 10.2).
    """
    if num_features < 6:
        return 1.1
    return 1.35 + 0.1 * max(0, num_features - 8)


def find_thresholds(threshold: float, spec: ModelSpec) -> Thresholds:
    """Return the thresholds of a model at a `mean_field.label_threshold`.

    At 0 all labels take part everywhere, and so they do with negative penalties or weights, where a
    region of one label may flip by itself (docs/reference/math.md).

    A message raises a label's logarithm relative to the others by at most the sum of the weights,
    each times the largest row sum of its normalized kernel. A Potts model raises no label that is
    absent around a voxel: its penalty is largest. A penalty matrix may raise an absent label by the
    difference between the largest penalty of any label and the smallest of this one; the first
    threshold is lowered by as much.
    """
    mean_field = spec.mean_field
    num_labels = spec.kernels.num_labels
    compatibility = mean_field.compatibility
    always = np.float64(-np.inf)
    if threshold <= 0.0 or (mean_field.weights < 0).any() or (compatibility < 0).any():
        return Thresholds(np.full(num_labels, always), always)

    lowest = np.log(min(threshold, SHARE_OF_UNIFORM / num_labels))
    weights = np.asarray(mean_field.weights, np.float64)
    # The row sum that no row of a normalized kernel exceeds. Symmetrically normalized rows exceed 1
    # where a voxel has many neighbors that have few others; those of a Gaussian over D features
    # reach at most (4 / 3)^(D / 4) (proof: docs/reference/math.md).
    row_sums = np.ones(len(weights))
    if spec.kernels.normalization == "symmetric":
        for number, kernel in enumerate(spec.kernels.kernels):
            num_features = len(kernel.theta)
            bound = math.pow(4.0 / 3.0, num_features / 4.0)
            row_sums[number] = row_sum_margin(num_features) * bound
    weight = float(weights.max(axis=1, initial=0.0) @ row_sums)
    if mean_field.is_potts:
        largest_rise = weight * float(compatibility.max())
        return Thresholds(np.full(num_labels, lowest), lowest - largest_rise)

    penalties = np.asarray(compatibility, np.float64)
    others = np.where(np.eye(num_labels, dtype=bool), np.inf, penalties)
    largest_difference = np.maximum(0.0, penalties.max() - others.min(axis=0))
    # A voxel's neighbors of a label penalize the voxel's labels differently, also where that label
    # does not matter at the voxel itself: there is no second bound.
    return Thresholds(lowest - weight * largest_difference, always)
