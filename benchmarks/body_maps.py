"""The body drawn on a grid: true labels, what a network would say instead, and the CT image; slab by slab, so little memory is needed.

The network's map has the same organs with surfaces that err by a wave of `ERROR_VOXELS`, and small islands of wrong labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import pi

import numpy as np
from body import BODY, ORGANS, Capsule, Ellipsoid, Part
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

Box = tuple[slice, slice, slice]

TISSUE = 255  # what is in the body and no organ: told from air in the image, background in label maps
NUM_ORGANS = len(ORGANS)
SLAB = 32  # slices drawn at once
ERROR_VOXELS, ERROR_WAVELENGTH = 0.45, 14.0
WAVE_VOXELS, WAVELENGTH = 0.8, 22.0  # of the true surfaces
VOXELS_PER_ISLAND = 100_000
AIR_HU, TISSUE_HU = -1000, -60
WHITE_NOISE_HU, SMOOTH_NOISE_HU = 14.0, 10.0


@dataclass(frozen=True)
class Grid:
    """A grid in storage order (z, y, x), spacing in mm."""

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]

    @property
    def step(self) -> float:
        """The mean spacing: what lengths in voxels are multiples of."""
        return sum(self.spacing) / 3

    def lengths(self, fractions: tuple[float, ...]) -> tuple[float, ...]:
        """Fractions of the extents to mm."""
        return tuple(f * n * s for f, n, s in zip(fractions, self.shape, self.spacing, strict=True))


@dataclass(frozen=True)
class Drawn:
    """Maps (z, y, x) in uint8, TISSUE where the body has no organ; the boxes that each label lies in, those of its islands included."""

    truth: NDArray[np.uint8]
    network: NDArray[np.uint8]
    boxes: dict[int, list[Box]]


def _box(part: Part, grid: Grid, margin: float) -> Box:
    if isinstance(part, Ellipsoid):
        low = tuple(c - a for c, a in zip(part.center, part.semi_axes, strict=True))
        high = tuple(c + a for c, a in zip(part.center, part.semi_axes, strict=True))
    else:
        low, high = (tuple(map(f, part.start, part.end)) for f in (min, max))
        margin += part.radius * grid.shape[2] * grid.spacing[2]
    mm = zip(grid.lengths(low), grid.lengths(high), grid.spacing, grid.shape, strict=True)
    z, y, x = (slice(max(0, int((a - margin) / s)), min(n, int((b + margin) / s) + 2)) for a, b, s, n in mm)
    return z, y, x


def _axes(box: Box, grid: Grid) -> list[NDArray[np.float32]]:
    places = [np.arange(one.start, one.stop, dtype=np.float32) * np.float32(s) for one, s in zip(box, grid.spacing, strict=True)]
    return list(np.ix_(*places))


def _signed_distance(part: Part, grid: Grid, box: Box) -> NDArray[np.float32]:
    """Distance in mm to the part's surface, negative inside; of an ellipsoid to first order."""
    axes = _axes(box, grid)
    if isinstance(part, Ellipsoid):
        scaled = [(p - c) / a for p, c, a in zip(axes, grid.lengths(part.center), grid.lengths(part.semi_axes), strict=True)]
        radius = np.sqrt(sum(s * s for s in scaled))
        slope = np.sqrt(sum((s / a) ** 2 for s, a in zip(scaled, grid.lengths(part.semi_axes), strict=True)))
        return radius * (radius - 1.0) / (slope + np.float32(1e-6))
    start, end = grid.lengths(part.start), grid.lengths(part.end)
    along = [e - s for s, e in zip(start, end, strict=True)]
    offsets = [p - s for p, s in zip(axes, start, strict=True)]
    share = np.clip(sum(o * a for o, a in zip(offsets, along, strict=True)) / sum(a * a for a in along), 0.0, 1.0)
    squares = sum((o - share * a) ** 2 for o, a in zip(offsets, along, strict=True))
    return np.sqrt(squares) - np.float32(part.radius * grid.shape[2] * grid.spacing[2])


def _wave(box: Box, wavelength: float, phases: NDArray[np.float64]) -> NDArray[np.float32]:
    """A smooth field of unit size: products of sines along two axes each, cheap because they broadcast."""
    waves = [
        np.sin(2 * pi / wavelength * np.arange(one.start, one.stop) * (1.0 + 0.1 * axis) + phases[:, axis, None]).astype(np.float32)
        for axis, one in enumerate(box)
    ]
    (z0, z1), (y0, y1), (x0, x1) = waves
    return (z0[:, None, None] * y0[:, None] + y1[:, None] * x0) + z1[:, None, None] * x1


def _draw(part: Part, label: int, grid: Grid, maps: tuple[NDArray[np.uint8], ...], seed: int) -> Box:
    rng = np.random.default_rng((seed, label))
    phases = rng.uniform(0.0, 2 * pi, (2, 2, 3))
    # Thin things keep their shape: a wave larger than the radius would cut them.
    thickness = part.radius * grid.shape[2] * grid.spacing[2] if isinstance(part, Capsule) else min(grid.lengths(part.semi_axes))
    size = min(1.0, 0.25 * thickness / grid.step)
    box = _box(part, grid, 4.0 * (WAVE_VOXELS + ERROR_VOXELS) * size * grid.step)
    for start in range(box[0].start, box[0].stop, SLAB):
        slab = (slice(start, min(start + SLAB, box[0].stop)), *box[1:])
        distance = _signed_distance(part, grid, slab) / np.float32(grid.step)
        distance += np.float32(WAVE_VOXELS * size) * _wave(slab, WAVELENGTH, phases[0])
        maps[0][slab][distance < 0.0] = label
        distance += np.float32(ERROR_VOXELS * size) * _wave(slab, ERROR_WAVELENGTH, phases[1])
        maps[1][slab][distance < 0.0] = label
    return box


def _islands(grid: Grid, network: NDArray[np.uint8], labels: list[int], seed: int) -> Iterator[tuple[int, Box]]:
    """Balls of wrong labels, 1.5 to 4 voxels in radius, anywhere in the body."""
    rng = np.random.default_rng((seed, 1000))
    for _ in range(max(4, network.size // VOXELS_PER_ISLAND)):
        center = [int(n * rng.uniform(0.1, 0.9)) for n in grid.shape]
        radius, label = rng.uniform(1.5, 4.0), int(rng.choice(labels))
        box = tuple(slice(max(0, c - 5), min(n, c + 6)) for c, n in zip(center, grid.shape, strict=True))
        squares = sum(np.ix_(*[(np.arange(one.start, one.stop) - c) ** 2.0 for one, c in zip(box, center, strict=True)]))
        inside = (squares <= radius**2) & (network[box] != 0)
        network[box][inside] = label
        if inside.any():
            yield label, box


def draw(grid: Grid, labels: list[int], seed: int) -> Drawn:
    """Draw all organs; islands have one of `labels`."""
    truth, network = np.zeros(grid.shape, np.uint8), np.zeros(grid.shape, np.uint8)
    boxes: dict[int, list[Box]] = {label: [] for label in range(1, NUM_ORGANS + 1)}
    _draw(BODY, TISSUE, grid, (truth, network), seed)
    for label, organ in enumerate(ORGANS, start=1):
        boxes[label] = [_draw(part, label, grid, (truth, network), seed) for part in organ.parts]
    for label, box in _islands(grid, network, labels, seed):
        boxes[label].append(box)
    return Drawn(truth, network, boxes)


def ct_image(truth: NDArray[np.uint8], seed: int) -> NDArray[np.int16]:
    """(z, y, x) in Hounsfield units: the organs' means, blurred by half a voxel, smooth and white noise."""
    means = np.full(256, TISSUE_HU, np.float32)
    means[0] = AIR_HU
    means[1 : NUM_ORGANS + 1] = [organ.hounsfield for organ in ORGANS]
    image = np.empty(truth.shape, np.int16)
    for start in range(0, len(truth), SLAB):
        halo = slice(max(0, start - 2), min(len(truth), start + SLAB + 2))
        inner = slice(start - halo.start, min(start + SLAB, len(truth)) - halo.start)
        values = gaussian_filter(means[truth[halo]], 0.5, radius=2)[inner]
        rng = np.random.default_rng((seed, 2000, start))
        noise = rng.standard_normal(values.shape, dtype=np.float32)
        values += np.float32(WHITE_NOISE_HU) * noise
        # A Gaussian of 1.5 voxels leaves 1 / (8 pi^1.5 1.5^3) of the variance of white noise.
        values += np.float32(SMOOTH_NOISE_HU * (8 * pi**1.5 * 1.5**3) ** 0.5) * gaussian_filter(noise, 1.5, radius=4)
        image[start : start + SLAB] = np.clip(np.rint(values), -1024, 3071)
    return image
