"""Whom a voxel listens to, and what the steps of the mean field do to a slice."""

from __future__ import annotations

import numpy as np
from drawing import COLORS, gray, new_figure, save, show, style
from scene import PICTURES, Scene, phantom_slice
from scipy.special import softmax

STEPS = (1, 2, 5)


def draw_kernel(scene: Scene) -> None:
    """Beside an edge of the image.

    The weights of neighbors by position alone, and by position and intensity.
    """
    image = scene.image[0]
    low, high = np.percentile(image, (1, 99))
    values = (image - low) / (high - low)
    row = 42
    column = 48
    rows, columns = np.meshgrid(*map(np.arange, image.shape), indexing="ij")
    distance = ((rows - row) * scene.spacing[0]) ** 2 + ((columns - column) * scene.spacing[1]) ** 2
    theta_alpha = 4.0
    theta_beta = 0.15
    near = np.exp(-distance / (2 * theta_alpha**2))
    alike = np.exp(-((values - values[row, column]) ** 2) / (2 * theta_beta**2))
    figure = new_figure(9.6, 3.6, "Whom one voxel listens to")
    part = slice(row - 16, row + 17), slice(column - 16, column + 17)
    panels = figure.subplots(1, 3)
    titles = (
        "image, and the voxel",
        "weights by distance alone",
        "weights by distance and intensity",
    )
    for axes, shown, title in zip(panels, (gray(image), near, near * alike), titles, strict=True):
        show(axes, shown[part], scene.spacing, title)
        axes.plot(
            (16 + 0.5) * scene.spacing[1],
            (16 + 0.5) * scene.spacing[0],
            "+",
            color=COLORS[0],
            markersize=12,
            markeredgewidth=2,
        )
    save(figure, PICTURES / "how_kernel.png")


def draw_steps(scene: Scene) -> None:
    """Return label maps and the background's probability after some steps, and all energies."""
    figure = new_figure(
        11.0,
        5.6,
        "Mean field on one slice: each step, every voxel listens to the others and changes its "
        "mind a little",
    )
    panels = figure.subplots(2, 5)
    picture = gray(scene.image[0])
    results = [scene.refine(mean_field__num_iterations=steps) for steps in STEPS]
    show(panels[0, 0], picture, scene.spacing, "image, truth", scene.labels)
    show(
        panels[0, 1],
        picture,
        scene.spacing,
        f"network: Dice {scene.dice(results[0].network_label_map):.2f}",
        results[0].network_label_map,
    )
    show(
        panels[1, 1],
        softmax(scene.logits, axis=0)[0],
        scene.spacing,
        "its probability of background",
    )
    for place, (steps, result) in enumerate(zip(STEPS, results, strict=True), 2):
        name = f"after {steps} step{'s' * (steps > 1)}"
        show(
            panels[0, place],
            picture,
            scene.spacing,
            f"{name}: Dice {scene.dice(result.label_map):.2f}",
            result.label_map,
        )
        show(panels[1, place], result.marginals[0], scene.spacing, f"{name}: background")
    energy = np.asarray(scene.refine(mean_field__num_iterations=8).energy)
    panels[1, 0].plot(np.arange(len(energy)), energy / 1000, "o-", color=COLORS[1])
    style(panels[1, 0], "energy / 1000 nats", "steps")
    panels[1, 0].set_box_aspect(1)
    save(figure, PICTURES / "how_steps.png")


if __name__ == "__main__":
    draw_kernel(phantom_slice())
    draw_steps(phantom_slice())
