"""The guided filter, a rival of the CRF that needs no training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import uniform_filter

from crfrefine.arrays.label_maps import argmax_labels
from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.base.array_types import Array, Float32, Labels
from crfrefine.engines.volumes import volume_bias

RADII_VOXELS = (1.0, 2.0, 4.0, 8.0)  # half-widths of the windows that are tried, in typical voxels
# Variances of the normalized intensity that are tried: contrasts below their root are smoothed
# over.
EPSILONS = (0.001, 0.01, 0.1)
_MIN_FILTERED = 1e-6  # filtered probabilities may be below 0


@dataclass(frozen=True)
class Guidance:
    """The setting of a guided filter."""

    radius_mm: float = 0.0  # half-width of its windows
    epsilon: float = 0.0  # variance of the intensity that counts as an edge


UNGUIDED = Guidance()  # no filter


def as_channels(values: Array, num_axes: int) -> Array:
    """Return values (L,) as (L, 1, ...) with so many axes, to be added to (L, *grid)."""
    return values.reshape(-1, *(1,) * (num_axes - 1))


class Guide:
    """The windows of a normalized image (M, *grid) float32, and the filter that they guide.

    Half-widths of windows are rounded to voxels.

    Source: He, Sun & Tang, Guided image filtering (TPAMI 35, 2013), equations 14 to 16; 5, 6 and 8
    for one modality.
    """

    def __init__(self, image: Float32, radius_mm: float, spacing: Sequence[float]) -> None:
        self._image = image
        self._sizes = []
        for distance, extent in zip(spacing, image.shape[1:], strict=True):
            # Larger windows see nothing but the edges anyway, and would fill the memory.
            radius = min(round(radius_mm / distance), 16 * extent)
            self._sizes.append(2 * radius + 1)
        self._means = [self._box(modality) for modality in image]
        # The covariances of modalities, as the rows of a lower triangle.
        self._covariances = []
        for row in range(len(image)):
            covariances = []
            for column in range(row + 1):
                mean_product = self._box(image[row] * image[column])
                covariances.append(mean_product - self._means[row] * self._means[column])
            self._covariances.append(covariances)

    def _box(self, values: Float32) -> Float32:
        """Return the mean (*grid) of the window around each voxel."""
        return uniform_filter(values, self._sizes, mode="nearest")

    def filter(self, channel: Float32, epsilons: Sequence[float]) -> list[Float32]:
        """Return a channel (*grid), filtered with each epsilon.

        It is an average of linear functions of the image, one per window.
        """
        mean = self._box(channel)
        cross_covariances = []
        for modality, modality_mean in zip(self._image, self._means, strict=True):
            product_mean = self._box(modality * channel)
            cross_covariances.append(product_mean - modality_mean * mean)

        filtered = []
        for epsilon in epsilons:
            slopes = self._slopes(epsilon, cross_covariances)
            pairs = zip(slopes, self._means, strict=True)
            products = [slope * modality_mean for slope, modality_mean in pairs]
            result = self._box(mean - sum(products))
            for slope, modality in zip(slopes, self._image, strict=True):
                result += self._box(slope) * modality
            filtered.append(result)
        return filtered

    def _slopes(self, epsilon: float, cross_covariances: Sequence[Float32]) -> list[Float32]:
        """Return the slopes x of (covariances + epsilon) x = cross-covariances in every voxel.

        The matrix is positive definite, so that elimination needs no exchange of rows.
        """
        rows = []
        for covariances in self._covariances:
            rows.append([*covariances[:-1], covariances[-1] + np.float32(epsilon)])
        right = list(cross_covariances)
        for pivot in range(len(rows)):
            for row in range(pivot + 1, len(rows)):
                factor = rows[row][pivot] / rows[pivot][pivot]
                # The matrix stays symmetric, so the pivot's row is the pivot's column.
                for column in range(pivot + 1, row + 1):
                    rows[row][column] = rows[row][column] - factor * rows[column][pivot]
                right[row] = right[row] - factor * right[pivot]

        solution: list[Array] = []
        for row in reversed(range(len(rows))):
            value = right[row]
            for number, later in enumerate(solution, start=row + 1):
                value = value - rows[number][row] * later
            solution.insert(0, value / rows[row][row])
        return solution

    def labels(
        self,
        probabilities: Float32,
        epsilons: Sequence[float],
        regions: RegionScheme | None,
        volumes_of: Labels | None = None,
    ) -> list[Labels]:
        """Return the labels of filtered probabilities (L, *grid) with each epsilon.

        A bias keeps the volumes of the label map `volumes_of`, if there is one.
        """
        if regions is None:
            # Filtered probabilities sum to 1 as the unfiltered do, so background needs no filter.
            probabilities = probabilities[1:]
        filtered = [self.filter(channel, epsilons) for channel in probabilities]
        label_maps = []
        for channels in zip(*filtered, strict=True):
            if regions is not None:
                label_maps.append(regions.decode(np.stack(channels) - np.float32(0.5)))
                continue
            scores = np.stack([np.float32(1.0) - sum(channels), *channels])
            if volumes_of is not None:
                np.log(np.maximum(scores, np.float32(_MIN_FILTERED)), out=scores)
                bias = volume_bias(scores, volumes_of).astype(np.float32)
                scores += as_channels(bias, scores.ndim)
            label_maps.append(argmax_labels(scores))
        return label_maps
