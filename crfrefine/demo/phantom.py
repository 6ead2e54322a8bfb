"""A synthetic volume with labels and imperfect logits, reproducible from a seed.

It serves the demo and tests, and is no evidence on real images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from crfrefine.arrays.components import label_components
from crfrefine.arrays.label_maps import argmax_labels
from crfrefine.arrays.softmax import sigmoid
from crfrefine.base.array_types import Float32, Float64, Indices, Labels, Shape, Spacing
from crfrefine.io import read_logits, read_volume, write_channels, write_label_map
from crfrefine.io.volume import header_of_grid
from crfrefine.metrics.overlap import MaskPair

NUM_LABELS = 4

# The lengths below fit a field of view of about this size; smaller phantoms scale them down.
_HEAD_SCALE_MM = 80.0
# Center and radii as fractions of the field of view.
_HEAD = ((0.50, 0.50, 0.50), (0.44, 0.46, 0.47))
_SHELL = ((0.40, 0.57, 0.52), (0.20, 0.17, 0.24))
_CORE = ((0.41, 0.56, 0.53), (0.10, 0.09, 0.13))
_CYST = ((0.66, 0.36, 0.45), (0.10, 0.14, 0.20))
# Mean intensity of: air, tissue, other tissue, label 1, label 2, label 3; a row per modality.
_INTENSITIES = ((0.0, 0.42, 0.56, 0.74, 0.64, 0.28), (0.0, 0.52, 0.42, 0.36, 0.78, 0.30))


@dataclass(frozen=True)
class Phantom:
    """A synthetic case."""

    # (2, *grid) float32, whole numbers up to some thousands, 0 only outside the head.
    image: Float32
    # (*grid) uint8, the truth: 0 background, 1 a shell, 2 the core inside it, 3 a separate body.
    labels: Labels
    logits: Float32  # (4, *grid) float32, as from a mediocre network.
    spacing: tuple[float, float, float]  # mm, one per grid axis.

    @property
    def affine(self) -> Float64:
        """Voxel to world (RAS+, mm), the grid's center at the origin."""
        affine = np.diag([*self.spacing, 1.0])
        middle = (np.array(self.labels.shape) - 1) / 2
        affine[:3, 3] = -middle * self.spacing
        return affine


def make_phantom(
    seed: int = 0,
    grid_shape: tuple[int, int, int] = (96, 84, 40),
    spacing: tuple[float, float, float] = (0.9, 0.9, 2.0),
) -> Phantom:
    """Make a head with a lesion of two nested labels and a separate third one.

    The logits have typical mistakes of a network: blurred and wandering borders, false islands and
    missing parts. Raises ValueError for fewer than 8 voxels along an axis, or a spacing that is not
    positive.
    """
    if min(grid_shape) < 8 or min(spacing) <= 0:
        raise ValueError(
            "a phantom needs at least 8 voxels along each axis and positive spacing, not "
            f"{grid_shape} at {spacing} mm"
        )
    maker = _Maker(seed, grid_shape, spacing)
    noise = maker.noise
    wobble = 0.2 * noise(6)
    head = _ellipsoid(grid_shape, *_HEAD) + 0.2 * wobble < 1
    labels = np.zeros(grid_shape, np.uint8)
    labels[(_ellipsoid(grid_shape, *_SHELL) + 2 * wobble < 1) & head] = 1
    labels[(_ellipsoid(grid_shape, *_CORE) + 1.5 * wobble < 1) & (labels == 1)] = 2
    labels[(_ellipsoid(grid_shape, *_CYST) + 2 * wobble < 1) & head & (labels == 0)] = 3
    tissue = np.zeros(grid_shape, np.uint8)  # an entry of `_INTENSITIES`
    tissue[head] = 1
    tissue[head & (noise(5) > 0.25)] = 2
    tissue[labels > 0] = labels[labels > 0] + 2

    # Modalities have partial volume, texture, a bias field and noise.
    image = np.empty((len(_INTENSITIES), *grid_shape), np.float32)
    for modality, means in enumerate(_INTENSITIES):
        values = np.asarray(means, np.float32)[tissue]
        values = gaussian_filter(values, 0.5 / np.array(spacing))
        values += 0.045 * noise(1.5)
        values *= 1 + 0.06 * noise(25)
        values += 0.05 * maker.white_noise()
        image[modality] = np.where(tissue > 0, np.maximum(np.rint(1000 * values), 1), 0)
    return Phantom(image, labels, maker.draw_logits(labels, tissue), spacing)


class _Maker:
    """Noise and logits of a phantom, which share one sequence of random numbers."""

    def __init__(self, seed: int, grid_shape: Shape, spacing: Spacing) -> None:
        self._rng = np.random.default_rng(seed)
        self._grid_shape = grid_shape
        self._spacing = np.array(spacing)
        self._scale = float((np.array(grid_shape) * self._spacing).min()) / _HEAD_SCALE_MM

    def draw_logits(self, labels: Labels, tissue: Labels) -> Float32:
        """Return blurred scores with wandering borders, false islands, and holes in true labels."""
        logits = np.empty((NUM_LABELS, *self._grid_shape), np.float32)
        for label in range(NUM_LABELS):
            occurs = (labels == label).astype(np.float32)
            blurred = gaussian_filter(occurs, 2.2 * self._scale / self._spacing)
            logits[label] = np.log(np.clip(blurred, 2e-3, 1))
            logits[label] += 0.9 * self.noise(3) + 0.5 * self.white_noise()

        rng = self._rng
        away = np.argwhere((tissue > 0) & (labels == 0))
        for _ in range(14):
            blob = self._ball_among(away, 1.5, 4.5)
            logits[rng.integers(1, NUM_LABELS)] += rng.uniform(6.0, 8.5) * blob
        inside = np.argwhere(labels > 0)
        for _ in range(9):
            blob = self._ball_among(inside, 2.0, 5.0)
            logits[0] += rng.uniform(5.5, 8.0) * blob
        return logits

    def white_noise(self) -> Float32:
        """Return independent normal numbers."""
        return self._rng.standard_normal(self._grid_shape, np.float32)

    def noise(self, length: float) -> Float32:
        """Return noise with unit variance and a correlation length in mm."""
        sigma = length * self._scale / self._spacing
        values = gaussian_filter(self.white_noise(), sigma, mode="wrap")
        deviation = max(float(values.std()), 1e-12)
        return np.asarray(values / deviation, np.float32)

    def _ball_among(self, voxels: Indices, smallest: float, largest: float) -> Float32:
        """Return a soft ball around one of some voxels, with a random radius in mm.

        It is 1 in the middle, 0.5 at the radius, and 0 beyond.
        """
        center = voxels[self._rng.integers(len(voxels))]
        radius = self._rng.uniform(smallest, largest) * self._scale
        offsets = []
        for size, place, step in zip(self._grid_shape, center, self._spacing, strict=True):
            offsets.append((np.arange(size) - place) * step)
        x, y, z = np.ix_(*offsets)
        distance = np.sqrt(x**2 + y**2 + z**2)
        softness = 0.25 * radius
        return sigmoid(np.clip((radius - distance) / softness, -30, 30))


def write_phantom(phantom: Phantom, folder: str | Path, case_id: str = "phantom") -> None:
    """Write a phantom as NIfTI files below `folder`.

    They are `images/CASE_0000.nii.gz` and `_0001`, `labels/CASE.nii.gz`, `logits/CASE.nii.gz`.
    """
    folder = Path(folder)
    for kind in ("images", "labels", "logits"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    like = header_of_grid(phantom.labels.shape, phantom.affine)
    for modality, values in enumerate(phantom.image):  # Whole numbers, as from scanners.
        path = folder / "images" / f"{case_id}_{modality:04d}.nii.gz"
        write_label_map(path, values.astype(np.uint16), like)
    write_label_map(folder / "labels" / f"{case_id}.nii.gz", phantom.labels, like)
    write_channels(folder / "logits" / f"{case_id}.nii.gz", phantom.logits, like)


def compare_with_truth(folder: Path, refined: Path) -> Iterator[tuple[int, list[float], list[int]]]:
    """Yield each label with its Dice before and after, and its numbers of connected components.

    These are those in the truth, before and after.
    """
    truth = read_volume(folder / "labels" / refined.name).data
    before = argmax_labels(read_logits([folder / "logits" / refined.name]))
    maps = (truth, before, read_volume(refined).data)
    for label in range(1, NUM_LABELS):
        masks = [labels == label for labels in maps]
        dices = [MaskPair(mask, masks[0]).dice() for mask in masks[1:]]
        numbers = [label_components(mask)[1] for mask in masks]
        yield label, dices, numbers


def _ellipsoid(grid_shape: Shape, center: Sequence[float], radii: Sequence[float]) -> Float32:
    """Return the normalized squared radius of each voxel: below 1 inside.

    `center` and `radii` are fractions of the field of view.
    """
    offsets = []
    for size, middle, radius in zip(grid_shape, center, radii, strict=True):
        places = (np.arange(size, dtype=np.float32) + 0.5) / size
        offsets.append((places - middle) / radius)
    x, y, z = np.ix_(*offsets)
    return np.asarray(x**2 + y**2 + z**2, np.float32)
