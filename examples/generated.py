"""The images of the examples, made from a seed: a color scene in 2-D, a two-modality body in 3-D, and segmentations gone wrong.

They look like nothing in particular, have sharp or blurred edges as asked, and are no evidence about real images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

FloatArray = NDArray[np.float32]
LabelMap = NDArray[np.uint8]
NUM_LABELS = 3


@dataclass(frozen=True)
class Case:
    """An image, its labels, and logits of a segmentation gone wrong.

    Attributes:
        image: (M, *grid), raw intensities.
        labels: (*grid), the truth: 0 background, 1 and 2.
        logits: (3, *grid), higher is better.
        spacing: mm, one per grid axis.
    """

    image: FloatArray
    labels: LabelMap
    logits: FloatArray
    spacing: tuple[float, ...]


def smooth_noise(rng: np.random.Generator, grid_shape: Sequence[int], spacing: Sequence[float], length_mm: float) -> FloatArray:
    """Noise with mean 0, variance 1 and structures of about `length_mm`."""
    noise = gaussian_filter(rng.standard_normal(grid_shape, np.float32), [length_mm / step for step in spacing], mode="wrap")
    return np.asarray((noise - noise.mean()) / noise.std(), np.float32)


def positions(grid_shape: Sequence[int], spacing: Sequence[float]) -> list[FloatArray]:
    """Distances in mm from the middle of the grid, one array per axis."""
    axes = [(np.arange(size, dtype=np.float32) - (size - 1) / 2) * step for size, step in zip(grid_shape, spacing, strict=True)]
    return list(np.meshgrid(*axes, indexing="ij"))


def make_scene(seed: int, grid_shape: tuple[int, int], spacing: tuple[float, float]) -> tuple[FloatArray, LabelMap]:
    """A color picture (3, *grid), 0 to 255, and its labels: 0 a mottled ground, 1 a striped star, 2 a plain tilted square with a hole.

    Each surface has a texture, light falls from one side, and there is noise; edges are as sharp as the pixels.
    """
    rng = np.random.default_rng(seed)
    y, x = positions(grid_shape, spacing)
    size = 0.5 * min(n * step for n, step in zip(grid_shape, spacing, strict=True))
    wander = 0.03 * size * smooth_noise(rng, grid_shape, spacing, 0.12 * size)
    star_y, star_x = y - 0.05 * size, x + 0.62 * size
    angle, radius = np.arctan2(star_y, star_x), np.hypot(star_y, star_x)
    star = radius + wander < 0.44 * size * (1 + 0.4 * np.sin(5 * angle + rng.uniform(0, 6)))
    tilt = rng.uniform(0.3, 0.6)
    square_y, square_x = y + 0.1 * size, x - 0.66 * size
    across = np.cos(tilt) * square_x + np.sin(tilt) * square_y
    along = np.cos(tilt) * square_y - np.sin(tilt) * square_x
    square = (np.maximum(abs(across), abs(along)) < 0.4 * size) & (np.hypot(across, along) > 0.15 * size)
    labels = np.zeros(grid_shape, np.uint8)
    labels[star], labels[square] = 1, 2

    mottled = smooth_noise(rng, grid_shape, spacing, 0.05 * size) > 0.3
    striped = np.sin(0.5 * star_x + 0.8 * star_y + 0.3 * smooth_noise(rng, grid_shape, spacing, 0.1 * size)) > 0
    surface = np.where(labels == 0, np.where(mottled, 1, 0), np.where(labels == 1, np.where(striped, 3, 2), 4))
    colors = np.array([[75, 105, 80], [110, 130, 75], [185, 115, 70], [140, 95, 60], [115, 125, 150]], np.float32)
    image = np.moveaxis(colors[surface], -1, 0)
    light = 1.0 + 0.3 * (x + y) / (np.abs(x).max() + np.abs(y).max()) + 0.05 * smooth_noise(rng, grid_shape, spacing, 0.3 * size)
    image = image * light + 18.0 * rng.standard_normal(image.shape, np.float32)
    return np.clip(image, 0, 255).astype(np.float32), labels


def make_volume(
    seed: int, grid_shape: tuple[int, int, int], spacing: tuple[float, float, float], *, num_distractors: int = 0, noise: float = 1.0
) -> tuple[FloatArray, LabelMap]:
    """Two modalities (2, *grid) with thousands of raw units, and labels: 0 background, 1 a bumpy body, 2 a smaller one inside it.

    Edges are blurred over about a millimeter. The first modality is the clearer one; the second is noisy, and shaded in a way that has
    nothing to do with the labels. Distractors are small bodies that look like label 1 or 2 in one modality or both, and are background.
    """
    rng = np.random.default_rng(seed)
    place = positions(grid_shape, spacing)
    extent = np.array([n * step for n, step in zip(grid_shape, spacing, strict=True)])
    size = float(extent.min())
    bumps = smooth_noise(rng, grid_shape, spacing, 0.08 * size)
    center = rng.uniform(-0.08, 0.08, 3) * extent
    radii = rng.uniform(0.3, 0.38, 3) * extent
    distance = np.sqrt(sum(((p - c) / r) ** 2 for p, c, r in zip(place, center, radii, strict=True)))
    outer = distance + 0.12 * bumps < 1
    offset = rng.uniform(-0.15, 0.15, 3) * radii
    inner_distance = np.sqrt(sum(((p - c - o) / (0.65 * r)) ** 2 for p, c, o, r in zip(place, center, offset, radii, strict=True)))
    labels = np.zeros(grid_shape, np.uint8)
    labels[outer] = 1
    labels[(inner_distance + 0.15 * bumps < 1) & outer] = 2

    # Rows: modalities; columns: background, label 1, label 2.
    contrast = np.array([[200, 500, 800], [500, 300, 400]], np.float32)
    sharp = contrast[:, labels]
    outside = np.argwhere(distance > 1.35)
    for _ in range(num_distractors):
        middle = [(i - (n - 1) / 2) * step for i, n, step in zip(rng.choice(outside), grid_shape, spacing, strict=True)]
        blob = np.sqrt(sum((p - c) ** 2 for p, c in zip(place, middle, strict=True))) < rng.uniform(0.05, 0.1) * size
        modalities = [(0,), (1,), (0, 1)][rng.integers(3)]
        looks_like = rng.integers(1, 3)
        for modality in modalities:
            sharp[modality, blob & (labels == 0)] = contrast[modality, looks_like]
    image = np.stack([gaussian_filter(values, [0.6 / step for step in spacing]) for values in sharp])
    shading = smooth_noise(rng, grid_shape, spacing, 0.2 * size)
    image[0] += 60 * noise * rng.standard_normal(grid_shape, np.float32)
    image[1] += 90 * noise * rng.standard_normal(grid_shape, np.float32) + 120 * shading
    return image.astype(np.float32), labels


def distorted_logits(seed: int, labels: LabelMap, spacing: Sequence[float], *, error_mm: float, num_blobs: int) -> FloatArray:
    """Logits (3, *grid) of a segmentation gone wrong: displaced, dilated, blurred, with holes and false islands.

    Args:
        seed: what goes wrong follows from it.
        labels: (*grid), the truth.
        spacing: mm, one per grid axis.
        error_mm: how far borders are off, and over how much they are blurred.
        num_blobs: holes, and as many islands.
    """
    rng = np.random.default_rng(seed)
    shift = [round(rng.choice((-0.6, 0.6)) * error_mm / step) for step in spacing]
    moved = np.roll(labels, shift, tuple(range(labels.ndim)))
    wander = smooth_noise(rng, labels.shape, spacing, 1.5 * error_mm)
    scores = np.stack([gaussian_filter((moved == k).astype(np.float32), [error_mm / step for step in spacing]) for k in range(NUM_LABELS)])
    # Less background than there is: borders move outward by about half the width of the blur, here more and there less.
    scores[0] *= 0.5 * np.exp(0.5 * wander)
    place = positions(labels.shape, spacing)
    for kind in range(2 * num_blobs):
        inside = np.argwhere(labels > 0) if kind % 2 else np.argwhere(moved == 0)
        middle = [(i - (n - 1) / 2) * step for i, n, step in zip(rng.choice(inside), labels.shape, spacing, strict=True)]
        squared = sum((p - c) ** 2 for p, c in zip(place, middle, strict=True))
        blob = np.exp(-squared / (2 * (0.6 * error_mm) ** 2))
        scores[0 if kind % 2 else rng.integers(1, NUM_LABELS)] += 1.5 * blob
    scores /= scores.sum(0)
    return np.log(np.clip(scores, 0.02, 1)).astype(np.float32)
