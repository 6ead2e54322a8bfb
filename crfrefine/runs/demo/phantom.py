"""A synthetic volume with labels and imperfect logits, reproducible from a seed: for the demo and tests, no evidence on real images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from crfrefine.arrays.components import label_components
from crfrefine.arrays.label_maps import argmax_labels
from crfrefine.base.array_types import Float32, Float64
from crfrefine.io import read_logits, read_volume, write_channels, write_label_map
from crfrefine.io.volume import Volume
from crfrefine.metrics.overlap import OverlapCounts

NUM_LABELS = 4

# the lengths below fit a field of view of about this size; smaller phantoms scale them down
_HEAD_SCALE_MM = 80.0
# center and radii as fractions of the field of view
_HEAD = ((0.50, 0.50, 0.50), (0.44, 0.46, 0.47))
_SHELL = ((0.40, 0.57, 0.52), (0.20, 0.17, 0.24))
_CORE = ((0.41, 0.56, 0.53), (0.10, 0.09, 0.13))
_CYST = ((0.66, 0.36, 0.45), (0.10, 0.14, 0.20))
# mean intensity of: air, tissue, other tissue, label 1, label 2, label 3
_INTENSITIES = ((0.0, 0.42, 0.56, 0.74, 0.64, 0.28), (0.0, 0.52, 0.42, 0.36, 0.78, 0.30))


@dataclass(frozen=True)
class Phantom:
    """A synthetic case."""

    # (2, *grid) float32, whole numbers up to some thousands, 0 only outside the head.
    image: Float32
    # (*grid) uint8, the truth: 0 background, 1 a shell, 2 the core inside it, 3 a separate body.
    labels: NDArray[np.uint8]
    logits: Float32  # (4, *grid) float32, as from a mediocre network.
    spacing: tuple[float, float, float]  # mm, one per grid axis.

    @property
    def affine(self) -> Float64:
        """Voxel to world (RAS+, mm), the grid's center at the origin."""
        affine = np.diag([*self.spacing, 1.0])
        affine[:3, 3] = [
            -(n - 1) / 2 * step for n, step in zip(self.labels.shape, self.spacing, strict=True)
        ]
        return affine


def make_phantom(
    seed: int = 0,
    grid_shape: tuple[int, int, int] = (96, 84, 40),
    spacing: tuple[float, float, float] = (0.9, 0.9, 2.0),
) -> Phantom:
    """Make a head with a lesion of two nested labels and a separate third one, and logits with typical mistakes of a network."""
    # The logits have blurred and wandering borders, false islands and missing parts. Each axis has
    # at least 8 voxels.
    if min(grid_shape) < 8 or min(spacing) <= 0:
        raise ValueError(
            f"a phantom needs at least 8 voxels along each axis and positive spacing, not {grid_shape} at {spacing} mm"
        )
    rng = np.random.default_rng(seed)
    scale = min(n * step for n, step in zip(grid_shape, spacing, strict=True)) / _HEAD_SCALE_MM

    def noise(length: float) -> Float32:
        """Return noise with unit variance and a correlation length in mm."""
        values = gaussian_filter(
            rng.standard_normal(grid_shape, np.float32),
            [length * scale / step for step in spacing],
            mode="wrap",
        )
        return np.asarray(values / max(float(values.std()), 1e-12), np.float32)

    labels = np.zeros(grid_shape, np.uint8)
    tissue = np.zeros(grid_shape, np.uint8)
    wobble = 0.2 * noise(6)
    head = _ellipsoid(grid_shape, *_HEAD) + 0.2 * wobble < 1
    labels[(_ellipsoid(grid_shape, *_SHELL) + 2 * wobble < 1) & head] = 1
    labels[(_ellipsoid(grid_shape, *_CORE) + 1.5 * wobble < 1) & (labels == 1)] = 2
    labels[(_ellipsoid(grid_shape, *_CYST) + 2 * wobble < 1) & head & (labels == 0)] = 3
    tissue[head] = 1
    tissue[head & (noise(5) > 0.25)] = 2
    tissue[labels > 0] = labels[labels > 0] + 2

    # Partial volume, texture, a bias field and noise.
    image = np.empty((len(_INTENSITIES), *grid_shape), np.float32)
    for modality, means in enumerate(_INTENSITIES):
        values = gaussian_filter(
            np.asarray(means, np.float32)[tissue], [0.5 / step for step in spacing]
        )
        values += 0.045 * noise(1.5)
        values *= 1 + 0.06 * noise(25)
        values += 0.05 * rng.standard_normal(grid_shape, np.float32)
        image[modality] = np.where(tissue > 0, np.maximum(np.rint(1000 * values), 1), 0)

    # Blurred scores with wandering borders, then islands of false labels and holes in true ones.
    logits = np.empty((NUM_LABELS, *grid_shape), np.float32)
    for label in range(NUM_LABELS):
        blurred = gaussian_filter(
            (labels == label).astype(np.float32), [2.2 * scale / step for step in spacing]
        )
        logits[label] = np.log(np.clip(blurred, 2e-3, 1))
        logits[label] += 0.9 * noise(3) + 0.5 * rng.standard_normal(grid_shape, np.float32)
    away = np.argwhere((tissue > 0) & (labels == 0))
    inside = np.argwhere(labels > 0)
    for _ in range(14):
        blob = _ball(
            grid_shape, spacing, away[rng.integers(len(away))], rng.uniform(1.5, 4.5) * scale
        )
        logits[rng.integers(1, NUM_LABELS)] += rng.uniform(6.0, 8.5) * blob
    for _ in range(9):
        blob = _ball(
            grid_shape, spacing, inside[rng.integers(len(inside))], rng.uniform(2.0, 5.0) * scale
        )
        logits[0] += rng.uniform(5.5, 8.0) * blob
    return Phantom(image, labels, logits, spacing)


def write_phantom(phantom: Phantom, folder: str | Path, case_id: str = "phantom") -> None:
    """Write a phantom as NIfTI files below `folder`: `images/CASE_0000.nii.gz` and `_0001`, `labels/CASE.nii.gz`, `logits/CASE.nii.gz`."""
    folder = Path(folder)
    for kind in ("images", "labels", "logits"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    like = Volume(data=phantom.labels, affine=phantom.affine, spacing=phantom.spacing)
    for modality, values in enumerate(phantom.image):  # Whole numbers, as from scanners.
        write_label_map(
            folder / "images" / f"{case_id}_{modality:04d}.nii.gz", values.astype(np.uint16), like
        )
    write_label_map(folder / "labels" / f"{case_id}.nii.gz", phantom.labels, like)
    write_channels(folder / "logits" / f"{case_id}.nii.gz", phantom.logits, like)


def compare_with_truth(folder: Path, refined: Path) -> Iterator[tuple[int, list[float], list[int]]]:
    """Yield each label with its Dice before and after, and its connected components in the truth, before and after."""
    network = argmax_labels(read_logits([folder / "logits" / refined.name]))
    maps = [read_volume(folder / "labels" / refined.name).data, network, read_volume(refined).data]
    for label in range(1, NUM_LABELS):
        truth, *predictions = (labels == label for labels in maps)
        dices = [OverlapCounts.of_masks(prediction, truth).dice() for prediction in predictions]
        yield label, dices, [label_components(mask)[1] for mask in (truth, *predictions)]


def _ellipsoid(
    grid_shape: tuple[int, ...], center: Sequence[float], radii: Sequence[float]
) -> Float32:
    """Return the normalized squared radius of each voxel: below 1 inside.

    `center` and `radii` are fractions of the field of view.
    """
    axes = zip(grid_shape, center, radii, strict=True)
    offsets = [
        ((np.arange(n, dtype=np.float32) + 0.5) / n - middle) / radius for n, middle, radius in axes
    ]
    x, y, z = np.ix_(*offsets)
    return np.asarray(x**2 + y**2 + z**2, np.float32)


def _ball(
    grid_shape: tuple[int, ...], spacing: Sequence[float], center: NDArray[np.intp], radius: float
) -> Float32:
    """Return a soft ball: 1 in the middle, 0.5 at `radius` mm from the voxel `center`, 0 far away."""
    axes = [
        (np.arange(n, dtype=np.float32) - c) * step
        for n, c, step in zip(grid_shape, center, spacing, strict=True)
    ]
    distance = np.sqrt(axes[0][:, None, None] ** 2 + axes[1][:, None] ** 2 + axes[2] ** 2)
    softness = 0.25 * radius
    return np.asarray(
        1 / (1 + np.exp(np.clip((distance - radius) / softness, -30, 30))), np.float32
    )
