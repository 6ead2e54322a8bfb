"""What each of the four numbers does: each too small, as in the demo, and too large."""

from __future__ import annotations

from drawing import INK, gray, new_figure, save, show
from scene import PICTURES, phantom_slice

ROWS = (
    ("bilateral.weight", "bilateral__weight", (0.5, 5.0, 300.0)),
    ("bilateral.theta_alpha, mm", "bilateral__theta_alpha", (0.6, 2.5, 40.0)),
    ("bilateral.theta_beta", "bilateral__theta_beta", (0.02, 0.1, 2.0)),
    ("mean_field.temperature", "mean_field__temperature", (0.2, 1.0, 30.0)),
)


def draw() -> None:
    """Rows are numbers, columns their values."""
    scene = phantom_slice()
    picture = gray(scene.image[0])
    figure = new_figure(6.6, 8.6, "One number changed at a time")
    panels = figure.subplots(len(ROWS), 3)
    for row, (name, key, values) in zip(panels, ROWS, strict=True):
        for axes, value in zip(row, values, strict=True):
            refined = scene.refine(**{key: value}).label_map
            show(
                axes, picture, scene.spacing, f"{value:g}: Dice {scene.dice(refined):.2f}", refined
            )
        row[0].set_ylabel(name, color=INK, fontsize=9)
    save(figure, PICTURES / "how_numbers.png")


if __name__ == "__main__":
    draw()
