"""A rival of the CRF: the guided filter, which smooths the network's probabilities along the image with box filters alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.ndimage import uniform_filter

from crfrefine.arrays.label_maps import argmax_labels
from crfrefine.train.baselines import Scores, network_labels, score_choices
from crfrefine.train.crops import Crop, probabilities_of
from crfrefine.train.material import Material
from crfrefine.train.starts import voxel_length
from crfrefine.train.threads import Workers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.arrays.region_scheme import RegionScheme

RADII_VOXELS = (1.0, 2.0, 4.0, 8.0)
"""Half-widths of the windows that are tried, in typical voxels."""

EPSILONS = (0.001, 0.01, 0.1)
"""Variances of the normalized intensity that are tried: contrasts below their root are smoothed over."""


@dataclass(frozen=True)
class Guidance:
    """The setting of a guided filter."""

    radius_mm: float = 0.0  # half-width of its windows
    epsilon: float = 0.0  # variance of the intensity that counts as an edge


UNGUIDED = Guidance()
"""No filter."""


class Guide:
    """An image's windows: their means and covariances.

    Args:
        image: (M, *grid) float32, normalized.
        radius_mm: half-width of the windows, rounded to voxels along each axis.
        spacing: mm, one per grid axis.

    Source: He, Sun & Tang, Guided image filtering (TPAMI 35, 2013), equations 14 to 16, of which 5, 6 and 8 are the case of one modality.
    """

    def __init__(self, image: NDArray[np.float32], radius_mm: float, spacing: Sequence[float]) -> None:
        self._image = image
        # Larger windows see nothing but the edges anyway, and would fill the memory.
        radii = [min(round(radius_mm / distance), 16 * extent) for distance, extent in zip(spacing, image.shape[1:], strict=True)]
        self._sizes = [2 * radius + 1 for radius in radii]
        self._means = [self._box(modality) for modality in image]
        self._covariances = [  # a lower triangle
            [self._box(image[row] * image[column]) - self._means[row] * self._means[column] for column in range(row + 1)]
            for row in range(len(image))
        ]

    def filter(self, channel: NDArray[np.float32], epsilons: Sequence[float]) -> list[NDArray[np.float32]]:
        """Return a channel (*grid) as an average of linear functions of the image, one per window: with each epsilon."""
        mean = self._box(channel)
        cross = [self._box(modality * channel) - own * mean for modality, own in zip(self._image, self._means, strict=True)]
        filtered = []
        for epsilon in epsilons:
            slopes = self._slopes(epsilon, cross)
            offset = mean - sum(slope * own for slope, own in zip(slopes, self._means, strict=True))
            result = self._box(offset)
            for slope, modality in zip(slopes, self._image, strict=True):
                result += self._box(slope) * modality
            filtered.append(result)
        return filtered

    def _box(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        result: NDArray[np.float32] = uniform_filter(values, self._sizes, mode="nearest")
        return result

    def _slopes(self, epsilon: float, cross: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Return the solution of (covariance + epsilon) x = cross in every voxel, by elimination: the matrix is positive definite."""
        rows = [[*own[:-1], own[-1] + np.float32(epsilon)] for own in self._covariances]
        right: list[NDArray[Any]] = list(cross)
        for pivot in range(len(rows)):
            for row in range(pivot + 1, len(rows)):
                factor = rows[row][pivot] / rows[pivot][pivot]
                # The matrix stays symmetric, so the pivot's row is the pivot's column.
                for column in range(pivot + 1, row + 1):
                    rows[row][column] = rows[row][column] - factor * rows[column][pivot]
                right[row] = right[row] - factor * right[pivot]
        solution: list[NDArray[Any]] = []
        for row in reversed(range(len(rows))):
            value = right[row]
            for number, later in enumerate(solution, start=row + 1):
                value = value - rows[number][row] * later
            solution.insert(0, value / rows[row][row])
        return solution

    def labels(
        self, probabilities: NDArray[np.float32], epsilons: Sequence[float], regions: RegionScheme | None
    ) -> list[NDArray[np.unsignedinteger[Any]]]:
        """Return the labels of the filtered probabilities (L, *grid) or (R, *grid): with each epsilon."""
        if regions is not None:
            filtered = [self.filter(channel, epsilons) for channel in probabilities]
            return [regions.decode(np.stack(own) - np.float32(0.5)) for own in zip(*filtered, strict=True)]
        # Filtered probabilities sum to 1 as the unfiltered do, so background needs no filter of its own.
        filtered = [self.filter(channel, epsilons) for channel in probabilities[1:]]
        return [argmax_labels(np.stack([np.float32(1.0) - sum(own), *own])) for own in zip(*filtered, strict=True)]


def guided_labels(
    logits: NDArray[np.floating[Any]],
    image: NDArray[np.float32],
    guidance: Guidance,
    spacing: Sequence[float],
    regions: RegionScheme | None,
) -> NDArray[np.unsignedinteger[Any]]:
    """Return the labels of the filtered probabilities of logits (L, *grid) or log-odds (R, *grid); the image (M, *grid) is normalized."""
    return Guide(image, guidance.radius_mm, spacing).labels(probabilities_of(logits, regions), [guidance.epsilon], regions)[0]


def score_guided(material: Material, spacing: Sequence[float], workers: Workers) -> Scores[Guidance]:
    """Measure every setting on every case, first the network without a filter; `spacing` is that of a typical case."""
    radii = [radius * voxel_length(spacing) for radius in RADII_VOXELS]

    def label_maps(crop: Crop) -> Iterator[NDArray[Any]]:
        probabilities = probabilities_of(crop.logits.astype(np.float32), crop.regions)
        yield network_labels(crop)
        for radius in radii:
            yield from Guide(crop.image, radius, crop.spacing).labels(probabilities, EPSILONS, crop.regions)

    choices = (UNGUIDED, *(Guidance(radius, epsilon) for radius, epsilon in itertools.product(radii, EPSILONS)))
    return score_choices(choices, material, workers, label_maps)
