"""The Gaussian filter by itself.

Smoothing that keeps edges, and a coarse map brought to the resolution of a guide.
"""

from __future__ import annotations

import numpy as np
from drawing import new_figure, save, show
from numpy.typing import NDArray
from scene import PICTURES

import crfrefine

SHAPE = (16, 80, 96)
SPACING = (2.0, 1.0, 1.0)
NOISE = 0.08
FACTOR = 8
Volume = NDArray[np.floating]


def phantom() -> tuple[Volume, Volume]:
    """A volume with bodies of constant intensity, and a second property of the same bodies."""
    z, y, x = np.meshgrid(
        *(step * (np.arange(size) - size / 2) for size, step in zip(SHAPE, SPACING, strict=True)),
        indexing="ij",
    )
    image = np.full(SHAPE, 0.15)
    property_map = np.full(SHAPE, 0.1)
    for center, radii, intensity, value in (
        ((0, 0), (34, 42), 0.45, 0.35),
        ((-6, -14), (16, 14), 0.75, 0.9),
        ((8, 20), (9, 12), 0.95, 0.6),
        ((14, -10), (6, 6), 0.2, 0.15),
    ):
        inside = (z / 30) ** 2 + ((y - center[0]) / radii[0]) ** 2 + (
            (x - center[1]) / radii[1]
        ) ** 2 < 1
        image[inside] = intensity
        property_map[inside] = value
    return image, property_map


def draw() -> None:
    """Two rows: a noisy volume, its Gaussian, and its bilateral filter.

    A coarse map, interpolated, and filtered with a guide.
    """
    image, property_map = phantom()
    noisy = image + np.random.default_rng(0).normal(0.0, NOISE, SHAPE)
    positions = np.stack(
        [index * step / 1.5 for index, step in zip(np.indices(SHAPE), SPACING, strict=True)]
    )
    smooth = crfrefine.gaussian_filter(noisy[None], positions, normalization="after")[0]
    bilateral = crfrefine.bilateral_filter(noisy, spacing=SPACING, theta_alpha=3.0, theta_beta=0.2)
    blocks = property_map.reshape(
        SHAPE[0], SHAPE[1] // FACTOR, FACTOR, SHAPE[2] // FACTOR, FACTOR
    ).mean(axis=(2, 4))
    coarse = blocks.repeat(FACTOR, axis=1).repeat(FACTOR, axis=2)
    wide = np.stack(
        [
            index * step / size
            for index, step, size in zip(np.indices(SHAPE), SPACING, (1.0, 4.0, 4.0), strict=True)
        ]
    )
    interpolated = crfrefine.gaussian_filter(coarse[None], wide, normalization="after")[0]
    joint = crfrefine.bilateral_filter(
        coarse, guide=image, spacing=SPACING, theta_alpha=(2.0, 8.0, 8.0), theta_beta=0.05
    )
    figure = new_figure(8.4, 5.2, "The Gaussian filter by itself")
    rows = (
        (
            image,
            (
                ("noisy volume", noisy),
                ("Gaussian of positions", smooth),
                ("bilateral_filter", bilateral),
            ),
        ),
        (
            property_map,
            (
                (f"map {FACTOR}× coarser", coarse),
                ("Gaussian of positions", interpolated),
                ("bilateral_filter, guide", joint),
            ),
        ),
    )
    for panels, (truth, volumes) in zip(figure.subplots(2, 3), rows, strict=True):
        for axes, (name, volume) in zip(panels, volumes, strict=True):
            error = np.sqrt(np.mean((volume - truth) ** 2))
            show(axes, volume[SHAPE[0] // 2], SPACING[1:], f"{name}: error {error:.3f}")
    save(figure, PICTURES / "filter.png")


if __name__ == "__main__":
    draw()
