"""When the CRF cannot help: thin structures, borders without edge, networks that are too sure."""

from __future__ import annotations

import numpy as np
from drawing import gray, new_figure, save, show
from numpy.typing import NDArray
from scene import PICTURES, Scene
from scipy.ndimage import gaussian_filter

SHAPE = (56, 64)
SPACING = (1.0, 1.0)
ROWS, COLUMNS = np.meshgrid(*map(np.arange, SHAPE), indexing="ij")


def case(
    inside: NDArray[np.bool_],
    visible: NDArray[np.floating],
    logits: NDArray[np.floating],
    seed: int,
) -> Scene:
    """A case whose image shows `visible`, 0 to 1, with noise, and whose truth is `inside`.

    `logits` are those of label 1.
    """
    noise = np.random.default_rng(seed).normal(0, 40, SHAPE)
    image = (300 + 400 * visible + noise).astype(np.float32)[None]
    return Scene(
        image,
        inside.astype(np.uint8),
        np.stack([np.zeros(SHAPE), logits]).astype(np.float32),
        SPACING,
    )


def smooth_noise(seed: int) -> NDArray[np.floating]:
    """Noise of variance 1 with structures of some voxels."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(0, 1, SHAPE), 1.5)
    return np.asarray(noise / noise.std())


def thin() -> Scene:
    """A vessel one to two voxels wide that hardly stands out from the noise."""
    path = np.abs(ROWS - 28 - 12 * np.sin(COLUMNS / 9)) < 0.8
    return case(path, 0.1 * path, 5.0 * path - 2.5 + 0.5 * smooth_noise(1), 1)


def convention() -> Scene:
    """One body in the image, which readers cut at a line; the network knows it, and is not sure."""
    body = ((ROWS - 28) / 15) ** 2 + ((COLUMNS - 32) / 25) ** 2 < 1
    part = body & (COLUMNS < 44)
    return case(
        part, body, np.where(part, 4.0, np.where(body, -0.5, -5.0)) + 0.4 * smooth_noise(2), 2
    )


def too_sure() -> Scene:
    """A body with false islands that a network is certain of."""
    body = ((ROWS - 28) / 14) ** 2 + ((COLUMNS - 24) / 14) ** 2 < 1
    islands = np.hypot(ROWS - 14, COLUMNS - 52) < 4
    islands |= np.hypot(ROWS - 44, COLUMNS - 50) < 3
    return case(body, body, 40.0 * ((body | islands) - 0.5), 3)


def draw() -> None:
    """Columns: truth, network, refined."""
    figure = new_figure(7.2, 6.6, "Where the CRF cannot help")
    panels = figure.subplots(3, 3)
    rows = (
        ("thin structure", thin(), 2.5),
        ("border by convention", convention(), 8.0),
        ("network too sure", too_sure(), 2.5),
    )
    for row, (name, scene, theta_alpha) in zip(panels, rows, strict=True):
        result = scene.refine(bilateral__theta_alpha=theta_alpha)
        picture = gray(scene.image[0]) * 0.8
        show(row[0], picture, SPACING, f"{name}: truth", scene.labels)
        show(
            row[1],
            picture,
            SPACING,
            f"network: Dice {scene.dice(result.network_label_map):.2f}",
            result.network_label_map,
        )
        show(
            row[2],
            picture,
            SPACING,
            f"refined: Dice {scene.dice(result.label_map):.2f}",
            result.label_map,
        )
    save(figure, PICTURES / "how_limits.png")


if __name__ == "__main__":
    draw()
